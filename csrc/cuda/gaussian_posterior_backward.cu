#include "cuda/gaussian_posterior_backward.h"
#include "cuda/launch.cuh"
#include "cuda/launch.h"

namespace savl::gpu {

const char* launch_gaussian_posterior_backward(const GaussianPosteriorArgs& args, void* stream) {
  return dispatch_gaussian_posterior<GaussianPosteriorBackward>(args, LaunchOn{static_cast<cudaStream_t>(stream)});
}

}  // namespace savl::gpu
