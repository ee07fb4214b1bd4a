// Helpers with which the ops check their tensors and convert them to the arguments of the kernels.
//
// The template parameter `Device` of an op is a class for the kind of device that runs the kernels: CUDA devices
// (library.cpp), or the CPU (csrc/twin, a library for tests). `Device::holds(tensor)` returns whether a tensor is on
// such a device. `Device::kName` is the name in messages. The constructor `Device(tensor)` makes the device of the
// tensor and its stream current. The class has one member function per kernel, which launches the kernel.
#pragma once

// This header must come first, because it redefines a macro that the functions in the headers of torch use.
#include "torch_errors.h"
//
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <initializer_list>

#include "cuda/elements.h"
#include "layouts.h"

namespace savl::gpu {

// Return the storage type of a tensor. Raise an error if the kernels do not support it.
inline Storage storage_of(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat32;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    case ScalarType::Half:
      return Storage::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": the CUDA kernels accept float32, bfloat16 and float16 tensors");
  }
}

// Check that a 4-dimensional tensor has the device and the shape of another tensor.
template <typename Device>
void check_device_and_shape(const char* op, const char* name, const Tensor& tensor, const char* like_name,
                            const Tensor& like) {
  STD_TORCH_CHECK(Device::holds(tensor) && tensor.get_device_index() == like.get_device_index(), op, ": ", name,
                  " must be on the same device as ", like_name, ", and the device must be ", Device::kName);
  STD_TORCH_CHECK(tensor.dim() == 4, op, ": ", name, " must have 4 dimensions, got ", tensor.dim());
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(tensor.size(dim) == like.size(dim), op, ": ", name, " must have the shape of ", like_name,
                    ", got size ", tensor.size(dim), " instead of ", like.size(dim), " in dimension ", dim);
  }
}

// Check that a tensor has the dtype of another tensor.
inline void check_dtype(const char* op, const char* name, const Tensor& tensor, const char* like_name,
                        const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of ", like_name);
}

// Return an uninitialized tensor on the device of another tensor.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype,
                         MemoryFormat format = MemoryFormat::Contiguous) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, dtype, std::nullopt, like.device(), std::nullopt, format);
}

// Raise an error if `error`, the message of a failed launch, is not null.
inline void check_launch(const char* op, const char* error) {
  STD_TORCH_CHECK(error == nullptr, op, ": the kernel could not be launched: ", error == nullptr ? "" : error);
}

}  // namespace savl::gpu
