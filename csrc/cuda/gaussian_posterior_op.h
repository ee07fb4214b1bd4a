// savl::gaussian_posterior on CUDA: from torch's tensors to the kernels. The op is defined in
// savl/ops/gaussian_posterior.py.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "cuda/gaussian_posterior.h"
#include "cuda/gaussian_posterior_statistics.h"
#include "cuda/tensors.h"

namespace savl::gpu {

template <typename Device>
struct GaussianPosteriorOp {
  static constexpr const char* kOp = "savl::gaussian_posterior";

  // The arguments that both directions have, and the tensors that they point into.
  struct Inputs {
    GaussianPosteriorArgs args{};
    Tensor mu, logvar;
    std::optional<Tensor> eps;

    Inputs(const Tensor& mu_in, const Tensor& logvar_in, const std::optional<Tensor>& eps_in,
           std::optional<int64_t> seed, int64_t offset)
        : mu(mu_in), logvar(logvar_in), eps(eps_in) {
      args.storage = storage_of(kOp, mu);
      check_device_and_shape<Device>(kOp, "mu", mu, "mu", mu);
      check_device_and_shape<Device>(kOp, "logvar", logvar, "mu", mu);
      check_dtype(kOp, "logvar", logvar, "mu", mu);
      STD_TORCH_CHECK(mu.size(1) > 0 && mu.size(2) > 0 && mu.size(3) > 0, kOp,
                      ": mu must have at least one channel and one pixel");
      args.planar = !is_interleaved(mu);
      mu = in_layout(mu, args.planar);
      logvar = in_layout(logvar, args.planar);
      args.mu = field_of(mu, args.planar);
      args.logvar = field_of(logvar, args.planar);
      args.noise = seed.has_value() ? NoiseSource::kDrawn : NoiseSource::kNone;
      if (eps.has_value()) {
        check_device_and_shape<Device>(kOp, "eps", *eps, "mu", mu);
        check_dtype(kOp, "eps", *eps, "mu", mu);
        eps = in_layout(*eps, args.planar);
        args.eps = field_of(*eps, args.planar);
        args.noise = NoiseSource::kGiven;
      }
      args.seed = static_cast<uint64_t>(seed.value_or(0));
      args.offset = static_cast<uint64_t>(offset);
      args.batch = mu.size(0);
      args.channels = mu.size(1);
      args.pixels = mu.size(2) * mu.size(3);
    }

    Tensor new_field() const {
      return new_tensor(mu, {mu.size(0), mu.size(1), mu.size(2), mu.size(3)}, mu.scalar_type(), format_of(args.planar));
    }
    Tensor new_map() const { return new_tensor(mu, {mu.size(0), mu.size(2), mu.size(3)}, ScalarType::Float); }
  };

  static Tensor new_moments(const Tensor& like, int64_t count) {
    return new_tensor(like, {count, 2}, ScalarType::Double);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& mu, const Tensor& logvar,
                                                                            const std::optional<Tensor>& eps,
                                                                            std::optional<int64_t> seed, int64_t offset,
                                                                            double severity_eps, double severity_max) {
    Inputs inputs(mu, logvar, eps, seed, offset);
    const Device device(mu);
    GaussianPosteriorArgs& args = inputs.args;
    const bool noisy = args.noise != NoiseSource::kNone;
    const Tensor sample = noisy ? inputs.new_field() : new_tensor(mu, {0}, mu.scalar_type());
    if (noisy) args.sample = field_of(sample, args.planar);
    const Tensor kl = inputs.new_map(), severity = inputs.new_map(), variance = inputs.new_map();
    const Tensor mean = new_tensor(mu, {args.batch}, ScalarType::Float);
    const Tensor var = new_tensor(mu, {args.batch}, ScalarType::Float);
    plan(args);
    Tensor moments = new_moments(mu, args.batch * args.tiles);
    args.kl = static_cast<float*>(kl.mutable_data_ptr());
    args.variance = static_cast<float*>(variance.mutable_data_ptr());
    args.moments = static_cast<Moments*>(moments.mutable_data_ptr());
    check_launch(kOp, device.gaussian_posterior(args));

    StatisticsArgs statistics{};
    statistics.batch = args.batch;
    statistics.pixels = args.pixels;
    statistics.moments = args.moments;
    statistics.count = args.tiles;
    statistics.span = args.tile;
    while (statistics.count > kMergedAtOnce) {
      statistics.merged_count = (statistics.count + kMergedAtOnce - 1) / kMergedAtOnce;
      const Tensor merged = new_moments(mu, args.batch * statistics.merged_count);
      statistics.merged = static_cast<Moments*>(merged.mutable_data_ptr());
      check_launch(kOp, device.merge_moments(statistics));
      moments = merged;  // memory that is freed here is reused in the order of the stream
      statistics.moments = statistics.merged;
      statistics.count = statistics.merged_count;
      statistics.span *= kMergedAtOnce;
    }
    statistics.variance = args.variance;
    statistics.severity = static_cast<float*>(severity.mutable_data_ptr());
    statistics.mean = static_cast<float*>(mean.mutable_data_ptr());
    statistics.var = static_cast<float*>(var.mutable_data_ptr());
    statistics.severity_eps = static_cast<float>(severity_eps);
    statistics.severity_max = static_cast<float>(severity_max);
    statistics.whole = args.pixels % 4 == 0 && is_aligned(statistics.variance) && is_aligned(statistics.severity);
    statistics.tiles = (args.pixels + NormaliseSeverity::kTile - 1) / NormaliseSeverity::kTile;
    check_launch(kOp, device.normalise_severity(statistics));
    return {sample, kl, severity, variance, mean, var};
  }

  // `grad_variance` is the whole gradient of the per-pixel variance, including the contributions of severity and
  // statistics.
  static std::tuple<Tensor, Tensor, Tensor> backward(const std::optional<Tensor>& grad_sample,
                                                     const std::optional<Tensor>& grad_kl,
                                                     const std::optional<Tensor>& grad_variance, const Tensor& mu,
                                                     const Tensor& logvar, const std::optional<Tensor>& eps,
                                                     std::optional<int64_t> seed, int64_t offset, bool wants_grad_eps) {
    Inputs inputs(mu, logvar, eps, seed, offset);
    const Device device(mu);
    GaussianPosteriorArgs& args = inputs.args;
    std::optional<Tensor> to_sample, to_kl, to_variance;
    if (grad_sample.has_value()) {
      check_device_and_shape<Device>(kOp, "grad_sample", *grad_sample, "mu", mu);
      check_dtype(kOp, "grad_sample", *grad_sample, "mu", mu);
      STD_TORCH_CHECK(args.noise != NoiseSource::kNone, kOp, ": a gradient of the sample, but no noise");
      to_sample = in_layout(*grad_sample, args.planar);
      args.grad_sample = field_of(*to_sample, args.planar);
    }
    const auto map_of = [&](const std::optional<Tensor>& given, std::optional<Tensor>& kept) -> const float* {
      if (!given.has_value()) return nullptr;
      STD_TORCH_CHECK(Device::holds(*given) && given->get_device_index() == mu.get_device_index() &&
                          given->numel() == args.batch * args.pixels,
                      kOp, ": a gradient of a map must be (B, H, W) on the device of mu");
      kept = contiguous_as(*given, ScalarType::Float);
      return static_cast<const float*>(kept->const_data_ptr());
    };
    args.grad_kl = map_of(grad_kl, to_kl);
    args.grad_variance = map_of(grad_variance, to_variance);
    const Tensor grad_mu = inputs.new_field(), grad_logvar = inputs.new_field();
    Tensor grad_eps = new_tensor(mu, {0}, mu.scalar_type());
    args.grad_mu = field_of(grad_mu, args.planar);
    args.grad_logvar = field_of(grad_logvar, args.planar);
    if (wants_grad_eps && grad_sample.has_value()) {
      grad_eps = inputs.new_field();
      args.grad_eps = field_of(grad_eps, args.planar);
    }
    plan(args);
    check_launch(kOp, device.gaussian_posterior_backward(args));
    return {grad_mu, grad_logvar, grad_eps};
  }
};

}  // namespace savl::gpu
