// The mathematics of one element of the channel modulation, for CPU vectors and CUDA threads alike: V is a vector of
// cpu/simd.h or the float of one thread.
//
// Included inside the namespace of a backend.

// Without the shift.
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
