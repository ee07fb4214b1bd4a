// The CUDA library, savl/_cuda.so: its kernels for torch's dispatcher. It is loaded where torch has CUDA.
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

  const char* posterior(const PosteriorArgs& args) const { return launch_posterior(args, stream_); }
  const char* posterior_backward(const PosteriorArgs& args) const { return launch_posterior_backward(args, stream_); }
  const char* merge(const StatisticsArgs& args) const { return launch_merge(args, stream_); }
  const char* severity(const StatisticsArgs& args) const { return launch_severity(args, stream_); }
  const char* modulation(const ModulationArgs& args) const { return launch_modulation(args, stream_); }
  const char* modulation_backward(const ModulationArgs& args) const {
    return launch_modulation_backward(args, stream_);
  }

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

// How this library was built, for savl/cuda_facts.py, which reads it off the file: a torch without CUDA cannot load it.
extern "C" __attribute__((visibility("default"))) const char savl_cuda_facts[];
const char savl_cuda_facts[] = SAVL_CUDA_FACTS;
