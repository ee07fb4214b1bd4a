// What the ops share between torch's tensors and the kernels' plain arguments. `Device` is where they run: see
// library.cpp for CUDA, csrc/twin for the host. It says what it `holds`, and constructed for a tensor it makes that
// tensor's device and stream the current ones and launches kernels there.
#pragma once

#include "torch_errors.h"  // before the headers of torch that it changes
//
#include <torch/csrc/stable/accelerator.h>

#include "cuda/modulation.h"
#include "cuda/statistics.h"
#include "layouts.h"

namespace savl::gpu {

inline Storage storage_of(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat32;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    case ScalarType::Half:
      return Storage::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": the CUDA kernel takes float32, bfloat16 and float16");
  }
}

template <typename Device>
void check_like(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like) {
  STD_TORCH_CHECK(Device::holds(tensor) && tensor.get_device_index() == like.get_device_index(), op, ": ", name,
                  " must be on the device of ", like_name, ", which must be ", Device::kName);
  STD_TORCH_CHECK(tensor.dim() == 4, op, ": ", name, " must have 4 dimensions, got ", tensor.dim());
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(tensor.size(dim) == like.size(dim), op, ": ", name, " must have the shape of ", like_name);
  }
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, const char* like_name,
                        const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of ", like_name);
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype,
                         MemoryFormat format = MemoryFormat::Contiguous) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, dtype, std::nullopt, like.device(), std::nullopt, format);
}

inline void check_launch(const char* op, const char* error) {
  STD_TORCH_CHECK(error == nullptr, op, ": the kernel was not launched: ", error == nullptr ? "" : error);
}

}  // namespace savl::gpu
