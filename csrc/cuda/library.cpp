// The CUDA library, savl/_cuda.so: registers its kernels with torch's dispatcher. It is loaded where torch has CUDA.
#include "torch_errors.h"  // before the headers of torch that it changes
//
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "cuda/channel_modulation_op.h"
#include "cuda/gaussian_posterior_op.h"
#include "cuda/launch.h"
#include "cuda_facts.h"

#ifndef SAVL_CUDA_FACTS
#error "SAVL_CUDA_FACTS is not defined: build through setup.py, which writes it into cuda_facts.h"
#endif

namespace savl::gpu {
namespace {

class Cuda {
 public:
  static constexpr const char* kName = "a CUDA device";
  static bool holds(const Tensor& tensor) { return tensor.is_cuda(); }

  explicit Cuda(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }

  const char* channel_modulation(const ChannelModulationArgs& args) const {
    return launch_channel_modulation(args, stream_);
  }
  const char* channel_modulation_backward(const ChannelModulationArgs& args) const {
    return launch_channel_modulation_backward(args, stream_);
  }
  const char* gaussian_posterior(const GaussianPosteriorArgs& args) const {
    return launch_gaussian_posterior(args, stream_);
  }
  const char* gaussian_posterior_backward(const GaussianPosteriorArgs& args) const {
    return launch_gaussian_posterior_backward(args, stream_);
  }
  const char* merge_moments(const StatisticsArgs& args) const { return launch_merge_moments(args, stream_); }
  const char* normalise_severity(const StatisticsArgs& args) const { return launch_normalise_severity(args, stream_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(savl, CUDA, library) {
  library.impl("gaussian_posterior", TORCH_BOX(&GaussianPosteriorOp<Cuda>::forward));
  library.impl("gaussian_posterior_backward", TORCH_BOX(&GaussianPosteriorOp<Cuda>::backward));
  library.impl("channel_modulation", TORCH_BOX(&ChannelModulationOp<Cuda>::forward));
  library.impl("channel_modulation_backward", TORCH_BOX(&ChannelModulationOp<Cuda>::backward));
}

}  // namespace savl::gpu

// How this library was built. savl/build_info.py reads it from the file, because a torch without CUDA cannot load the
// library.
extern "C" __attribute__((visibility("default"))) const char savl_cuda_facts[];
const char savl_cuda_facts[] = SAVL_CUDA_FACTS;
