// The kernels for whatever every processor of the architecture has: SSE2 on x86-64, NEON on 64-bit Arm.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <new>
#include <utility>

#include "cpu/kernel_table.h"
#include "philox.h"

#define SAVL_INSTRUCTION_SET portable
#define SAVL_VECTOR_BYTES 16
#define SAVL_TABLE kPortableKernels
#include "cpu/kernels.inl"
