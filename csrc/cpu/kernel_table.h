// The tables of CPU kernels. There is one table for each instruction set, with the kernels of every op.
//
// To add an op to the CPU backend:
//   1. In csrc/cpu/<op>.h, define the struct of its arguments. Between SAVL_BEGIN_KERNELS and SAVL_END_KERNELS, define
//      the templates `<op>_kernel<S>` and `<op>_backward_kernel<S>` for a storage type S. cpu/kernel.h defines the
//      signature of a kernel.
//   2. In this file, add an #include of that header and a line in SAVL_FOR_EACH_OP.
//   3. In csrc/cpu/<op>.cpp, convert torch's tensors to the arguments, call `run(kernels().<op>.forward, ...)`
//      (cpu/tensors.h), and register the op with torch's dispatcher.
// If operations of torch compute the gradients, add a member `Kernel<Args> <op>[kStorages]` to KernelTable instead, and
// its kernels to cpu/instruction_set.inl. setup.py compiles every .cpp file of this folder. layer_norm.{h,cpp} is the
// shortest example.
#pragma once

#include <string>
#include <vector>

#include "cpu/attention_backward.h"
#include "cpu/attention_forward.h"
#include "cpu/channel_gate.h"
#include "cpu/channel_modulation.h"
#include "cpu/convolution.h"
#include "cpu/gaussian_posterior.h"
#include "cpu/kernel.h"
#include "cpu/layer_norm.h"

// Calls X(op, Args) for every op that has a backward kernel in C++. window_attention and overlapping_window_attention
// share the entry `attention`.
#define SAVL_FOR_EACH_OP(X)                    \
  X(attention, AttentionArgs)                  \
  X(channel_modulation, ChannelModulationArgs) \
  X(gaussian_posterior, GaussianPosteriorArgs) \
  X(layer_norm, LayerNormArgs)

namespace savl::cpu {

struct KernelTable {
  const char* instruction_set;
#define SAVL_MEMBER(op, Args) OpKernels<Args> op;
  SAVL_FOR_EACH_OP(SAVL_MEMBER)
#undef SAVL_MEMBER
  // Ops without a backward kernel in C++. savl/ops/<op>.py computes their gradients (`backward_in_torch`).
  Kernel<ConvolutionArgs> convolution[kStorages];
  Kernel<ChannelGateArgs> channel_gate[kStorages];
};

// The bfloat16 kernels with matrix products. avx512_bf16 and amx define only these; kernel_table.cpp copies the table
// of avx512 and replaces its kernels.
struct BFloat16Products {
  Kernel<AttentionArgs> attention_forward, attention_backward;
  Kernel<ConvolutionArgs> convolution;
};

// Each instruction set has its own source file, which defines a full table or only BFloat16Products.
namespace portable {
extern const KernelTable kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kKernels;
}
namespace avx512 {
extern const KernelTable kKernels;
}
namespace avx512_bf16 {
extern const BFloat16Products kProducts;
}
namespace amx {
extern const BFloat16Products kProducts;
}
#endif

// The features that the kernels use and that both the processor and the operating system support, in a fixed order:
// "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "amx_bf16" on x86-64; "neon" on 64-bit
// Arm.
std::vector<std::string> processor_features();

// The tables that this processor can run, the fastest first. "portable" is always among them.
const std::vector<const KernelTable*>& kernel_tables();

// The table in use: the fastest, unless SAVL_CPU_INSTRUCTION_SET or `use_kernels` selects another one.
const KernelTable& kernels();

// Selects a table by name. If this processor cannot run it, returns false and keeps the current table.
bool use_kernels(const char* instruction_set);

}  // namespace savl::cpu
