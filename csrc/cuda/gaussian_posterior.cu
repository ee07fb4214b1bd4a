#include "cuda/gaussian_posterior_forward.h"
#include "cuda/launch.cuh"
#include "cuda/launch.h"

namespace savl::gpu {

const char* launch_gaussian_posterior(const GaussianPosteriorArgs& args, void* stream) {
  return dispatch_gaussian_posterior<GaussianPosteriorForward>(args, LaunchOn{static_cast<cudaStream_t>(stream)});
}

}  // namespace savl::gpu
