// The layouts of a tensor that kernels accept, and copies of tensors in other layouts. Used for every device.
#pragma once

#include "torch_errors.h"  // before the headers of torch that it changes
//
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "field.h"

namespace savl {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A (B, R, H, W) tensor lies channel by channel (planar) or pixel by pixel (interleaved).

// Whether the channels of a pixel lie side by side. The fake kernel in savl/ops/gaussian_posterior.py decides in the
// same way.
inline bool is_interleaved(const Tensor& mu) { return mu.stride(1) == 1 && mu.stride(3) != 1; }

inline MemoryFormat format_of(bool planar) { return planar ? MemoryFormat::Contiguous : MemoryFormat::ChannelsLast; }

// Returns the tensor itself, or a copy, such that pixels (planar) or channels (interleaved) are evenly spaced.
inline Tensor in_layout(const Tensor& tensor, bool planar) {
  const int64_t channels = tensor.size(1), height = tensor.size(2), width = tensor.size(3);
  const bool rows_follow = height == 1 || width == 1 || tensor.stride(2) == width * tensor.stride(3);
  const int64_t pixel_stride = width == 1 ? tensor.stride(2) : tensor.stride(3);
  const bool fits = planar ? height * width == 1 || pixel_stride == 1 : channels == 1 || tensor.stride(1) == 1;
  if (rows_follow && fits) return tensor;
  return torch::stable::contiguous(tensor, format_of(planar));
}

inline Field field_of(const Tensor& tensor, bool planar) {
  const int64_t pixel_stride = tensor.size(3) == 1 ? tensor.stride(2) : tensor.stride(3);
  return {tensor.const_data_ptr(), tensor.stride(0), planar ? tensor.stride(1) : 1, planar ? 1 : pixel_stride};
}

// Returns a tensor (B, H, W, C), or a copy, such that it is rows of C contiguous channels with one stride for all rows.
inline Tensor as_rows(const Tensor& tensor) {
  bool even = tensor.size(3) == 1 || tensor.stride(3) == 1;
  std::optional<int64_t> expected;  // where the next dimension outwards should step to; 0 for an expanded tensor
  for (int64_t dim = 2; dim >= 0; --dim) {
    if (tensor.size(dim) == 1) continue;
    even = even && (!expected.has_value() || tensor.stride(dim) == *expected);
    expected = tensor.stride(dim) * tensor.size(dim);
  }
  return even ? tensor : torch::stable::contiguous(tensor);
}

inline int64_t row_stride(const Tensor& rows) {
  for (int64_t dim = 2; dim >= 0; --dim) {
    if (rows.size(dim) != 1) return rows.stride(dim);
  }
  return rows.size(3);
}

inline Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) {
  return torch::stable::contiguous(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

}  // namespace savl
