// savl::channel_modulation on CUDA: from torch's tensors to the kernels. The op is defined in
// savl/ops/channel_modulation.py.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "cuda/channel_modulation.h"
#include "cuda/tensors.h"

namespace savl::gpu {

template <typename Device>
struct ChannelModulationOp {
  static constexpr const char* kOp = "savl::channel_modulation";

  static void check(const char* name, const Tensor& tensor, const Tensor& attended, bool float_too) {
    check_device_and_shape<Device>(kOp, name, tensor, "attended", attended);
    if (!float_too || tensor.scalar_type() != ScalarType::Float) {
      check_dtype(kOp, name, tensor, "attended", attended);
    }
  }

  static Tensor new_like(const Tensor& like) {
    return new_tensor(like, {like.size(0), like.size(1), like.size(2), like.size(3)}, like.scalar_type());
  }

  // The arguments that both directions have, and the tensors that they point into. `residual` is the residual forward
  // and the gradient of the output backward, which have the same dtype.
  struct Inputs {
    ChannelModulationArgs args{};
    Tensor attended, gamma, residual;

    Inputs(const Tensor& attended_in, const Tensor& gamma_in, const char* residual_name, const Tensor& residual_in)
        : attended(attended_in), gamma(gamma_in), residual(residual_in) {
      args.storage = storage_of(kOp, attended);
      check("attended", attended, attended, false);
      check("gamma", gamma, attended, false);
      check(residual_name, residual, attended, true);
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

  static Tensor forward(const Tensor& attended, const Tensor& gamma, const std::optional<Tensor>& beta,
                        const Tensor& residual) {
    Inputs inputs(attended, gamma, "residual", residual);
    if (beta.has_value()) check("beta", *beta, attended, false);
    const Device device(attended);
    ChannelModulationArgs& args = inputs.args;
    std::optional<Tensor> b;
    if (beta.has_value()) {
      b = as_rows(*beta);
      args.beta = b->const_data_ptr();
      args.beta_stride = row_stride(*b);
    }
    Tensor out = new_like(residual);
    args.residual = inputs.residual.const_data_ptr();
    args.residual_stride = row_stride(inputs.residual);
    args.out = out.mutable_data_ptr();
    plan(args);
    check_launch(kOp, device.channel_modulation(args));
    return out;
  }

  // Returns the gradients of attended and gamma; those of beta and residual are grad_out itself.
  static std::tuple<Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& attended, const Tensor& gamma) {
    Inputs inputs(attended, gamma, "grad_out", grad_out);
    const Device device(attended);
    ChannelModulationArgs& args = inputs.args;
    Tensor grad_attended = new_like(attended), grad_gamma = new_like(gamma);
    args.grad_out = inputs.residual.const_data_ptr();
    args.grad_out_stride = row_stride(inputs.residual);
    args.grad_attended = grad_attended.mutable_data_ptr();
    args.grad_gamma = grad_gamma.mutable_data_ptr();
    plan(args);
    check_launch(kOp, device.channel_modulation_backward(args));
    return {grad_attended, grad_gamma};
  }
};

}  // namespace savl::gpu
