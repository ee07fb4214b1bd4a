// The kernels for AVX2 with FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <new>
#include <utility>

#include "cpu/kernel_table.h"
#include "cpu/target.h"
#include "philox.h"

#define SAVL_INSTRUCTION_SET avx2
#define SAVL_VECTOR_BYTES 32
#define SAVL_TABLE kAvx2Kernels
SAVL_BEGIN_TARGET("avx2,fma")
#include "cpu/kernels.inl"
SAVL_END_TARGET
#endif
