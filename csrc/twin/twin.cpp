// Runs the CUDA kernels on the CPU: block after block, phase after phase, thread after thread. Each thread loads,
// computes and stores the same as on a GPU, so that a machine without one can test the kernels. This file is not
// installed; tests/csrc compiles it. It is a torch library named savl_twin, which has the ops of csrc/cuda with the
// schemas of savl, for tensors on the CPU.
#include <cstring>
#include <memory>

#include "cuda/channel_modulation.h"
#include "cuda/channel_modulation_op.h"
#include "cuda/gaussian_posterior_backward.h"
#include "cuda/gaussian_posterior_forward.h"
#include "cuda/gaussian_posterior_op.h"
#include "cuda/gaussian_posterior_statistics.h"

namespace savl::twin {

namespace {

// Whether the threads of a block run from the last to the first. Their order must not change the result.
bool threads_run_backwards = false;

template <typename Kernel, int kPhase = 0>
void run_phases(const typename Kernel::Args& args, int64_t block, typename Kernel::Shared& shared) {
  for (int index = 0; index < gpu::kThreads; ++index) {
    const int thread = threads_run_backwards ? gpu::kThreads - 1 - index : index;
    Kernel::template phase<kPhase>(args, block, thread, shared);
  }
  if constexpr (kPhase + 1 < Kernel::kPhases) run_phases<Kernel, kPhase + 1>(args, block, shared);
}

struct LaunchHere {
  template <typename Kernel>
  const char* operator()(Kernel, const typename Kernel::Args& args, int64_t blocks) const {
    const auto shared = std::make_unique<typename Kernel::Shared>();
    for (int64_t block = 0; block < blocks; ++block) {
      // NaN, so that reading shared memory that was never written shows. The values of the block before would look
      // right.
      std::memset(static_cast<void*>(shared.get()), 0xff, sizeof(typename Kernel::Shared));
      run_phases<Kernel>(args, block, *shared);
    }
    return nullptr;
  }
};

class Host {
 public:
  static constexpr const char* kName = "the CPU";
  static bool holds(const Tensor& tensor) { return tensor.is_cpu(); }

  explicit Host(const Tensor&) {}

  const char* channel_modulation(const gpu::ChannelModulationArgs& args) const {
    return gpu::dispatch_channel_modulation(args, LaunchHere{});
  }
  const char* channel_modulation_backward(const gpu::ChannelModulationArgs& args) const {
    return gpu::dispatch_channel_modulation_backward(args, LaunchHere{});
  }
  const char* gaussian_posterior(const gpu::GaussianPosteriorArgs& args) const {
    return gpu::dispatch_gaussian_posterior<gpu::GaussianPosteriorForward>(args, LaunchHere{});
  }
  const char* gaussian_posterior_backward(const gpu::GaussianPosteriorArgs& args) const {
    return gpu::dispatch_gaussian_posterior<gpu::GaussianPosteriorBackward>(args, LaunchHere{});
  }
  const char* merge_moments(const gpu::StatisticsArgs& args) const {
    return gpu::dispatch_merge_moments(args, LaunchHere{});
  }
  const char* normalise_severity(const gpu::StatisticsArgs& args) const {
    return gpu::dispatch_normalise_severity(args, LaunchHere{});
  }
};

}  // namespace

STABLE_TORCH_LIBRARY(savl_twin, library) {
  library.def(
      "gaussian_posterior(Tensor mu, Tensor logvar, Tensor? eps, SymInt? seed, SymInt offset, float severity_eps, "
      "float severity_max) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "gaussian_posterior_backward(Tensor? grad_sample, Tensor? grad_kl, Tensor? grad_variance, Tensor mu, "
      "Tensor logvar, Tensor? eps, SymInt? seed, SymInt offset, bool wants_grad_eps) -> (Tensor, Tensor, Tensor)");
  library.def("channel_modulation(Tensor attended, Tensor gamma, Tensor? beta, Tensor residual) -> Tensor");
  library.def("channel_modulation_backward(Tensor grad_out, Tensor attended, Tensor gamma) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(savl_twin, CPU, library) {
  library.impl("gaussian_posterior", TORCH_BOX(&gpu::GaussianPosteriorOp<Host>::forward));
  library.impl("gaussian_posterior_backward", TORCH_BOX(&gpu::GaussianPosteriorOp<Host>::backward));
  library.impl("channel_modulation", TORCH_BOX(&gpu::ChannelModulationOp<Host>::forward));
  library.impl("channel_modulation_backward", TORCH_BOX(&gpu::ChannelModulationOp<Host>::backward));
}

}  // namespace savl::twin

extern "C" __attribute__((visibility("default"))) void savl_twin_run_threads_backwards(bool backwards) {
  savl::twin::threads_run_backwards = backwards;
}
