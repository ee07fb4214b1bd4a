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

AttentionInputs inputs_of(const Tensor& q, const Tensor& kv, const Tensor& bias_table,
                          const std::optional<Tensor>& severity) {
  const int64_t channels = channels_of(q, kv);
  return {q,           channel_part(kv, 0, channels), channel_part(kv, 1, channels), bias_table, std::nullopt, severity,
          std::nullopt};
}

AttentionOptions options_of(const Tensor& bias_table, int64_t window, int64_t key_window) {
  STD_TORCH_CHECK(bias_table.dim() == 2, kOp, ": bias_table must be (rows, heads)");
  AttentionOptions options;
  options.heads = bias_table.size(1);
  options.rows = options.columns = {0, 0, window, key_window, 0, 0};
  options.overlapping = true;
  return options;
}

// The second result is the log-sum-exp, which this backward pass does not need: it is empty.
std::tuple<Tensor, Tensor> overlapping_window_attention(const Tensor& q, const Tensor& kv, const Tensor& bias_table,
                                                        const std::optional<Tensor>& severity, int64_t window,
                                                        int64_t key_window) {
  const Tensor out =
      attention_forward(kOp, inputs_of(q, kv, bias_table, severity), options_of(bias_table, window, key_window));
  return {out, new_tensor({0}, ScalarType::Float)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> overlapping_window_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& kv, const Tensor& bias_table,
    const std::optional<Tensor>& severity, const std::optional<Tensor>& /*out*/, const std::optional<Tensor>& /*lse*/,
    int64_t window, int64_t key_window) {
  const AttentionInputs inputs = inputs_of(q, kv, bias_table, severity);
  const int64_t channels = q.size(3);
  const ScalarType dtype = q.scalar_type(), arithmetic = arithmetic_of(q);
  const Tensor grad_q = new_tensor({q.size(0), q.size(1), q.size(2), channels}, arithmetic);
  const Tensor grad_kv = new_zeros({q.size(0), q.size(1), q.size(2), 2 * channels}, arithmetic);
  const AttentionGradients others =
      attention_backward(kOp, grad_out, inputs, options_of(bias_table, window, key_window), grad_q,
                         channel_part(grad_kv, 0, channels), channel_part(grad_kv, 1, channels));
  return {torch::stable::to(grad_q, dtype), torch::stable::to(grad_kv, dtype), others.bias_table, others.severity};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(savl, CPU, library) {
  library.impl("overlapping_window_attention", TORCH_BOX(&overlapping_window_attention));
  library.impl("overlapping_window_attention_backward", TORCH_BOX(&overlapping_window_attention_backward));
}

}  // namespace savl::cpu
