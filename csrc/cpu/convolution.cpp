// savl::convolution on the CPU; the op is defined in savl/ops/convolution.py.
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "cpu/tensors.h"

namespace savl::cpu {
namespace {

const char* const kOp = "savl::convolution";

// A tensor with one value for each pixel and output channel, whose pixels have contiguous channels.
class PerPixel {
 public:
  PerPixel(const std::optional<Tensor>& tensor, const Tensor& x, int64_t outputs, ScalarType dtype, bool float_too) {
    if (!tensor.has_value()) return;
    const bool fits = tensor->scalar_type() == dtype || (float_too && tensor->scalar_type() == ScalarType::Float);
    STD_TORCH_CHECK(fits && tensor->is_cpu() && tensor->dim() == 4 && tensor->size(0) == x.size(0) &&
                        tensor->size(1) == x.size(1) && tensor->size(2) == x.size(2) && tensor->size(3) == outputs,
                    kOp, ": residual, gamma and beta must be (B, H, W, outputs) on the CPU with the dtype of x");
    rows_ = as_rows(*tensor);
  }
  void give(const void*& data, int64_t& stride) const {
    if (!rows_.has_value()) return;
    data = rows_->const_data_ptr();
    stride = row_stride(*rows_);
  }

 private:
  std::optional<Tensor> rows_;
};

// Checks that a parameter has the dtype of x or float32, or bfloat16 under autocast.
void check_dtype(const Tensor& parameter, ScalarType arithmetic) {
  const ScalarType dtype = parameter.scalar_type();
  STD_TORCH_CHECK(parameter.is_cpu() && (dtype == arithmetic || dtype == ScalarType::Float ||
                                         (dtype == ScalarType::BFloat16 && arithmetic == ScalarType::Float)),
                  kOp, ": a parameter has the wrong device or dtype");
}

// A parameter in the dtype of the arithmetic.
std::optional<Tensor> parameter(const std::optional<Tensor>& tensor, int64_t length, ScalarType arithmetic) {
  if (!tensor.has_value()) return std::nullopt;
  check_dtype(*tensor, arithmetic);
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == length, kOp, ": a parameter has the wrong shape");
  return contiguous_as(*tensor, arithmetic);
}

const void* data_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

std::tuple<Tensor, Tensor> convolution(const Tensor& x_in, const Tensor& weight_in,
                                       const std::optional<Tensor>& bias_in,
                                       const std::optional<Tensor>& norm_weight_in,
                                       const std::optional<Tensor>& norm_bias_in,
                                       const std::optional<Tensor>& residual_in, const std::optional<Tensor>& gamma_in,
                                       const std::optional<Tensor>& beta_in, const std::optional<Tensor>& gate_in,
                                       int64_t dilation, int64_t activation, double slope, double eps, bool keep,
                                       bool narrow) {
  STD_TORCH_CHECK(!narrow || x_in.scalar_type() == ScalarType::Float, kOp, ": narrow is for a float32 x");
  const Storage storage = narrow ? Storage::kBFloat16 : storage_of(kOp, x_in);
  const ScalarType dtype = narrow ? ScalarType::BFloat16 : x_in.scalar_type();
  const ScalarType arithmetic = arithmetic_of(x_in);
  STD_TORCH_CHECK(x_in.is_cpu() && x_in.dim() == 4 && (weight_in.dim() == 4 || weight_in.dim() == 2), kOp,
                  ": x must be (B, H, W, C) and weight (outputs, C) or (outputs, C, side, side) on the CPU");
  check_dtype(weight_in, arithmetic);
  ConvolutionArgs args{};
  args.channels = x_in.size(3);
  args.outputs = weight_in.size(0);
  args.side = weight_in.dim() == 2 ? 1 : weight_in.size(2);
  STD_TORCH_CHECK(args.channels > 0 && args.outputs > 0 && weight_in.size(1) == args.channels &&
                      (weight_in.dim() == 2 || weight_in.size(3) == args.side) && (args.side == 1 || args.side == 3) &&
                      dilation > 0,
                  kOp, ": weight must be (outputs, C, side, side) with side 1 or 3");
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, kOp, ": no such activation");
  STD_TORCH_CHECK(eps >= 0 && std::isfinite(eps), kOp, ": eps must be finite and at least 0");
  STD_TORCH_CHECK((residual_in.has_value() || !(gamma_in.has_value() || gate_in.has_value())) &&
                      (gamma_in.has_value() || !beta_in.has_value()) && !(gamma_in.has_value() && gate_in.has_value()),
                  kOp, ": gamma and gate require residual and exclude each other; beta requires gamma");

  const Tensor x = as_rows(x_in), weight = contiguous_as(weight_in, arithmetic);
  const auto bias = parameter(bias_in, args.outputs, arithmetic);
  const auto norm_weight = parameter(norm_weight_in, args.channels, arithmetic);
  const auto norm_bias = parameter(norm_bias_in, args.channels, arithmetic);
  STD_TORCH_CHECK(norm_weight.has_value() == norm_bias.has_value(), kOp, ": norm_weight and norm_bias come together");
  std::optional<Tensor> gate;
  args.gate_rows = args.gate_columns = 1;
  if (gate_in.has_value()) {
    check_dtype(*gate_in, arithmetic);
    STD_TORCH_CHECK(gate_in->dim() == 4 && gate_in->size(0) == x.size(0) && gate_in->size(3) == args.outputs &&
                        gate_in->size(1) > 0 && gate_in->size(2) > 0 && x.size(1) % gate_in->size(1) == 0 &&
                        x.size(2) % gate_in->size(2) == 0,
                    kOp, ": gate must be (B, rows, columns, outputs); rows and columns divide those of x");
    gate = contiguous_as(*gate_in, arithmetic);
    args.gate_rows = gate->size(1);
    args.gate_columns = gate->size(2);
  }
  const bool bfloat16 = dtype == ScalarType::BFloat16;
  const PerPixel residual(residual_in, x, args.outputs, dtype, bfloat16);
  const PerPixel gamma(gamma_in, x, args.outputs, dtype, false), beta(beta_in, x, args.outputs, dtype, false);
  args.x_is_float = narrow;
  args.output_is_float = bfloat16 && residual_in.has_value() && residual_in->scalar_type() == ScalarType::Float;
  residual.give(args.residual, args.residual_stride);
  gamma.give(args.gamma, args.gamma_stride);
  beta.give(args.beta, args.beta_stride);

  args.x = x.const_data_ptr();
  args.x_stride = row_stride(x);
  args.batch = x.size(0);
  args.height = x.size(1);
  args.width = x.size(2);
  if (args.side == 1 && !gate.has_value()) {  // one row of all pixels, which tiles of any size divide well
    args.width *= args.batch * args.height;
    args.batch = args.height = 1;
  }
  args.dilation = dilation;
  args.norm_weight = data_of(norm_weight);
  args.norm_bias = data_of(norm_bias);
  args.eps = eps;
  args.weight = weight.const_data_ptr();
  args.bias = data_of(bias);
  args.activation = static_cast<Activation>(activation);
  args.slope = slope;
  args.gate = data_of(gate);

  Tensor out =
      new_tensor({x.size(0), x.size(1), x.size(2), args.outputs}, args.output_is_float ? ScalarType::Float : dtype);
  Tensor kept = keep ? new_tensor({x.size(0), x.size(1), x.size(2), args.outputs}, dtype) : new_tensor({0}, dtype);
  if (args.batch * args.height * args.width == 0) return {out, kept};
  args.out = out.mutable_data_ptr();
  args.kept = keep ? kept.mutable_data_ptr() : nullptr;
  const Tensor panels = new_tensor({args.packed_operands()}, arithmetic);
  args.panels = const_cast<void*>(panels.const_data_ptr());

  const auto& table = kernels().convolution;
  args.packing = true;
  run(table, storage, args, args.groups(), rows_per_thread(args.side * args.side * args.channels * args.kGroup));
  args.packing = false;
  run(table, storage, args, args.tiles());
  return {out, kept};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(savl, CPU, library) { library.impl("convolution", TORCH_BOX(&convolution)); }

}  // namespace savl::cpu
