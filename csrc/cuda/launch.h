// The launchers of the kernels: plain C++, so that torch's headers and nvcc never meet. `stream` is a cudaStream_t of
// the current device. Each returns what CUDA says where it refuses the launch, null otherwise; none waits.
#pragma once

#include "cuda/modulation.h"
#include "cuda/statistics.h"

namespace savl::gpu {

const char* launch_posterior(const PosteriorArgs& args, void* stream);
const char* launch_posterior_backward(const PosteriorArgs& args, void* stream);
const char* launch_merge(const StatisticsArgs& args, void* stream);
const char* launch_severity(const StatisticsArgs& args, void* stream);
const char* launch_modulation(const ModulationArgs& args, void* stream);
const char* launch_modulation_backward(const ModulationArgs& args, void* stream);

}  // namespace savl::gpu
