// What the ops share between torch's tensors and the kernels' plain arguments.
#pragma once

#include "cpu/kernel_table.h"
#include "layouts.h"

namespace savl::cpu {

// Which of a kernel's three instances works on a dtype; an error names the op for the others.
inline Storage storage_of(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat32;
    case ScalarType::Double:
      return Storage::kFloat64;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": the C++ kernel takes float32, float64 and bfloat16");
  }
}

// The dtype of the kernel's arithmetic.
inline ScalarType arithmetic_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType dtype,
                         std::optional<MemoryFormat> format = std::nullopt) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, dtype, std::nullopt, std::nullopt, std::nullopt, format);
}

inline Tensor new_zeros(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  Tensor result = new_tensor(sizes, dtype);
  return torch::stable::zero_(result);
}

// Runs a kernel on all its tasks, with torch's own threads.
template <typename Args>
void run(Kernel<Args> kernel, const Args& args, int64_t tasks, int64_t grain) {
  if (tasks == 0) return;
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace savl::cpu
