// The functions that launch the CUDA kernels. They are plain C++, so that nvcc need not compile torch's headers.
// `stream` is a cudaStream_t of the current device. Each function returns CUDA's error message where CUDA refuses the
// launch, otherwise null, and does not wait for the kernel.
#pragma once

#include "cuda/channel_modulation.h"
#include "cuda/gaussian_posterior.h"
#include "cuda/gaussian_posterior_statistics.h"

namespace savl::gpu {

const char* launch_channel_modulation(const ChannelModulationArgs& args, void* stream);
const char* launch_channel_modulation_backward(const ChannelModulationArgs& args, void* stream);
const char* launch_gaussian_posterior(const GaussianPosteriorArgs& args, void* stream);
const char* launch_gaussian_posterior_backward(const GaussianPosteriorArgs& args, void* stream);
const char* launch_merge_moments(const StatisticsArgs& args, void* stream);
const char* launch_normalise_severity(const StatisticsArgs& args, void* stream);

}  // namespace savl::gpu
