// From the plain arguments of an op to the kernel that does it. `launch(kernel, args, blocks)` runs one: on CUDA
// (launch.cuh) or on the host (csrc/twin).
#pragma once

#include "cuda/modulation.h"
#include "cuda/statistics.h"

namespace savl::gpu {

// `kForward` or `kBackward`, an instance for each dtype, noise and layout.
template <template <typename, NoiseSource, bool> typename Kernel, typename Launch>
auto dispatch_posterior(const PosteriorArgs& args, const Launch& launch) {
  const auto with_noise = [&]<typename S, NoiseSource kNoise>() {
    return args.planar ? launch(Kernel<S, kNoise, true>{}, args, args.blocks())
                       : launch(Kernel<S, kNoise, false>{}, args, args.blocks());
  };
  const auto with_storage = [&]<typename S>() {
    switch (args.noise) {
      case NoiseSource::kGiven:
        return with_noise.template operator()<S, NoiseSource::kGiven>();
      case NoiseSource::kDrawn:
        return with_noise.template operator()<S, NoiseSource::kDrawn>();
      default:
        return with_noise.template operator()<S, NoiseSource::kNone>();
    }
  };
  switch (args.storage) {
    case Storage::kBFloat16:
      return with_storage.template operator()<BFloat16>();
    case Storage::kFloat16:
      return with_storage.template operator()<Float16>();
    default:
      return with_storage.template operator()<float>();
  }
}

// Calls `run.operator()<S, R>()` with the dtypes of attended and residual.
template <typename Run>
auto dispatch_modulation(const ModulationArgs& args, const Run& run) {
  switch (args.storage) {
    case Storage::kBFloat16:
      return args.residual_is_float ? run.template operator()<BFloat16, float>()
                                    : run.template operator()<BFloat16, BFloat16>();
    case Storage::kFloat16:
      return args.residual_is_float ? run.template operator()<Float16, float>()
                                    : run.template operator()<Float16, Float16>();
    default:
      return run.template operator()<float, float>();
  }
}

template <typename Launch>
auto dispatch_modulation_forward(const ModulationArgs& args, const Launch& launch) {
  return dispatch_modulation(args, [&]<typename S, typename R>() {
    return args.beta != nullptr ? launch(ModulationForward<S, R, true>{}, args, args.blocks())
                                : launch(ModulationForward<S, R, false>{}, args, args.blocks());
  });
}

template <typename Launch>
auto dispatch_modulation_backward(const ModulationArgs& args, const Launch& launch) {
  return dispatch_modulation(
      args, [&]<typename S, typename R>() { return launch(ModulationBackward<S, R>{}, args, args.blocks()); });
}

template <typename Launch>
auto dispatch_merge(const StatisticsArgs& args, const Launch& launch) {
  return launch(MergeMoments{}, args, args.batch * args.merged_count);
}

template <typename Launch>
auto dispatch_severity(const StatisticsArgs& args, const Launch& launch) {
  return launch(NormaliseSeverity{}, args, args.batch * args.tiles);
}

}  // namespace savl::gpu
