// Channel modulation on CUDA: what one thread does with its chunks of 16 bytes. gaussian_posterior.h says what a kernel
// is.
//
// Bytes per element, float32 and 16 bits: forward 16 (20 with beta) and 8 (10); backward 20 and 10. With about four
// operations per element, only memory limits the speed. At the 3.35 TB/s of an H100, 512 x 512 pixels of 144 channels
// in 16 bits take no less than 90 us (113 us with beta), the backward 113 us.
//
// Launch shape: blocks of 256 threads. Each thread has two chunks of every tensor, and at most ten loads in flight.
// Tensors without gaps are one long row. Halves of a larger tensor, such as gamma and beta from one convolution, are
// many rows.
#pragma once

#include <cstdint>

#include "channel_modulation_math.h"
#include "compiler.h"
#include "cuda/elements.h"

namespace savl::gpu {

// Rows of `channels` contiguous elements; `*_stride` is the distance between rows, in elements.
struct ChannelModulationArgs {
  Storage storage;
  bool residual_is_float;  // residual, out and grad_out are float32, whatever the dtype of attended
  const void *attended, *gamma, *beta, *residual;  // beta may be null
  int64_t attended_stride, gamma_stride, beta_stride, residual_stride;
  void* out;  // contiguous, dtype as residual
  int64_t rows, channels;

  // Backward only
  const void* grad_out;
  int64_t grad_out_stride;
  void *grad_attended, *grad_gamma;  // written, contiguous, dtype as attended

  // Set by `plan`.
  bool whole;       // every chunk but the last of a row is 16 aligned bytes
  int64_t vectors;  // chunks of a row

  int64_t chunks() const { return rows * vectors; }
  int64_t blocks() const { return (chunks() + 2 * kThreads - 1) / (2 * kThreads); }
};

inline void plan(ChannelModulationArgs& args) {
  const int chunk = args.storage == Storage::kFloat32 ? 4 : 8;
  struct Rows {
    const void* data;
    int64_t* stride;
  };
  int64_t written = args.channels;
  const Rows all[] = {{args.attended, &args.attended_stride}, {args.gamma, &args.gamma_stride},
                      {args.beta, &args.beta_stride},         {args.residual, &args.residual_stride},
                      {args.grad_out, &args.grad_out_stride}, {args.out, &written},
                      {args.grad_attended, &written},         {args.grad_gamma, &written}};
  bool gapless = true, even = true;
  args.whole = true;
  for (const Rows& rows : all) {
    if (rows.data == nullptr) continue;
    gapless = gapless && *rows.stride == args.channels;
    even = even && *rows.stride % chunk == 0;
    args.whole = args.whole && is_aligned(rows.data);
  }
  if (gapless) {
    args.channels *= args.rows;
    args.rows = args.channels == 0 ? 0 : 1;
  }
  args.whole = args.whole && (even || args.rows <= 1);
  args.vectors = (args.channels + chunk - 1) / chunk;
}

// As many elements of R as a chunk of S has: one chunk, or two where R is float32 and S has 16 bits.
template <typename S, typename R>
struct Lanes {
  static constexpr int kParts = kLanes<S> / kLanes<R>;
  Words part[kParts];

  SAVL_HOST_DEVICE void load(const void* data, int64_t at, const Access& access) {
    SAVL_UNROLL
    for (int k = 0; k < kParts; ++k) {
      part[k] = load_chunk(static_cast<const R*>(data) + at + k * kLanes<R>, part_of(access, k));
    }
  }
  SAVL_HOST_DEVICE void store(void* data, int64_t at, const Access& access) const {
    SAVL_UNROLL
    for (int k = 0; k < kParts; ++k) {
      store_chunk(static_cast<R*>(data) + at + k * kLanes<R>, part[k], part_of(access, k));
    }
  }
  SAVL_HOST_DEVICE float at(int lane) const { return lane_of<R>(part[lane / kLanes<R>], lane % kLanes<R>); }
  SAVL_HOST_DEVICE void set(int lane, const float (&values)[2]) {
    set_pair<R>(part[lane / kLanes<R>], lane % kLanes<R>, values);
  }

 private:
  SAVL_HOST_DEVICE static Access part_of(const Access& access, int k) {
    return {access.whole, access.count - k * kLanes<R>, 1};
  }
};

// The place of a chunk.
struct ChannelModulationPlace {
  int64_t row, channel;
  Access access;
};

template <typename S>
SAVL_HOST_DEVICE ChannelModulationPlace channel_modulation_place(const ChannelModulationArgs& args, int64_t block,
                                                                 int thread, int k) {
  const int64_t number = (2 * block + k) * kThreads + thread;
  int64_t row = 0;
  if (args.rows == 1) {
    row = 0;
  } else if (number <= 0xffffffff && args.vectors <= 0xffffffff) {  // takes a fraction of the instructions
    row = static_cast<uint32_t>(number) / static_cast<uint32_t>(args.vectors);
  } else {
    row = number / args.vectors;
  }
  const int64_t channel = (number - row * args.vectors) * kLanes<S>;
  const int64_t left = row < args.rows ? args.channels - channel : 0;
  const int count = left < 0 ? 0 : left < kLanes<S> ? static_cast<int>(left) : kLanes<S>;
  return {row, channel, {args.whole && count == kLanes<S>, count, 1}};
}

template <typename S, typename R, bool kBeta>
struct ChannelModulationForward {
  using Args = ChannelModulationArgs;
  using Shared = NoSharedMemory;
  static constexpr int kPhases = 1;
  static constexpr int kResident = 3;

  template <int kPhase>
  SAVL_HOST_DEVICE static void phase(const Args& args, int64_t block, int thread, Shared&) {
    ChannelModulationPlace places[2];
    Lanes<S, S> attended[2], gamma[2], beta[2];
    Lanes<S, R> residual[2];
    SAVL_UNROLL
    for (int k = 0; k < 2; ++k) {
      places[k] = channel_modulation_place<S>(args, block, thread, k);
      const auto& [row, channel, access] = places[k];
      if (access.count == 0) continue;
      attended[k].load(args.attended, row * args.attended_stride + channel, access);
      gamma[k].load(args.gamma, row * args.gamma_stride + channel, access);
      if constexpr (kBeta) beta[k].load(args.beta, row * args.beta_stride + channel, access);
      residual[k].load(args.residual, row * args.residual_stride + channel, access);
    }
    SAVL_UNROLL
    for (int k = 0; k < 2; ++k) {
      if (places[k].access.count == 0) continue;
      Lanes<S, R> out;
      SAVL_UNROLL
      for (int pair = 0; pair < kLanes<S>; pair += 2) {
        float values[2];
        SAVL_UNROLL
        for (int which = 0; which < 2; ++which) {
          const int lane = pair + which;
          values[which] = modulated(attended[k].at(lane), gamma[k].at(lane), residual[k].at(lane));
          if constexpr (kBeta) values[which] += beta[k].at(lane);
        }
        out.set(pair, values);
      }
      out.store(args.out, places[k].row * args.channels + places[k].channel, places[k].access);
    }
  }
};

template <typename S, typename R>
struct ChannelModulationBackward {
  using Args = ChannelModulationArgs;
  using Shared = NoSharedMemory;
  static constexpr int kPhases = 1;
  static constexpr int kResident = 3;

  template <int kPhase>
  SAVL_HOST_DEVICE static void phase(const Args& args, int64_t block, int thread, Shared&) {
    ChannelModulationPlace places[2];
    Lanes<S, S> attended[2], gamma[2];
    Lanes<S, R> grad[2];
    SAVL_UNROLL
    for (int k = 0; k < 2; ++k) {
      places[k] = channel_modulation_place<S>(args, block, thread, k);
      const auto& [row, channel, access] = places[k];
      if (access.count == 0) continue;
      attended[k].load(args.attended, row * args.attended_stride + channel, access);
      gamma[k].load(args.gamma, row * args.gamma_stride + channel, access);
      grad[k].load(args.grad_out, row * args.grad_out_stride + channel, access);
    }
    SAVL_UNROLL
    for (int k = 0; k < 2; ++k) {
      if (places[k].access.count == 0) continue;
      Lanes<S, S> grad_attended, grad_gamma;
      SAVL_UNROLL
      for (int pair = 0; pair < kLanes<S>; pair += 2) {
        float to_attended[2], to_gamma[2];
        SAVL_UNROLL
        for (int which = 0; which < 2; ++which) {
          const int lane = pair + which;
          const ModulationGradients<float> gradients =
              modulation_gradients(grad[k].at(lane), attended[k].at(lane), gamma[k].at(lane));
          to_attended[which] = gradients.attended;
          to_gamma[which] = gradients.gamma;
        }
        grad_attended.set(pair, to_attended);
        grad_gamma.set(pair, to_gamma);
      }
      const int64_t at = places[k].row * args.channels + places[k].channel;
      grad_attended.store(args.grad_attended, at, places[k].access);
      grad_gamma.store(args.grad_gamma, at, places[k].access);
    }
  }
};

// Calls `run.operator()<S, R>()` with the dtypes of attended and residual.
template <typename Run>
auto dispatch_channel_modulation_dtypes(const ChannelModulationArgs& args, const Run& run) {
  switch (args.storage) {
    case Storage::kBFloat16:
      return args.residual_is_float ? run.template operator()<BFloat16, float>()
                                    : run.template operator()<BFloat16, BFloat16>();
    case Storage::kFloat16:
      return args.residual_is_float ? run.template operator()<Float16, float>()
                                    : run.template operator()<Float16, Float16>();
    default:
      return run.template operator()<float, float>();
  }
}

// Calls `launch(kernel, args, blocks)` with the instance of the kernel for the dtypes.
template <typename Launch>
auto dispatch_channel_modulation(const ChannelModulationArgs& args, const Launch& launch) {
  return dispatch_channel_modulation_dtypes(args, [&]<typename S, typename R>() {
    return args.beta != nullptr ? launch(ChannelModulationForward<S, R, true>{}, args, args.blocks())
                                : launch(ChannelModulationForward<S, R, false>{}, args, args.blocks());
  });
}

template <typename Launch>
auto dispatch_channel_modulation_backward(const ChannelModulationArgs& args, const Launch& launch) {
  return dispatch_channel_modulation_dtypes(
      args, [&]<typename S, typename R>() { return launch(ChannelModulationBackward<S, R>{}, args, args.blocks()); });
}

}  // namespace savl::gpu
