// Compiles all CPU kernels for one instruction set and defines their table. A source file that includes this defines,
// before its first #include:
//
//   SAVL_INSTRUCTION_SET   the name, which is also the namespace of the kernels
//   SAVL_VECTOR_BYTES      the size of a vector
//   SAVL_TARGET            the processor features to compile for, such as "avx2,fma"
//
// cpu/simd.h documents the defaults without these definitions.
#include "cpu/kernel_table.h"

#define SAVL_QUOTED(token) #token
#define SAVL_EXPANDED_QUOTED(token) SAVL_QUOTED(token)

#define SAVL_FOR_EACH_STORAGE(kernel) {kernel<float>, kernel<double>, kernel<BFloat16>}
#define SAVL_ENTRY(op, Args) {SAVL_FOR_EACH_STORAGE(op##_kernel), SAVL_FOR_EACH_STORAGE(op##_backward_kernel)},

namespace savl::cpu::SAVL_INSTRUCTION_SET {

#if defined(SAVL_BFLOAT16_PAIRS)
const BFloat16Products kProducts = {attention_kernel<BFloat16>, attention_backward_kernel<BFloat16>,
                                    convolution_kernel<BFloat16>};
#else
const KernelTable kKernels = {
    SAVL_EXPANDED_QUOTED(SAVL_INSTRUCTION_SET),
    SAVL_FOR_EACH_OP(SAVL_ENTRY) SAVL_FOR_EACH_STORAGE(convolution_kernel),
    SAVL_FOR_EACH_STORAGE(channel_gate_kernel),
};
#endif

}  // namespace savl::cpu::SAVL_INSTRUCTION_SET
