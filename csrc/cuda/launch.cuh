// Runs the kernels of this folder on a device.
#pragma once

#include <cuda_runtime_api.h>

#include <limits>

#include "cuda/dispatch.h"

namespace savl::gpu {

template <typename Kernel, int kPhase = 0>
__device__ __forceinline__ void run_phases(const typename Kernel::Args& args, typename Kernel::Shared& shared) {
  Kernel::template phase<kPhase>(args, static_cast<int64_t>(blockIdx.x), static_cast<int>(threadIdx.x), shared);
  if constexpr (kPhase + 1 < Kernel::kPhases) {
    __syncthreads();
    run_phases<Kernel, kPhase + 1>(args, shared);
  }
}

// `kResident` blocks to a multiprocessor: three leave each thread 80 registers, two 128.
template <typename Kernel>
__global__ void __launch_bounds__(kThreads, Kernel::kResident)
    kernel(const __grid_constant__ typename Kernel::Args args) {
  __shared__ typename Kernel::Shared shared;
  run_phases<Kernel>(args, shared);
}

// Returns what CUDA says where it refuses, null otherwise.
struct LaunchOn {
  cudaStream_t stream;

  template <typename Kernel>
  const char* operator()(Kernel, const typename Kernel::Args& args, int64_t blocks) const {
    if (blocks == 0) return nullptr;
    if (blocks > std::numeric_limits<int32_t>::max()) return "the tensors are too large for one launch";
    cudaGetLastError();  // an error that another library has left behind is not this launch's
    kernel<Kernel><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
};

}  // namespace savl::gpu
