// Channel modulation: out = residual + (1 + gamma) * attended + beta in one pass. For each float32 element it reads 16
// bytes (20 with beta), writes 4, and takes three additions and a multiplication.
#pragma once

#include <cstdint>

#include "channel_modulation_math.h"
#include "cpu/kernel.h"
#include "cpu/simd.h"

namespace savl::cpu {

// Rows of `channels` contiguous elements; `*_stride` is the distance between rows, in elements. For S see cpu/kernel.h.
// A task is a row.
struct ChannelModulationArgs {
  const void *attended, *gamma, *beta;  // S; beta may be null
  const void* residual;                 // S, or float32 where residual_is_float
  int64_t attended_stride, gamma_stride, beta_stride, residual_stride;
  void* out;  // contiguous, written, dtype as residual
  int64_t rows, channels;
  bool residual_is_float;  // residual, out and grad_out are float32 although attended is bfloat16

  // Backward only
  const void* grad_out;
  int64_t grad_out_stride;
  void *grad_attended, *grad_gamma;  // S, contiguous, written
};

}  // namespace savl::cpu

SAVL_BEGIN_KERNELS

template <typename S, typename R>
SAVL_INLINE void modulate_row(const ChannelModulationArgs& args, int64_t row) {
  using T = Arithmetic<S>;
  const S* attended = static_cast<const S*>(args.attended) + row * args.attended_stride;
  const S* gamma = static_cast<const S*>(args.gamma) + row * args.gamma_stride;
  const S* beta = args.beta == nullptr ? nullptr : static_cast<const S*>(args.beta) + row * args.beta_stride;
  const R* residual = static_cast<const R*>(args.residual) + row * args.residual_stride;
  R* out = static_cast<R*>(args.out) + row * args.channels;
  for_vectors<T>(args.channels, [&](int64_t c, int64_t lanes) SAVL_ALWAYS_INLINE {
    Vec<T> value =
        modulated(load_some(attended + c, lanes), load_some(gamma + c, lanes), load_some(residual + c, lanes));
    if (beta != nullptr) value += load_some(beta + c, lanes);
    store_some(out + c, value, lanes);
  });
}

template <typename S, typename R>
SAVL_INLINE void modulate_row_backward(const ChannelModulationArgs& args, int64_t row) {
  using T = Arithmetic<S>;
  const S* attended = static_cast<const S*>(args.attended) + row * args.attended_stride;
  const S* gamma = static_cast<const S*>(args.gamma) + row * args.gamma_stride;
  const R* grad = static_cast<const R*>(args.grad_out) + row * args.grad_out_stride;
  S* grad_attended = static_cast<S*>(args.grad_attended) + row * args.channels;
  S* grad_gamma = static_cast<S*>(args.grad_gamma) + row * args.channels;
  for_vectors<T>(args.channels, [&](int64_t c, int64_t lanes) SAVL_ALWAYS_INLINE {
    const ModulationGradients<Vec<T>> gradients =
        modulation_gradients(load_some(grad + c, lanes), load_some(attended + c, lanes), load_some(gamma + c, lanes));
    store_some(grad_attended + c, gradients.attended, lanes);
    store_some(grad_gamma + c, gradients.gamma, lanes);
  });
}

template <typename S>
void channel_modulation_kernel(const ChannelModulationArgs& args, int64_t begin, int64_t end) {
  with_output_type<S>(args.residual_is_float, [&]<typename R>() SAVL_ALWAYS_INLINE {
    for (int64_t row = begin; row < end; ++row) modulate_row<S, R>(args, row);
  });
}

template <typename S>
void channel_modulation_backward_kernel(const ChannelModulationArgs& args, int64_t begin, int64_t end) {
  with_output_type<S>(args.residual_is_float, [&]<typename R>() SAVL_ALWAYS_INLINE {
    for (int64_t row = begin; row < end; ++row) modulate_row_backward<S, R>(args, row);
  });
}

SAVL_END_KERNELS
