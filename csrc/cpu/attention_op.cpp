#include "cpu/attention_op.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/attention_cosine.h"

namespace savl::cpu {
namespace {

// Chunks of windows, each with its own gradient of the bias: enough to keep threads busy, few enough to add up, and
// small enough together for a dense bias.
constexpr int64_t kMostChunks = 16, kMostChunkBytes = 1 << 26;

Image image_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

Tensor with_contiguous_channels(const Tensor& tensor) {
  return tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// A finite value stays finite: a bias may use the lowest number of its dtype as a mask.
template <typename T>
T in_units_of_ln2(T value) {
  const double scaled = value * 1.4426950408889634074;
  const double largest = std::numeric_limits<T>::max();
  return static_cast<T>(std::isfinite(value) ? std::clamp(scaled, -largest, largest) : scaled);
}

// Calls `work(in kernel, in tensor)` for each element of a bias: where the kernel has it, and where the tensor has it.
template <typename Work>
void for_each_bias(const AttentionArgs& args, const Work& work) {
  const int64_t size = args.bias_size();
  if (!args.bias_is_table) {
    for (int64_t i = 0; i < args.heads * size; ++i) work(i, i);
    return;
  }
  const int64_t span = args.columns.span();
  for (int64_t row = 0, i = 0; row < args.rows.span(); ++row) {
    for (int64_t column = 0; column < span; ++column) {
      for (int64_t head = 0; head < args.heads; ++head, ++i) work(head * size + row * span + span - 1 - column, i);
    }
  }
}

// The bias in the layout of the kernels, or zeros for the keys of a query if there is none.
template <typename T>
struct KernelBias {
  std::vector<T> values;

  KernelBias(AttentionArgs& args, const std::optional<Tensor>& bias)
      : values((bias.has_value() ? bias->numel() : args.keys()) + kWidestVector / sizeof(T)) {
    args.bias = values.data();
    args.bias_is_finite = true;
    if (!bias.has_value()) return;
    const T* from = bias->const_data_ptr<T>();
    for_each_bias(args, [&](int64_t to, int64_t i) {
      values[to] = in_units_of_ln2(from[i]);
      args.bias_is_finite = args.bias_is_finite && std::isfinite(values[to]);
    });
  }
};

// Adds up the chunks of the gradient of a bias.
template <typename T>
void collect_bias_gradient(const AttentionArgs& args, const Tensor& out) {
  const int64_t size = args.heads * args.bias_size();
  T* to = out.mutable_data_ptr<T>();
  for_each_bias(args, [&](int64_t from, int64_t i) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < args.chunks; ++chunk) sum += args.grad_bias[chunk * size + from];
    to[i] = static_cast<T>(sum);
  });
}

// The arguments that both directions have, and the tensors that they point into.
class Attention {
 public:
  Attention(const char* op, const AttentionInputs& inputs, const AttentionOptions& options)
      : storage(storage_of(op, inputs.q)), arithmetic(arithmetic_of(inputs.q)) {
    const Tensor& q = inputs.q;
    STD_TORCH_CHECK(q.dim() == 4 && inputs.k.dim() == 4, op, ": q and k must have 4 dimensions");
    args.batch = q.size(0);
    args.heads = options.heads;
    args.rows = options.rows;
    args.columns = options.columns;
    args.rows.pixels = q.size(1);
    args.columns.pixels = q.size(2);
    args.rows.key_pixels = inputs.k.size(1);
    args.columns.key_pixels = inputs.k.size(2);
    args.dilated = options.dilated;
    args.overlapping = options.overlapping;
    args.mask = options.mask * 1.4426950408889634074;
    check(op, inputs, options);
    args.head_dim = q.size(3) / args.heads;
    q_ = with_contiguous_channels(q);
    k_ = with_contiguous_channels(inputs.k);
    v_ = with_contiguous_channels(inputs.v);
    args.q = image_of(q_);
    args.k = image_of(k_);
    args.v = image_of(v_);
    set_bias(inputs);
    set_factors(inputs);
  }

  // Allocates the gradients of the factors. The products of queries and keys have those of both.
  void start_factor_gradients() {
    if (q_cosine.has_value()) {
      start_gradient(args.q_factors, grad_q_factors, args.rows.pixels, args.columns.pixels);
      start_gradient(args.k_factors, grad_k_factors, args.rows.key_pixels, args.columns.key_pixels);
    } else if (severity_.has_value()) {
      start_gradient(args.q_factors, grad_q_factors, args.rows.pixels, args.columns.pixels);
      args.k_factors.gradient = args.q_factors.gradient;
      args.k_factors.gradient_head_stride = args.q_factors.gradient_head_stride;
    }
  }

  AttentionArgs args{};
  Storage storage;
  ScalarType arithmetic;
  std::optional<Cosine> q_cosine, k_cosine;
  std::optional<Tensor> grad_q_factors, grad_k_factors;  // double (heads, B, H, W)

 private:
  void start_gradient(RowFactors& factors, std::optional<Tensor>& gradient, int64_t height, int64_t width) {
    gradient = new_zeros({args.heads, args.batch, height, width}, ScalarType::Double);
    factors.gradient = gradient->mutable_data_ptr<double>();
    factors.gradient_head_stride = args.batch * height * width;
  }

  void set_bias(const AttentionInputs& inputs) {
    const std::optional<Tensor>& given = inputs.bias_table.has_value() ? inputs.bias_table : inputs.bias;
    args.bias_is_table = inputs.bias_table.has_value();
    args.bias_head_stride = given.has_value() ? args.bias_size() : 0;
    args.bias_query_stride = given.has_value() ? args.keys() : 0;
    if (given.has_value()) bias_ = contiguous_as(*given, arithmetic);
    if (arithmetic == ScalarType::Double) {
      double_bias_.emplace(args, bias_);
    } else {
      float_bias_.emplace(args, bias_);
    }
  }

  void set_factors(const AttentionInputs& inputs) {
    if (inputs.severity.has_value()) severity_ = contiguous_as(*inputs.severity, arithmetic);
    const int64_t pixels = args.rows.pixels * args.columns.pixels;
    args.scale = 1;
    if (inputs.scale.has_value()) {
      const auto wide = [&](const Tensor& x) { return with_contiguous_channels(torch::stable::to(x, arithmetic)); };
      q_cosine = cosine_of(wide(q_), args.heads, contiguous_as(*inputs.scale, arithmetic), severity_);
      k_cosine = cosine_of(wide(k_), args.heads, std::nullopt, severity_);
      args.q_factors = {q_cosine->factors.const_data_ptr(), args.batch * pixels, pixels, args.columns.pixels};
      const int64_t keys = args.rows.key_pixels * args.columns.key_pixels;
      args.k_factors = {k_cosine->factors.const_data_ptr(), args.batch * keys, keys, args.columns.key_pixels};
      return;
    }
    args.scale = 1 / std::sqrt(static_cast<double>(args.head_dim));
    if (severity_.has_value()) {
      args.q_factors = {severity_->const_data_ptr(), 0, pixels, args.columns.pixels};
      args.k_factors = args.q_factors;
    }
  }

  // The public functions in savl/ops have checked the arguments, with better messages. These checks keep a direct call
  // of the op from reading or writing outside its tensors.
  void check(const char* op, const AttentionInputs& inputs, const AttentionOptions& options) {
    const auto& [q, k, v, bias_table, bias, severity, scale] = inputs;
    STD_TORCH_CHECK(q.is_cpu() && k.is_cpu() && v.is_cpu(), op, ": all tensors must be on the CPU");
    STD_TORCH_CHECK(args.heads > 0 && q.size(3) > 0 && q.size(3) % args.heads == 0, op, ": ", q.size(3),
                    " channels do not divide among ", args.heads, " heads");
    for (const Tensor* other : {&k, &v}) {
      STD_TORCH_CHECK(other->scalar_type() == q.scalar_type() && other->dim() == 4, op,
                      ": q, k and v must have one dtype and 4 dimensions");
      for (int64_t dim = 0; dim < 4; ++dim) {
        STD_TORCH_CHECK(other->size(dim) == (dim % 3 == 0 ? q : k).size(dim), op, ": q, k and v do not fit together");
      }
    }
    const bool shifted = options.rows.shift != 0 || options.columns.shift != 0;
    const bool same_keys = args.rows.window == args.rows.key_window && args.columns.window == args.columns.key_window;
    for (const AxisSizes* axis : {&args.rows, &args.columns}) {
      const int64_t window = axis->window, key_window = axis->key_window;
      STD_TORCH_CHECK(window >= 1 && key_window >= 1, op, ": bad windows ", window, " and ", key_window);
      STD_TORCH_CHECK(axis->pixels > 0 && axis->pixels % window == 0, op,
                      ": height and width must be positive multiples of the window");
      STD_TORCH_CHECK(axis->shift >= 0 && axis->shift < window && axis->shift * key_window == axis->key_shift * window,
                      op, ": bad shift ", axis->shift);
      if (options.overlapping) {
        STD_TORCH_CHECK(key_window >= window && (key_window - window) % 2 == 0 && axis->key_pixels == axis->pixels, op,
                        ": bad windows ", window, " and ", key_window);
      } else {
        STD_TORCH_CHECK(axis->key_pixels % key_window == 0 && axis->key_pixels / key_window == axis->windows(), op,
                        ": k must have a key window for each window");
      }
    }
    STD_TORCH_CHECK(!shifted || !(options.overlapping || options.dilated), op, ": these windows are not shifted");
    STD_TORCH_CHECK(!bias_table.has_value() || !bias.has_value(), op, ": bias_table and bias exclude each other");
    if (bias_table.has_value()) {
      STD_TORCH_CHECK(options.overlapping || same_keys, op, ": bias_table needs key windows like the windows");
      STD_TORCH_CHECK(bias_table->is_cpu() && bias_table->dim() == 2 && bias_table->size(1) == args.heads &&
                          bias_table->size(0) == args.rows.span() * args.columns.span(),
                      op, ": bias_table does not fit the windows and heads");
    }
    if (bias.has_value()) {
      STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 3 && bias->size(0) == args.heads &&
                          bias->size(1) == args.queries() && bias->size(2) == args.keys(),
                      op, ": bias must be (heads, queries, keys) on the CPU");
    }
    if (scale.has_value()) {
      STD_TORCH_CHECK(scale->is_cpu() && scale->dim() == 1 && scale->size(0) == args.heads, op,
                      ": scale must be (heads,) on the CPU");
    }
    if (severity.has_value()) {
      STD_TORCH_CHECK(options.overlapping || same_keys, op, ": severity needs keys of the same pixels");
      STD_TORCH_CHECK(severity->is_cpu() && severity->dim() == 3 && severity->size(0) == args.batch &&
                          severity->size(1) == args.rows.pixels && severity->size(2) == args.columns.pixels,
                      op, ": severity must be (B, H, W) on the CPU");
    }
  }

  Tensor q_, k_, v_;
  std::optional<Tensor> bias_, severity_;
  std::optional<KernelBias<float>> float_bias_;
  std::optional<KernelBias<double>> double_bias_;
};

// Sums the gradients of the severity over the heads.
Tensor sum_of_heads(const Tensor& of_heads, const Tensor& severity) {
  const std::vector<int64_t> head_dimension{0};
  return torch::stable::to(torch::stable::sum(of_heads, head_dimension), severity.scalar_type());
}

}  // namespace

Tensor channel_part(const Tensor& tensor, int64_t index, int64_t channels) {
  Tensor source = tensor;
  return torch::stable::narrow(source, 3, index * channels, channels);
}

Tensor attention_forward(const char* op, const AttentionInputs& inputs, const AttentionOptions& options) {
  Attention attention(op, inputs, options);
  AttentionArgs& args = attention.args;
  const Tensor& q = inputs.q;
  Tensor out = new_tensor({q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type());
  args.out = image_of(out);
  run(kernels().attention.forward, attention.storage, args, args.forward_tasks());
  return out;
}

AttentionGradients attention_backward(const char* op, const Tensor& grad_out, const AttentionInputs& inputs,
                                      const AttentionOptions& options, const Tensor& grad_q, const Tensor& grad_k,
                                      const Tensor& grad_v) {
  Attention attention(op, inputs, options);
  AttentionArgs& args = attention.args;
  const Tensor& q = inputs.q;
  STD_TORCH_CHECK(grad_out.is_cpu() && grad_out.dim() == 4 && grad_out.scalar_type() == q.scalar_type(), op,
                  ": grad_out must be like q");
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(grad_out.size(dim) == q.size(dim), op, ": grad_out must have the shape of the output");
  }
  const Tensor grad_rows = with_contiguous_channels(grad_out);
  args.grad_out = image_of(grad_rows);
  args.grad_q = image_of(grad_q);
  args.grad_k = image_of(grad_k);
  args.grad_v = image_of(grad_v);
  args.colour_rows = (args.rows.key_window + args.rows.window - 1) / args.rows.window;
  args.colour_columns = (args.columns.key_window + args.columns.window - 1) / args.columns.window;
  if (!args.overlapping) args.colour_rows = args.colour_columns = 1;

  const int64_t windows = args.batch * args.windows();
  const int64_t bias_bytes = args.heads * args.bias_size() * static_cast<int64_t>(sizeof(double));
  args.chunks = std::clamp<int64_t>(std::min(windows, kMostChunkBytes / bias_bytes), 1, kMostChunks);
  std::optional<Tensor> chunks;
  if (inputs.bias_table.has_value() || inputs.bias.has_value()) {
    chunks = new_zeros({args.chunks, args.heads, args.bias_size()}, ScalarType::Double);
    args.grad_bias = chunks->mutable_data_ptr<double>();
  }
  attention.start_factor_gradients();
  if (windows > 0) {
    for (args.colour = 0; args.colour < args.colour_rows * args.colour_columns; ++args.colour) {
      run(kernels().attention.backward, attention.storage, args, args.backward_tasks());
    }
  }

  const auto nothing = [&] { return new_tensor({0}, q.scalar_type()); };
  AttentionGradients gradients{nothing(), nothing(), nothing(), nothing()};
  if (chunks.has_value()) {
    const Tensor& bias = inputs.bias_table.has_value() ? *inputs.bias_table : *inputs.bias;
    Tensor sum = args.bias_is_table ? new_tensor({bias.size(0), bias.size(1)}, attention.arithmetic)
                                    : new_tensor({bias.size(0), bias.size(1), bias.size(2)}, attention.arithmetic);
    if (attention.arithmetic == ScalarType::Double) {
      collect_bias_gradient<double>(args, sum);
    } else {
      collect_bias_gradient<float>(args, sum);
    }
    (args.bias_is_table ? gradients.bias_table : gradients.bias) = torch::stable::to(sum, bias.scalar_type());
  }
  if (attention.q_cosine.has_value()) {
    const Tensor grad_scale = new_zeros({args.heads}, ScalarType::Double);
    std::optional<Tensor> severities;
    double* grad_severity = nullptr;
    if (inputs.severity.has_value()) {
      severities = new_zeros({args.heads, q.size(0), q.size(1), q.size(2)}, ScalarType::Double);
      grad_severity = severities->mutable_data_ptr<double>();
    }
    add_cosine_gradient(*attention.q_cosine, *attention.grad_q_factors, grad_q, grad_scale.mutable_data_ptr<double>(),
                        grad_severity);
    add_cosine_gradient(*attention.k_cosine, *attention.grad_k_factors, grad_k, nullptr, grad_severity);
    gradients.scale = torch::stable::to(grad_scale, inputs.scale->scalar_type());
    if (severities.has_value()) gradients.severity = sum_of_heads(*severities, *inputs.severity);
  } else if (inputs.severity.has_value()) {
    gradients.severity = sum_of_heads(*attention.grad_q_factors, *inputs.severity);
  }
  return gradients;
}

}  // namespace savl::cpu
