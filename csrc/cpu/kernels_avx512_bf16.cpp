// Products of bfloat16 numbers with AVX512-BF16. The other kernels are those for AVX-512. A build with
// SAVL_EMULATE_AVX512 compiles the same source for AVX2 and computes the products with functions.
#if defined(__x86_64__)
#define SAVL_INSTRUCTION_SET avx512_bf16
#define SAVL_VECTOR_BYTES 64
#define SAVL_BFLOAT16_PAIRS
#if defined(SAVL_EMULATE_AVX512)
#define SAVL_TARGET "avx2,fma"
#else
#define SAVL_TARGET "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"
#endif
#include "cpu/instruction_set.inl"
#endif
