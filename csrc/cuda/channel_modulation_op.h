// savl::channel_modulation from torch's tensors to the kernels; the op is defined in savl/ops/channel_modulation.py.
#pragma once

#include "cuda/tensors.h"

namespace savl::gpu {

template <typename Device>
struct ChannelModulationOp {
  static constexpr const char* kOp = "savl::channel_modulation";

  static void check(const char* name, const Tensor& tensor, const Tensor& attended, bool float_too) {
    check_like<Device>(kOp, name, tensor, "attended", attended);
    if (!float_too || tensor.scalar_type() != ScalarType::Float) {
      check_dtype(kOp, name, tensor, "attended", attended);
    }
  }

  static Tensor new_like(const Tensor& like) {
    return new_tensor(like, {like.size(0), like.size(1), like.size(2), like.size(3)}, like.scalar_type());
  }

  static Tensor forward(const Tensor& attended, const Tensor& gamma, const std::optional<Tensor>& beta,
                        const Tensor& residual) {
    ModulationArgs args{};
    args.storage = storage_of(kOp, attended);
    check("attended", attended, attended, false);
    check("gamma", gamma, attended, false);
    if (beta.has_value()) check("beta", *beta, attended, false);
    check("residual", residual, attended, true);
    const Device device(attended);
    const Tensor a = as_rows(attended), g = as_rows(gamma), r = as_rows(residual);
    std::optional<Tensor> b;
    if (beta.has_value()) {
      b = as_rows(*beta);
      args.beta = b->const_data_ptr();
      args.beta_stride = row_stride(*b);
    }
    Tensor out = new_like(residual);
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
    plan(args);
    check_launch(kOp, device.modulation(args));
    return out;
  }

  // Gradients of attended and gamma; those of beta and residual are grad_out itself.
  static std::tuple<Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& attended, const Tensor& gamma) {
    ModulationArgs args{};
    args.storage = storage_of(kOp, attended);
    check("attended", attended, attended, false);
    check("gamma", gamma, attended, false);
    check("grad_out", grad_out, attended, true);
    const Device device(attended);
    const Tensor a = as_rows(attended), g = as_rows(gamma), grad = as_rows(grad_out);
    Tensor grad_attended = new_like(attended), grad_gamma = new_like(gamma);
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
    plan(args);
    check_launch(kOp, device.modulation_backward(args));
    return {grad_attended, grad_gamma};
  }
};

}  // namespace savl::gpu
