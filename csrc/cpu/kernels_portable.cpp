// The kernels for the features that every processor of the architecture has: SSE2 on x86-64, NEON on 64-bit Arm.
#include "cpu/instruction_set.inl"
