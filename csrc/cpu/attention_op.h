// The ops window_attention and overlapping_window_attention on the CPU, which share their kernels.
#pragma once

#include <cstdint>
#include <optional>

#include "cpu/attention_window.h"
#include "cpu/tensors.h"

namespace savl::cpu {

// The tensors of a call. q is (B, H, W, C), k and v are (B, H', W', C), all with any strides. At most one bias is
// given: bias_table (rows.span() * columns.span(), heads) or bias (heads, queries, keys).
struct AttentionInputs {
  Tensor q, k, v;
  std::optional<Tensor> bias_table, bias;
  std::optional<Tensor> severity;  // (B, H, W)
  std::optional<Tensor> scale;     // (heads,): of the cosine; without it, the product is divided by sqrt(head_dim)
};

// The options of a call. The sizes of the images in `rows` and `columns` need not be set.
struct AttentionOptions {
  int64_t heads = 1;
  AxisSizes rows{}, columns{};
  bool dilated = false, overlapping = false;
  double mask = -__builtin_inf();  // between different sides of a shifted image
};

// Computes attention. Returns the output, of shape (B, H, W, C).
Tensor attention_forward(const char* op, const AttentionInputs& inputs, const AttentionOptions& options);

// The gradients of inputs other than q, k and v, in their dtypes. Those of absent tensors are empty.
struct AttentionGradients {
  Tensor bias_table, bias, severity, scale;
};

// Computes the gradients. Those of q, k and v are stored in grad_q, grad_k and grad_v, which must have contiguous
// channels and the dtype arithmetic_of(q). If windows overlap, the gradients of k and v are added to grad_k and grad_v,
// which must be initialized; otherwise all three are overwritten.
AttentionGradients attention_backward(const char* op, const Tensor& grad_out, const AttentionInputs& inputs,
                                      const AttentionOptions& options, const Tensor& grad_q, const Tensor& grad_k,
                                      const Tensor& grad_v);

// Returns a view of channels index * channels to (index + 1) * channels - 1 of a tensor (B, H, W, C).
Tensor channel_part(const Tensor& tensor, int64_t index, int64_t channels);

}  // namespace savl::cpu
