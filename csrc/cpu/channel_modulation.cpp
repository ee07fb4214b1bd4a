// savl::channel_modulation on the CPU; the op is defined in savl/ops/channel_modulation.py.
#include "cpu/tensors.h"

namespace savl::cpu {
namespace {

const char* const kOp = "savl::channel_modulation";
constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread

void check_like(const Tensor& tensor, const Tensor& attended, bool float_too) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 4, kOp, ": tensors must be (B, H, W, C) on the CPU");
  STD_TORCH_CHECK(
      tensor.scalar_type() == attended.scalar_type() ||
          (float_too && tensor.scalar_type() == ScalarType::Float && attended.scalar_type() == ScalarType::BFloat16),
      kOp, ": dtypes do not fit together");
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(tensor.size(dim) == attended.size(dim), kOp, ": tensors must have one shape");
  }
}

int64_t grain(const ModulationArgs& args) {
  return args.channels >= kGrain ? 1 : kGrain / (args.channels > 0 ? args.channels : 1);
}

Tensor channel_modulation(const Tensor& attended, const Tensor& gamma, const std::optional<Tensor>& beta,
                          const Tensor& residual) {
  const Storage storage = storage_of(kOp, attended);
  check_like(attended, attended, false);
  check_like(gamma, attended, false);
  check_like(residual, attended, true);
  const Tensor a = as_rows(attended), g = as_rows(gamma), r = as_rows(residual);
  Tensor out = new_tensor({a.size(0), a.size(1), a.size(2), a.size(3)}, residual.scalar_type());
  ModulationArgs args{};
  std::optional<Tensor> b;
  if (beta.has_value()) {
    check_like(*beta, attended, false);
    b = as_rows(*beta);
    args.beta = b->const_data_ptr();
    args.beta_stride = row_stride(*b);
  }
  args.attended = a.const_data_ptr();
  args.gamma = g.const_data_ptr();
  args.residual = r.const_data_ptr();
  args.attended_stride = row_stride(a);
  args.gamma_stride = row_stride(g);
  args.residual_stride = row_stride(r);
  args.out = out.mutable_data_ptr();
  args.rows = a.size(0) * a.size(1) * a.size(2);
  args.channels = a.size(3);
  args.residual_is_float = residual.scalar_type() == ScalarType::Float;
  run(kernels().modulation[static_cast<int>(storage)], args, args.rows, grain(args));
  return out;
}

// Gradients of attended and gamma; those of beta and residual are grad_out itself.
std::tuple<Tensor, Tensor> channel_modulation_backward(const Tensor& grad_out, const Tensor& attended,
                                                       const Tensor& gamma) {
  const Storage storage = storage_of(kOp, attended);
  check_like(attended, attended, false);
  check_like(gamma, attended, false);
  check_like(grad_out, attended, true);
  const Tensor a = as_rows(attended), g = as_rows(gamma), grad = as_rows(grad_out);
  Tensor grad_attended = new_tensor({a.size(0), a.size(1), a.size(2), a.size(3)}, attended.scalar_type());
  Tensor grad_gamma = new_tensor({a.size(0), a.size(1), a.size(2), a.size(3)}, attended.scalar_type());
  ModulationArgs args{};
  args.attended = a.const_data_ptr();
  args.gamma = g.const_data_ptr();
  args.grad_out = grad.const_data_ptr();
  args.attended_stride = row_stride(a);
  args.gamma_stride = row_stride(g);
  args.grad_out_stride = row_stride(grad);
  args.grad_attended = grad_attended.mutable_data_ptr();
  args.grad_gamma = grad_gamma.mutable_data_ptr();
  args.rows = a.size(0) * a.size(1) * a.size(2);
  args.channels = a.size(3);
  args.residual_is_float = grad_out.scalar_type() == ScalarType::Float;
  run(kernels().modulation_backward[static_cast<int>(storage)], args, args.rows, grain(args));
  return {grad_attended, grad_gamma};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(savl, CPU, library) {
  library.impl("channel_modulation", TORCH_BOX(&channel_modulation));
  library.impl("channel_modulation_backward", TORCH_BOX(&channel_modulation_backward));
}

}  // namespace savl::cpu
