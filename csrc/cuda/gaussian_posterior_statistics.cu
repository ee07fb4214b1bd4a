#include "cuda/gaussian_posterior_statistics.h"
#include "cuda/launch.cuh"
#include "cuda/launch.h"

namespace savl::gpu {

const char* launch_merge_moments(const StatisticsArgs& args, void* stream) {
  return dispatch_merge_moments(args, LaunchOn{static_cast<cudaStream_t>(stream)});
}

const char* launch_normalise_severity(const StatisticsArgs& args, void* stream) {
  return dispatch_normalise_severity(args, LaunchOn{static_cast<cudaStream_t>(stream)});
}

}  // namespace savl::gpu
