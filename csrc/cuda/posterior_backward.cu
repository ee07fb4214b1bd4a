#include "cuda/launch.cuh"
#include "cuda/launch.h"

namespace savl::gpu {

const char* launch_posterior_backward(const PosteriorArgs& args, void* stream) {
  return dispatch_posterior<PosteriorBackward>(args, LaunchOn{static_cast<cudaStream_t>(stream)});
}

}  // namespace savl::gpu
