// savl::channel_modulation on the CPU; the op is defined in savl/ops/channel_modulation.py.
#include <cstdint>
#include <optional>
#include <tuple>

#include "cpu/tensors.h"

namespace savl::cpu {
namespace {

const char* const kOp = "savl::channel_modulation";

void check_like(const Tensor& tensor, const Tensor& attended, bool float_too) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 4, kOp, ": tensors must be (B, H, W, C) on the CPU");
  STD_TORCH_CHECK(
      tensor.scalar_type() == attended.scalar_type() ||
          (float_too && tensor.scalar_type() == ScalarType::Float && attended.scalar_type() == ScalarType::BFloat16),
      kOp, ": dtypes do not fit together");
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(tensor.size(dim) == attended.size(dim), kOp, ": tensors must have the same shape");
  }
}

// The arguments that both directions have, and the tensors that they point into. `residual` is the residual forward and
// the gradient of the output backward, which have the same dtype.
struct ChannelModulation {
  ChannelModulationArgs args{};
  Storage storage;
  Tensor attended, gamma, residual;

  ChannelModulation(const Tensor& attended_in, const Tensor& gamma_in, const Tensor& residual_in)
      : storage(storage_of(kOp, attended_in)), attended(attended_in), gamma(gamma_in), residual(residual_in) {
    check_like(attended, attended, false);
    check_like(gamma, attended, false);
    check_like(residual, attended, true);
    attended = as_rows(attended);
    gamma = as_rows(gamma);
    residual = as_rows(residual);
    args.attended = attended.const_data_ptr();
    args.gamma = gamma.const_data_ptr();
    args.attended_stride = row_stride(attended);
    args.gamma_stride = row_stride(gamma);
    args.rows = attended.size(0) * attended.size(1) * attended.size(2);
    args.channels = attended.size(3);
    args.residual_is_float = residual.scalar_type() == ScalarType::Float;
  }
};

Tensor new_like(const Tensor& like) {
  return new_tensor({like.size(0), like.size(1), like.size(2), like.size(3)}, like.scalar_type());
}

Tensor channel_modulation(const Tensor& attended, const Tensor& gamma, const std::optional<Tensor>& beta,
                          const Tensor& residual) {
  ChannelModulation modulation(attended, gamma, residual);
  ChannelModulationArgs& args = modulation.args;
  std::optional<Tensor> shift;
  if (beta.has_value()) {
    check_like(*beta, attended, false);
    shift = as_rows(*beta);
    args.beta = shift->const_data_ptr();
    args.beta_stride = row_stride(*shift);
  }
  Tensor out = new_like(residual);
  args.residual = modulation.residual.const_data_ptr();
  args.residual_stride = row_stride(modulation.residual);
  args.out = out.mutable_data_ptr();
  run(kernels().channel_modulation.forward, modulation.storage, args, args.rows, rows_per_thread(args.channels));
  return out;
}

// Returns the gradients of attended and gamma; those of beta and residual are grad_out itself.
std::tuple<Tensor, Tensor> channel_modulation_backward(const Tensor& grad_out, const Tensor& attended,
                                                       const Tensor& gamma) {
  ChannelModulation modulation(attended, gamma, grad_out);
  ChannelModulationArgs& args = modulation.args;
  Tensor grad_attended = new_like(attended), grad_gamma = new_like(gamma);
  args.grad_out = modulation.residual.const_data_ptr();
  args.grad_out_stride = row_stride(modulation.residual);
  args.grad_attended = grad_attended.mutable_data_ptr();
  args.grad_gamma = grad_gamma.mutable_data_ptr();
  run(kernels().channel_modulation.backward, modulation.storage, args, args.rows, rows_per_thread(args.channels));
  return {grad_attended, grad_gamma};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(savl, CPU, library) {
  library.impl("channel_modulation", TORCH_BOX(&channel_modulation));
  library.impl("channel_modulation_backward", TORCH_BOX(&channel_modulation_backward));
}

}  // namespace savl::cpu
