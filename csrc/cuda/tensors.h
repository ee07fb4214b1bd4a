// Helpers of the ops that turn torch's tensors into the plain arguments of the kernels. The template parameter `Device`
// of an op is where the kernels run: a CUDA device (library.cpp) or the host (csrc/twin). `Device::holds(tensor)` tells
// whether a tensor is there. An object of `Device`, made for a tensor, makes the device and stream of the tensor the
// current ones and has a member function for each kernel that launches it.
#pragma once

#include "torch_errors.h"  // before the headers of torch that it changes
//
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <initializer_list>

#include "cuda/elements.h"
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
