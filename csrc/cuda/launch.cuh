// Runs the kernels of this folder on a CUDA device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>

#include "cuda/elements.h"

namespace savl::gpu {

template <typename Kernel, int kPhase = 0>
__device__ __forceinline__ void run_phases(const typename Kernel::Args& args, typename Kernel::Shared& shared) {
  Kernel::template phase<kPhase>(args, static_cast<int64_t>(blockIdx.x), static_cast<int>(threadIdx.x), shared);
  if constexpr (kPhase + 1 < Kernel::kPhases) {
    __syncthreads();
    run_phases<Kernel, kPhase + 1>(args, shared);
  }
}

// `kResident` is the number of blocks on a multiprocessor: three leave 80 registers for each thread, two leave 128.
template <typename Kernel>
__global__ void __launch_bounds__(kThreads, Kernel::kResident)
    kernel(const __grid_constant__ typename Kernel::Args args) {
  __shared__ typename Kernel::Shared shared;
  run_phases<Kernel>(args, shared);
}

// Returns CUDA's error message where CUDA refuses the launch, otherwise null.
struct LaunchOn {
  cudaStream_t stream;

  template <typename Kernel>
  const char* operator()(Kernel, const typename Kernel::Args& args, int64_t blocks) const {
    if (blocks == 0) return nullptr;
    if (blocks > std::numeric_limits<int32_t>::max()) return "the tensors are too large for one launch";
    cudaGetLastError();  // discards an error that another library has left behind
    kernel<Kernel><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
};

}  // namespace savl::gpu
