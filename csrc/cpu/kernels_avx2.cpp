// The kernels for AVX2 with FMA.
#if defined(__x86_64__)
#define SAVL_INSTRUCTION_SET avx2
#define SAVL_VECTOR_BYTES 32
#define SAVL_TARGET "avx2,fma"
#include "cpu/instruction_set.inl"
#endif
