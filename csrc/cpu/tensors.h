// Helpers of the ops that turn torch's tensors into the plain arguments of the kernels.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "cpu/kernel.h"
#include "cpu/kernel_table.h"
#include "layouts.h"

namespace savl::cpu {

// The storage type of a tensor. Throws for a dtype that the kernels are not compiled for.
inline Storage storage_of(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat32;
    case ScalarType::Double:
      return Storage::kFloat64;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": the C++ kernels accept float32, float64 and bfloat16 tensors");
  }
}

// The dtype of the kernels' arithmetic.
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

// The elements of a row-wise kernel that are worth a thread.
constexpr int64_t kElementsPerThread = 1 << 14;

// The rows that are worth a thread.
inline int64_t rows_per_thread(int64_t channels) {
  return channels >= kElementsPerThread ? 1 : kElementsPerThread / (channels > 0 ? channels : 1);
}

// Runs the kernel for a dtype on all tasks, with torch's threads. Each thread takes at least `grain` tasks at a time.
template <typename Args>
void run(const Kernel<Args> (&kernels)[kStorages], Storage storage, const Args& args, int64_t tasks,
         int64_t grain = 1) {
  if (tasks == 0) return;
  const Kernel<Args> kernel = kernels[static_cast<int>(storage)];
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace savl::cpu
