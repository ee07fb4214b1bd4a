// The ops window_attention and overlapping_window_attention on the CPU. In window_attention, the key window and the
// query window have the same size. In overlapping_window_attention, the key window is larger.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "cpu/tensors.h"

namespace savl::cpu {

// Sizes in pixels.
struct AttentionGeometry {
  int64_t window, key_window, shift;
};

// Computes attention. q, k and v have shape (B, H, W, C) and any strides; bias_table has shape
// ((window + key_window - 1)^2, heads); severity has shape (B, H, W). Returns the output, of shape (B, H, W, C).
Tensor attention_forward(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias_table,
                         const std::optional<Tensor>& severity, AttentionGeometry geometry);

// Computes the gradients. Those of q, k and v are stored in grad_q, grad_k and grad_v, which must have contiguous
// channels and the dtype arithmetic_of(q). If key_window is larger than window, the gradients of k and v are added to
// grad_k and grad_v, which must be initialized; otherwise all three are overwritten. Returns the gradients of
// bias_table and severity, in the dtypes of these tensors. The gradient of severity is empty if there is no severity.
std::tuple<Tensor, Tensor> attention_backward(const char* op, const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                              const Tensor& v, const Tensor& bias_table,
                                              const std::optional<Tensor>& severity, AttentionGeometry geometry,
                                              const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v);

// Returns a tensor (B, H, W, C) with contiguous channels: the given tensor, or a copy.
Tensor with_contiguous_channels(const Tensor& tensor);

// Returns a view of channels index * channels to (index + 1) * channels - 1 of a tensor (B, H, W, C).
Tensor channel_part(const Tensor& tensor, int64_t index, int64_t channels);

}  // namespace savl::cpu
