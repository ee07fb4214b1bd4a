#include "cuda/launch.cuh"
#include "cuda/launch.h"

namespace savl::gpu {

const char* launch_merge(const StatisticsArgs& args, void* stream) {
  return dispatch_merge(args, LaunchOn{static_cast<cudaStream_t>(stream)});
}

const char* launch_severity(const StatisticsArgs& args, void* stream) {
  return dispatch_severity(args, LaunchOn{static_cast<cudaStream_t>(stream)});
}

}  // namespace savl::gpu
