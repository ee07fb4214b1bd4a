// savl::window_attention on the CPU; the op is defined in savl/ops/window_attention.py.
#include "cpu/attention_op.h"

namespace savl::cpu {
namespace {

const char* const kOp = "savl::window_attention";

using MaybeTensor = std::optional<Tensor>;

// q, k and v are apart, or side by side in qkv.
AttentionInputs inputs_of(const Tensor& qkv, const MaybeTensor& bias_table, const MaybeTensor& severity,
                          const MaybeTensor& k, const MaybeTensor& v, const MaybeTensor& bias,
                          const MaybeTensor& scale) {
  STD_TORCH_CHECK(k.has_value() == v.has_value(), kOp, ": k and v must be given together");
  if (k.has_value()) return {qkv, *k, *v, bias_table, bias, severity, scale};
  STD_TORCH_CHECK(qkv.dim() == 4 && qkv.size(3) % 3 == 0, kOp, ": qkv must be (B, H, W, 3C)");
  const int64_t channels = qkv.size(3) / 3;
  return {channel_part(qkv, 0, channels),
          channel_part(qkv, 1, channels),
          channel_part(qkv, 2, channels),
          bias_table,
          bias,
          severity,
          scale};
}

AttentionOptions options_of(int64_t heads, int64_t window_height, int64_t window_width, int64_t key_height,
                            int64_t key_width, int64_t shift_rows, int64_t shift_columns, bool dilated,
                            std::optional<double> mask) {
  STD_TORCH_CHECK(window_height >= 1 && window_width >= 1, kOp, ": bad window");
  AttentionOptions options;
  options.heads = heads;
  options.rows = {0, 0, window_height, key_height, shift_rows, shift_rows * key_height / window_height};
  options.columns = {0, 0, window_width, key_width, shift_columns, shift_columns * key_width / window_width};
  options.dilated = dilated;
  if (mask.has_value()) options.mask = *mask;  // minus infinity otherwise
  return options;
}

// The second result is the log-sum-exp, which this backward pass does not need: it is empty.
std::tuple<Tensor, Tensor> window_attention(const Tensor& qkv, const MaybeTensor& bias_table,
                                            const MaybeTensor& severity, const MaybeTensor& k, const MaybeTensor& v,
                                            const MaybeTensor& bias, const MaybeTensor& scale, int64_t heads,
                                            int64_t window_height, int64_t window_width, int64_t key_height,
                                            int64_t key_width, int64_t shift_rows, int64_t shift_columns, bool dilated,
                                            std::optional<double> mask) {
  const AttentionInputs inputs = inputs_of(qkv, bias_table, severity, k, v, bias, scale);
  const AttentionOptions options =
      options_of(heads, window_height, window_width, key_height, key_width, shift_rows, shift_columns, dilated, mask);
  return {attention_forward(kOp, inputs, options), new_tensor({0}, ScalarType::Float)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> window_attention_backward(
    const Tensor& grad_out, const Tensor& qkv, const MaybeTensor& bias_table, const MaybeTensor& severity,
    const MaybeTensor& k, const MaybeTensor& v, const MaybeTensor& bias, const MaybeTensor& scale,
    const MaybeTensor& /*out*/, const MaybeTensor& /*lse*/, int64_t heads, int64_t window_height, int64_t window_width,
    int64_t key_height, int64_t key_width, int64_t shift_rows, int64_t shift_columns, bool dilated,
    std::optional<double> mask) {
  const AttentionInputs inputs = inputs_of(qkv, bias_table, severity, k, v, bias, scale);
  const AttentionOptions options =
      options_of(heads, window_height, window_width, key_height, key_width, shift_rows, shift_columns, dilated, mask);
  const ScalarType dtype = qkv.scalar_type(), arithmetic = arithmetic_of(qkv);
  const auto new_like = [&](const Tensor& x) {
    return new_tensor({x.size(0), x.size(1), x.size(2), x.size(3)}, arithmetic);
  };
  const Tensor grad = new_like(qkv);
  Tensor grad_q = grad, grad_k, grad_v;
  if (k.has_value()) {
    grad_k = new_like(*k);
    grad_v = new_like(*v);
  } else {
    const int64_t channels = qkv.size(3) / 3;
    grad_q = channel_part(grad, 0, channels);
    grad_k = channel_part(grad, 1, channels);
    grad_v = channel_part(grad, 2, channels);
  }
  const AttentionGradients others = attention_backward(kOp, grad_out, inputs, options, grad_q, grad_k, grad_v);
  const auto nothing = [&] { return new_tensor({0}, dtype); };
  return {torch::stable::to(grad, dtype),
          others.bias_table,
          others.severity,
          k.has_value() ? torch::stable::to(grad_k, dtype) : nothing(),
          k.has_value() ? torch::stable::to(grad_v, dtype) : nothing(),
          others.bias,
          others.scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(savl, CPU, library) {
  library.impl("window_attention", TORCH_BOX(&window_attention));
  library.impl("window_attention_backward", TORCH_BOX(&window_attention_backward));
}

}  // namespace savl::cpu
