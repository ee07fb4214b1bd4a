// savl::layer_norm on the CPU; the op is defined in savl/ops/layer_norm.py.
#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/tensors.h"

namespace savl::cpu {
namespace {

const char* const kOp = "savl::layer_norm";
// Chunks of rows, each with its own sums for weight and bias: enough to keep threads busy, few enough to add up.
constexpr int64_t kMostChunks = 64;

// The arguments that both directions have, and the tensors that they point into.
struct LayerNorm {
  LayerNormArgs args{};
  Storage storage;
  ScalarType arithmetic;
  Tensor x, weight, bias;

  LayerNorm(const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in)
      : storage(storage_of(kOp, x_in)), arithmetic(arithmetic_of(x_in)), x(x_in), weight(weight_in), bias(bias_in) {
    STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.size(3) > 0, kOp, ": x must be (B, H, W, C) on the CPU");
    for (const Tensor* each : {&weight, &bias}) {
      STD_TORCH_CHECK(each->is_cpu() && each->dim() == 1 && each->size(0) == x.size(3), kOp,
                      ": weight and bias must be (C) on the CPU");
      STD_TORCH_CHECK(each->scalar_type() == x.scalar_type() || each->scalar_type() == ScalarType::Float, kOp,
                      ": dtypes do not fit together");
    }
    x = as_rows(x);
    weight = contiguous_as(weight, arithmetic);
    bias = contiguous_as(bias, arithmetic);
    args.x = x.const_data_ptr();
    args.x_stride = row_stride(x);
    args.weight = weight.const_data_ptr();
    args.bias = bias.const_data_ptr();
    args.rows = x.size(0) * x.size(1) * x.size(2);
    args.channels = x.size(3);
  }

  Tensor like_x(ScalarType dtype) const { return new_tensor({x.size(0), x.size(1), x.size(2), x.size(3)}, dtype); }
  Tensor per_row() const { return new_tensor({x.size(0), x.size(1), x.size(2)}, arithmetic); }
};

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                                              bool wide) {
  LayerNorm norm(x, weight, bias);
  STD_TORCH_CHECK(!wide || x.scalar_type() != ScalarType::Double, kOp, ": float64 is wider than float32");
  Tensor out = norm.like_x(wide ? ScalarType::Float : x.scalar_type());
  Tensor mean = norm.per_row(), inverse = norm.per_row();
  LayerNormArgs& args = norm.args;
  args.out = out.mutable_data_ptr();
  args.mean = mean.mutable_data_ptr();
  args.inverse = inverse.mutable_data_ptr();
  args.eps = eps;
  args.output_is_float = wide;
  run(kernels().layer_norm.forward, norm.storage, args, args.rows, rows_per_thread(args.channels));
  return {out, mean, inverse};
}

template <typename T>
Tensor summed(const std::vector<double>& sums, int64_t chunks, int64_t channels, int64_t which, ScalarType dtype) {
  Tensor result = new_tensor({channels}, dtype);
  T* to = result.mutable_data_ptr<T>();
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[(2 * chunk + which) * channels + c];
    to[c] = static_cast<T>(sum);
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                                       const Tensor& bias, const Tensor& mean, const Tensor& inverse) {
  LayerNorm norm(x, weight, bias);
  LayerNormArgs& args = norm.args;
  STD_TORCH_CHECK(grad_out.is_cpu() && grad_out.dim() == 4 &&
                      (grad_out.scalar_type() == x.scalar_type() ||
                       (grad_out.scalar_type() == ScalarType::Float && x.scalar_type() == ScalarType::BFloat16)),
                  kOp, ": the gradient does not fit to x");
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(grad_out.size(dim) == x.size(dim), kOp, ": the gradient must have the shape of x");
  }
  for (const Tensor* each : {&mean, &inverse}) {
    STD_TORCH_CHECK(each->is_cpu() && each->numel() == args.rows && each->scalar_type() == norm.arithmetic, kOp,
                    ": mean and inverse must be those of the forward pass");
  }
  const Tensor grad = as_rows(grad_out);
  const Tensor kept_mean = contiguous_as(mean, norm.arithmetic), kept_inverse = contiguous_as(inverse, norm.arithmetic);
  Tensor grad_x = norm.like_x(x.scalar_type());
  args.grad_out = grad.const_data_ptr();
  args.grad_out_stride = row_stride(grad);
  args.mean = const_cast<void*>(kept_mean.const_data_ptr());
  args.inverse = const_cast<void*>(kept_inverse.const_data_ptr());
  args.grad_x = grad_x.mutable_data_ptr();
  args.output_is_float = grad_out.scalar_type() == ScalarType::Float;
  const int64_t fewest = kElementsPerThread / args.channels + 1;  // rows of a chunk
  args.chunk_rows = args.rows / kMostChunks + 1 > fewest ? args.rows / kMostChunks + 1 : fewest;
  const int64_t chunks = (args.rows + args.chunk_rows - 1) / args.chunk_rows;
  std::vector<double> sums(chunks * 2 * args.channels);
  args.sums = sums.data();
  run(kernels().layer_norm.backward, norm.storage, args, chunks);
  // The sums have the arithmetic dtype; bfloat16 parameters have another one.
  const bool exact = norm.arithmetic == ScalarType::Double;
  Tensor gradients[2];
  for (int64_t which = 0; which < 2; ++which) {
    const Tensor sum = exact ? summed<double>(sums, chunks, args.channels, which, ScalarType::Double)
                             : summed<float>(sums, chunks, args.channels, which, ScalarType::Float);
    gradients[which] = contiguous_as(sum, (which == 0 ? weight : bias).scalar_type());
  }
  return {grad_x, gradients[0], gradients[1]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(savl, CPU, library) {
  library.impl("layer_norm", TORCH_BOX(&layer_norm));
  library.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace savl::cpu
