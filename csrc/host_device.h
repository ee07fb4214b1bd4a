// Functions that run on both sides are marked SAVL_HOST_DEVICE: nvcc compiles them for both, others see nothing.
#pragma once

#if defined(__CUDACC__)
#define SAVL_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define SAVL_HOST_DEVICE inline __attribute__((always_inline))
#else
#define SAVL_HOST_DEVICE inline
#endif

// Before a loop whose trip count is known: what it indexes can then live in registers.
#if defined(__CUDACC__)
#define SAVL_UNROLL _Pragma("unroll")
#define SAVL_NO_UNROLL _Pragma("unroll 1")
#else
#define SAVL_UNROLL
#define SAVL_NO_UNROLL
#endif
