#include "cuda/launch.cuh"
#include "cuda/launch.h"

namespace savl::gpu {

const char* launch_posterior(const PosteriorArgs& args, void* stream) {
  return dispatch_posterior<PosteriorForward>(args, LaunchOn{static_cast<cudaStream_t>(stream)});
}

}  // namespace savl::gpu
