#include "cuda/launch.cuh"
#include "cuda/launch.h"

namespace savl::gpu {

const char* launch_modulation(const ModulationArgs& args, void* stream) {
  return dispatch_modulation_forward(args, LaunchOn{static_cast<cudaStream_t>(stream)});
}

const char* launch_modulation_backward(const ModulationArgs& args, void* stream) {
  return dispatch_modulation_backward(args, LaunchOn{static_cast<cudaStream_t>(stream)});
}

}  // namespace savl::gpu
