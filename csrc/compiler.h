// Compiler-specific annotations: host and device functions, loop unrolling, and CPU features of functions.
#pragma once

// Marks a function that is always inlined. nvcc compiles it for both the host and the device.
#if defined(__CUDACC__)
#define SAVL_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define SAVL_HOST_DEVICE inline __attribute__((always_inline))
#else
#define SAVL_HOST_DEVICE inline
#endif

// SAVL_UNROLL, before a loop with a constant trip count, makes nvcc unroll the loop. Arrays that the loop indexes can
// then stay in registers. SAVL_NO_UNROLL, before a loop, prevents unrolling.
#if defined(__CUDACC__)
#define SAVL_UNROLL _Pragma("unroll")
#define SAVL_NO_UNROLL _Pragma("unroll 1")
#else
#define SAVL_UNROLL
#define SAVL_NO_UNROLL
#endif

// Functions between SAVL_BEGIN_TARGET and SAVL_END_TARGET are compiled for the CPU features in SAVL_TARGET, for example
// "avx2,fma". Without SAVL_TARGET the macros are empty. SAVL_BEGIN_TARGET must follow all #include lines. Otherwise
// inline functions of the standard library would be compiled for these features too, and the linker, which keeps one
// copy of each inline function, might keep a copy that uses AVX-512 and crashes on older processors.
#if !defined(SAVL_TARGET)
#define SAVL_BEGIN_TARGET
#define SAVL_END_TARGET
#elif defined(__clang__)
#define SAVL_PRAGMA(text) _Pragma(#text)
#define SAVL_BEGIN_TARGET_FEATURES(features) \
  SAVL_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SAVL_BEGIN_TARGET SAVL_BEGIN_TARGET_FEATURES(SAVL_TARGET)
#define SAVL_END_TARGET _Pragma("clang attribute pop")
#else
#define SAVL_PRAGMA(text) _Pragma(#text)
#define SAVL_BEGIN_TARGET_FEATURES(features) _Pragma("GCC push_options") SAVL_PRAGMA(GCC target(features))
#define SAVL_BEGIN_TARGET SAVL_BEGIN_TARGET_FEATURES(SAVL_TARGET)
#define SAVL_END_TARGET _Pragma("GCC pop_options")
#endif
