// savl::overlapping_window_attention on the CPU; the op is defined in savl/ops/overlapping_window_attention.py.
#include "cpu/attention_op.h"

namespace savl::cpu {
namespace {

const char* const kOp = "savl::overlapping_window_attention";

int64_t channels_of(const Tensor& q, const Tensor& kv) {
  STD_TORCH_CHECK(q.dim() == 4 && kv.dim() == 4 && kv.size(3) == 2 * q.size(3), kOp,
                  ": q must be (B, H, W, C) and kv (B, H, W, 2C)");
  return q.size(3);
}

// The second result is the log-sum-exp, which this backward pass does not need: it is empty.
std::tuple<Tensor, Tensor> overlapping_window_attention(const Tensor& q, const Tensor& kv, const Tensor& bias_table,
                                                        const std::optional<Tensor>& severity, int64_t window,
                                                        int64_t key_window) {
  const int64_t channels = channels_of(q, kv);
  return {attention_forward(kOp, q, channel_part(kv, 0, channels), channel_part(kv, 1, channels), bias_table, severity,
                            {window, key_window, 0}),
          new_tensor({0}, ScalarType::Float)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> overlapping_window_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& kv, const Tensor& bias_table,
    const std::optional<Tensor>& severity, const std::optional<Tensor>& /*out*/, const std::optional<Tensor>& /*lse*/,
    int64_t window, int64_t key_window) {
  const int64_t channels = channels_of(q, kv);
  const ScalarType arithmetic = arithmetic_of(q);
  const Tensor grad_q = new_tensor({q.size(0), q.size(1), q.size(2), channels}, arithmetic);
  const Tensor grad_kv = new_zeros({q.size(0), q.size(1), q.size(2), 2 * channels}, arithmetic);
  auto [grad_bias, grad_severity] = attention_backward(
      kOp, grad_out, q, channel_part(kv, 0, channels), channel_part(kv, 1, channels), bias_table, severity,
      {window, key_window, 0}, grad_q, channel_part(grad_kv, 0, channels), channel_part(grad_kv, 1, channels));
  const ScalarType dtype = q.scalar_type();
  return {torch::stable::to(grad_q, dtype), torch::stable::to(grad_kv, dtype), grad_bias, grad_severity};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(savl, CPU, library) {
  library.impl("overlapping_window_attention", TORCH_BOX(&overlapping_window_attention));
  library.impl("overlapping_window_attention_backward", TORCH_BOX(&overlapping_window_attention_backward));
}

}  // namespace savl::cpu
