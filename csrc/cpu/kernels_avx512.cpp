// The kernels for AVX-512. A build with SAVL_EMULATE_AVX512 compiles them for AVX2, each vector as two: slower, and the
// same source, so that a machine without AVX-512 can test them.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <new>
#include <utility>

#include "cpu/kernel_table.h"
#include "cpu/target.h"
#include "philox.h"

#define SAVL_INSTRUCTION_SET avx512
#define SAVL_VECTOR_BYTES 64
#define SAVL_TABLE kAvx512Kernels
#if defined(SAVL_EMULATE_AVX512)
SAVL_BEGIN_TARGET("avx2,fma")
#else
SAVL_BEGIN_TARGET("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
#endif
#include "cpu/kernels.inl"
SAVL_END_TARGET
#endif
