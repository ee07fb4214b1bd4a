// Window attention on the CPU, for both ops: in window_attention the key window has the size of the query window, in
// overlapping_window_attention it is larger.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "cpu/tensors.h"

namespace savl::cpu {

struct AttentionGeometry {
  int64_t window, key_window, shift;
};

// q, k and v are (B, H, W, C) with any strides; the bias table is ((window + key_window - 1)^2, heads), severity
// (B, H, W). Returns (B, H, W, C).
Tensor attention_forward(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias_table,
                         const std::optional<Tensor>& severity, AttentionGeometry geometry);

// Writes (plain windows) or adds to (overlapping ones) the gradients of q, k and v, which have the arithmetic dtype and
// contiguous channels. Returns the gradients of the bias table and of the severity (empty without severity), in the
// dtypes of these.
std::tuple<Tensor, Tensor> attention_backward(const char* op, const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                              const Tensor& v, const Tensor& bias_table,
                                              const std::optional<Tensor>& severity, AttentionGeometry geometry,
                                              const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v);

// (B, H, W, C) whose channels are contiguous: the tensor itself, or a copy.
Tensor with_contiguous_channels(const Tensor& tensor);

// Part number `index` of the last dimension, which is cut into parts of `channels`. A view.
Tensor channel_part(const Tensor& tensor, int64_t index, int64_t channels);

}  // namespace savl::cpu
