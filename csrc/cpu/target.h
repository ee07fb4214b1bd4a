// Compiles what stands between two macros for a processor with more than the rest of the library asks for.
#pragma once

#define SAVL_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SAVL_BEGIN_TARGET(features) \
  SAVL_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SAVL_END_TARGET _Pragma("clang attribute pop")
#else
#define SAVL_BEGIN_TARGET(features) _Pragma("GCC push_options") SAVL_PRAGMA(GCC target(features))
#define SAVL_END_TARGET _Pragma("GCC pop_options")
#endif
