// savl::window_attention on the CPU; the op is defined in savl/ops/window_attention.py.
#include "cpu/attention_op.h"

namespace savl::cpu {
namespace {

const char* const kOp = "savl::window_attention";

int64_t channels_of(const Tensor& qkv) {
  STD_TORCH_CHECK(qkv.dim() == 4 && qkv.size(3) % 3 == 0, kOp, ": qkv must be (B, H, W, 3C)");
  return qkv.size(3) / 3;
}

// The second result is the log-sum-exp, which this backward pass does not need: it is empty.
std::tuple<Tensor, Tensor> window_attention(const Tensor& qkv, const Tensor& bias_table,
                                            const std::optional<Tensor>& severity, int64_t window, int64_t shift) {
  const int64_t channels = channels_of(qkv);
  return {attention_forward(kOp, channel_part(qkv, 0, channels), channel_part(qkv, 1, channels),
                            channel_part(qkv, 2, channels), bias_table, severity, {window, window, shift}),
          new_tensor({0}, ScalarType::Float)};
}

std::tuple<Tensor, Tensor, Tensor> window_attention_backward(
    const Tensor& grad_out, const Tensor& qkv, const Tensor& bias_table, const std::optional<Tensor>& severity,
    const std::optional<Tensor>& /*out*/, const std::optional<Tensor>& /*lse*/, int64_t window, int64_t shift) {
  const int64_t channels = channels_of(qkv);
  const Tensor grad = new_tensor({qkv.size(0), qkv.size(1), qkv.size(2), 3 * channels}, arithmetic_of(qkv));
  auto [grad_bias, grad_severity] = attention_backward(
      kOp, grad_out, channel_part(qkv, 0, channels), channel_part(qkv, 1, channels), channel_part(qkv, 2, channels),
      bias_table, severity, {window, window, shift}, channel_part(grad, 0, channels), channel_part(grad, 1, channels),
      channel_part(grad, 2, channels));
  return {torch::stable::to(grad, qkv.scalar_type()), grad_bias, grad_severity};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(savl, CPU, library) {
  library.impl("window_attention", TORCH_BOX(&window_attention));
  library.impl("window_attention_backward", TORCH_BOX(&window_attention_backward));
}

}  // namespace savl::cpu
