#include "cpu/attention_op.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace savl::cpu {
namespace {

// Chunks of windows, each with its own gradient of the bias: enough to keep threads busy, few enough to add up.
constexpr int64_t kMostChunks = 16;

Image image_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// A finite value stays finite: a table may use the lowest number of its dtype as a mask.
template <typename T>
T in_units_of_ln2(T value) {
  const double scaled = value * 1.4426950408889634074;
  const double largest = std::numeric_limits<T>::max();
  return static_cast<T>(std::isfinite(value) ? std::clamp(scaled, -largest, largest) : scaled);
}

// The bias table as (heads, span, span) in units of ln 2, like the logits of the kernel. Each row is reversed, so that
// the keys of a row of pixels are contiguous. The kernel may read one vector past the end.
template <typename T>
struct ReversedTable {
  std::vector<T> values;
  bool finite = true;

  ReversedTable(const Tensor& table, int64_t span) : values(table.numel() + kWidestVector / sizeof(T)) {
    const int64_t heads = table.size(1);
    const T* from = table.const_data_ptr<T>();
    for (int64_t row = 0; row < span; ++row) {
      for (int64_t column = 0; column < span; ++column) {
        for (int64_t head = 0; head < heads; ++head) {
          const T value = in_units_of_ln2(*from++);
          values[(head * span + row) * span + span - 1 - column] = value;
          finite = finite && std::isfinite(value);
        }
      }
    }
  }
};

// Adds up the chunks of the gradient, and reverses its rows again.
template <typename T>
void collect_bias_gradient(const Tensor& chunks, const Tensor& out) {
  const int64_t count = chunks.size(0), heads = chunks.size(1), span = chunks.size(2);
  const double* from = chunks.const_data_ptr<double>();
  T* to = out.mutable_data_ptr<T>();
  for (int64_t row = 0; row < span; ++row) {
    for (int64_t column = 0; column < span; ++column) {
      for (int64_t head = 0; head < heads; ++head) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < count; ++chunk) {
          sum += from[((chunk * heads + head) * span + row) * span + span - 1 - column];
        }
        *to++ = static_cast<T>(sum);
      }
    }
  }
}

// The arguments that both directions have, and the tensors that they point into.
class Attention {
 public:
  Attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias_table,
            const std::optional<Tensor>& severity, AttentionGeometry geometry)
      : storage(storage_of(op, q)),
        arithmetic(arithmetic_of(q)),
        q_(with_contiguous_channels(q)),
        k_(with_contiguous_channels(k)),
        v_(with_contiguous_channels(v)),
        bias_(contiguous_as(bias_table, arithmetic)) {
    args.batch = q.size(0);
    args.height = q.size(1);
    args.width = q.size(2);
    args.heads = bias_table.size(1);
    args.window = geometry.window;
    args.key_window = geometry.key_window;
    args.shift = geometry.shift;
    check(op, q, k, v, severity);
    args.head_dim = q.size(3) / args.heads;
    args.q = image_of(q_);
    args.k = image_of(k_);
    args.v = image_of(v_);
    if (arithmetic == ScalarType::Double) {
      set_bias(double_table_.emplace(bias_, args.span()));
    } else {
      set_bias(float_table_.emplace(bias_, args.span()));
    }
    if (severity.has_value()) {
      severity_ = contiguous_as(*severity, arithmetic);
      args.severity = severity_->const_data_ptr();
    }
  }

  AttentionArgs args{};
  Storage storage;
  ScalarType arithmetic;

 private:
  template <typename T>
  void set_bias(const ReversedTable<T>& table) {
    args.bias = table.values.data();
    args.bias_is_finite = table.finite;
  }

  // The public functions in savl/ops have checked the arguments, with better messages. These checks keep a direct call
  // of the op from reading or writing outside its tensors.
  void check(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& severity) {
    STD_TORCH_CHECK(q.is_cpu() && k.is_cpu() && v.is_cpu() && bias_.is_cpu(), op, ": all tensors must be on the CPU");
    STD_TORCH_CHECK(q.dim() == 4 && bias_.dim() == 2, op, ": q must be (B, H, W, C) and bias_table (rows, heads)");
    for (const Tensor* other : {&k, &v}) {
      STD_TORCH_CHECK(other->scalar_type() == q.scalar_type() && other->dim() == 4, op,
                      ": q, k and v must have one dtype and 4 dimensions");
      for (int64_t dim = 0; dim < 4; ++dim) {
        STD_TORCH_CHECK(other->size(dim) == q.size(dim), op, ": q, k and v must have the same shape");
      }
    }
    const int64_t window = args.window, key_window = args.key_window;
    STD_TORCH_CHECK(window >= 1 && key_window >= window && (key_window - window) % 2 == 0, op, ": bad windows ", window,
                    " and ", key_window);
    STD_TORCH_CHECK(args.shift >= 0 && args.shift < window && (args.shift == 0 || key_window == window), op,
                    ": bad shift ", args.shift);
    STD_TORCH_CHECK(args.height > 0 && args.width > 0 && args.height % window == 0 && args.width % window == 0, op,
                    ": height and width must be positive multiples of the window");
    STD_TORCH_CHECK(bias_.size(0) == args.span() * args.span(), op, ": bias_table has ", bias_.size(0), " rows");
    STD_TORCH_CHECK(args.heads > 0 && q.size(3) > 0 && q.size(3) % args.heads == 0, op, ": ", q.size(3),
                    " channels do not divide among ", args.heads, " heads");
    if (severity.has_value()) {
      STD_TORCH_CHECK(severity->is_cpu() && severity->dim() == 3 && severity->size(0) == args.batch &&
                          severity->size(1) == args.height && severity->size(2) == args.width,
                      op, ": severity must be (B, H, W) on the CPU");
    }
  }

  Tensor q_, k_, v_, bias_;
  std::optional<Tensor> severity_;
  std::optional<ReversedTable<float>> float_table_;
  std::optional<ReversedTable<double>> double_table_;
};

}  // namespace

Tensor with_contiguous_channels(const Tensor& tensor) {
  return tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

Tensor channel_part(const Tensor& tensor, int64_t index, int64_t channels) {
  Tensor source = tensor;
  return torch::stable::narrow(source, 3, index * channels, channels);
}

Tensor attention_forward(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias_table,
                         const std::optional<Tensor>& severity, AttentionGeometry geometry) {
  Attention attention(op, q, k, v, bias_table, severity, geometry);
  AttentionArgs& args = attention.args;
  Tensor out = new_tensor({args.batch, args.height, args.width, q.size(3)}, q.scalar_type());
  args.out = image_of(out);
  run(kernels().attention.forward, attention.storage, args, args.forward_tasks());
  return out;
}

std::tuple<Tensor, Tensor> attention_backward(const char* op, const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                              const Tensor& v, const Tensor& bias_table,
                                              const std::optional<Tensor>& severity, AttentionGeometry geometry,
                                              const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v) {
  Attention attention(op, q, k, v, bias_table, severity, geometry);
  AttentionArgs& args = attention.args;
  const ScalarType arithmetic = attention.arithmetic;
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
  args.colour_rows = (args.key_window + args.window - 1) / args.window;
  args.colour_columns = args.colour_rows;
  const int64_t windows = args.batch * args.window_rows() * args.window_columns();
  args.chunks = windows < kMostChunks ? (windows > 0 ? windows : 1) : kMostChunks;

  Tensor chunks = new_zeros({args.chunks, args.heads, args.span(), args.span()}, ScalarType::Double);
  args.grad_bias = chunks.mutable_data_ptr<double>();
  std::optional<Tensor> severities;
  if (severity.has_value()) {
    severities = new_zeros({args.heads, args.batch, args.height, args.width}, ScalarType::Double);
    args.grad_severity = severities->mutable_data_ptr<double>();
  }
  if (windows > 0) {
    for (args.colour = 0; args.colour < args.colour_rows * args.colour_columns; ++args.colour) {
      run(kernels().attention.backward, attention.storage, args, args.backward_tasks());
    }
  }

  Tensor grad_bias = new_tensor({bias_table.size(0), args.heads}, arithmetic);
  if (arithmetic == ScalarType::Double) {
    collect_bias_gradient<double>(chunks, grad_bias);
  } else {
    collect_bias_gradient<float>(chunks, grad_bias);
  }
  Tensor grad_severity;
  if (severity.has_value()) {
    const std::vector<int64_t> head_dimension{0};
    grad_severity = torch::stable::to(torch::stable::sum(*severities, head_dimension), severity->scalar_type());
  } else {
    grad_severity = new_tensor({0}, q.scalar_type());
  }
  return {torch::stable::to(grad_bias, bias_table.scalar_type()), grad_severity};
}

}  // namespace savl::cpu
