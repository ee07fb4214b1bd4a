// Annotations that tell a compiler which processors a function is compiled for.
#pragma once

// Functions that run on the host and on a CUDA device: nvcc compiles them for both.
#if defined(__CUDACC__)
#define SAVL_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define SAVL_HOST_DEVICE inline __attribute__((always_inline))
#else
#define SAVL_HOST_DEVICE inline
#endif

// Placed before a loop whose trip count is a constant. An array that the loop indexes can then stay in registers.
#if defined(__CUDACC__)
#define SAVL_UNROLL _Pragma("unroll")
#define SAVL_NO_UNROLL _Pragma("unroll 1")
#else
#define SAVL_UNROLL
#define SAVL_NO_UNROLL
#endif

// Functions between these two macros are compiled for the CPU features that SAVL_TARGET names, such as "avx2,fma".
// Without SAVL_TARGET the macros are empty. Put them after all #include lines: an inline function of the standard
// library that two source files define is kept only once, and the copy compiled for AVX-512 would crash an older
// processor.
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
