// The definition of a CPU kernel: a function that takes plain arguments and works on a range of tasks. This header
// needs neither torch nor vectors.
//
// The shape of the arguments alone determines the tasks, and every task adds up in a fixed order. Results therefore
// have the same bits on any number of threads.
#pragma once

#include <cstdint>

namespace savl::cpu {

// The dtypes that every CPU kernel is compiled for. In comments and templates, S is the storage type of the tensors,
// and T is the type of all arithmetic: double for float64, float otherwise. Instruction sets for bfloat16 multiply
// numbers of S in attention and convolutions and add them up in T (cpu/bfloat16_products.h).
enum class Storage : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2 };
constexpr int kStorages = 3;

constexpr int kWidestVector = 64;  // bytes; the largest of all instruction sets

// Works on tasks [begin, end).
template <typename Args>
using Kernel = void (*)(const Args& args, int64_t begin, int64_t end);

// The kernels of an op, compiled for one instruction set: one for each dtype.
template <typename Args>
struct OpKernels {
  Kernel<Args> forward[kStorages], backward[kStorages];
};

}  // namespace savl::cpu
