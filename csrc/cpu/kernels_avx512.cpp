// The kernels for AVX-512. A build with SAVL_EMULATE_AVX512 compiles the same source for AVX2, with two registers for
// each vector. It is slower, but a machine without AVX-512 can test it.
#if defined(__x86_64__)
#define SAVL_INSTRUCTION_SET avx512
#define SAVL_VECTOR_BYTES 64
#if defined(SAVL_EMULATE_AVX512)
#define SAVL_TARGET "avx2,fma"
#else
#define SAVL_TARGET "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"
#endif
#include "cpu/instruction_set.inl"
#endif
