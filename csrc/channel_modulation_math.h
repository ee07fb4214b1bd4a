// The mathematics of one element of channel modulation, shared by CPU and CUDA. V is a vector of cpu/simd.h or the
// float of one CUDA thread.
#pragma once

#include "compiler.h"

SAVL_BEGIN_TARGET
namespace savl {

// The output without `beta`, which is optional and added afterwards.
template <typename V>
SAVL_HOST_DEVICE V modulated(V attended, V gamma, V residual) {
  return residual + (gamma + 1.0f) * attended;
}

template <typename V>
struct ModulationGradients {
  V attended, gamma;
};

template <typename V>
SAVL_HOST_DEVICE ModulationGradients<V> modulation_gradients(V grad_out, V attended, V gamma) {
  return {grad_out * (gamma + 1.0f), grad_out * attended};
}

}  // namespace savl
SAVL_END_TARGET
