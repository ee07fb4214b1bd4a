#include "cuda/channel_modulation.h"
#include "cuda/launch.cuh"
#include "cuda/launch.h"

namespace savl::gpu {

const char* launch_channel_modulation(const ChannelModulationArgs& args, void* stream) {
  return dispatch_channel_modulation(args, LaunchOn{static_cast<cudaStream_t>(stream)});
}

const char* launch_channel_modulation_backward(const ChannelModulationArgs& args, void* stream) {
  return dispatch_channel_modulation_backward(args, LaunchOn{static_cast<cudaStream_t>(stream)});
}

}  // namespace savl::gpu
