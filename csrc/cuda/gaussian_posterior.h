// The Gaussian posterior on CUDA: its arguments, how the work is cut into blocks, and what the forward and the backward
// kernel share. A kernel is a struct whose `phase` functions say what one thread of a block does. All threads of a
// block finish a phase before any of them begins the next. csrc/twin runs the same phases on a CPU.
//
// Bytes per element for float32 and for 16 bits. Maps have 4 bytes per pixel, which is 4 / R bytes per element:
//   forward, no noise or seeded   8 (+ 4 for the sample)    4 (+ 2)     and 2 maps written
//   forward, eps                 16                         8           and 2 maps written
//   backward, all gradients      24                        12           and 2 maps read
// An H100 moves 3.35 TB/s: with R = 64 and 16 bits, the forward of a 512 x 512 image takes no less than 20 us without
// noise and 41 us with eps, its backward 61 us. The arithmetic of an element takes about forty instructions (an
// estimate). In the time in which an H100 moves 4 bytes it issues about 34 instructions, for 8 bytes about 68.
// Arithmetic may therefore limit 16 bits without noise; memory limits everything else. Seeded noise adds about forty
// operations in double per element, and twice as many where the elements of a chunk are not consecutive in the stream.
//
// Launch shapes: blocks of 256 threads, one tile of pixels each. Planar: 8, 16 or 32 threads side by side along the
// pixels, 16 bytes of each channel per thread, and 32, 16 or 8 such rows of threads, among which the channels are
// divided. Interleaved: about 1024 slots of 16 bytes, four per thread. In both layouts, shared memory adds up the
// channels in a fixed order that depends on shapes alone: results have the same bits on every run and on every GPU.
#pragma once

#include <cstdint>

#include "compiler.h"
#include "cuda/elements.h"
#include "field.h"
#include "gaussian_posterior_math.h"
#include "philox.h"

namespace savl::gpu {

enum class NoiseSource : int { kNone, kGiven, kDrawn };

// Statistics of a run of pixels, in double: sums over a whole image would lose too much precision in float.
struct Moments {
  double mean, squares;  // squares: sum of squared differences from the mean
};

// `planar`: pixel_stride is 1 in every field; otherwise channel_stride is.
struct GaussianPosteriorArgs {
  Storage storage;
  NoiseSource noise;
  bool planar;
  Field mu, logvar;
  Field eps;  // used where noise is kGiven
  uint64_t seed, offset;
  Field sample;      // written; data null where there is no noise
  float* kl;         // (B, pixels), written
  float* variance;   // (B, pixels), written
  Moments* moments;  // (B, tiles), written
  int64_t batch, channels, pixels;

  // Backward only; a null gradient is zero.
  Field grad_sample;                     // dtype as mu, same layout
  const float* grad_kl;                  // (B, pixels)
  const float* grad_variance;            // (B, pixels), with the contributions of severity and statistics
  Field grad_mu, grad_logvar, grad_eps;  // written, dtype as mu; data of eps null where not wanted

  // Set by `plan`.
  bool whole;        // every chunk is 16 aligned bytes
  int lanes;         // planar: threads side by side along the pixels
  int groups;        // partial sums per pixel: rows of threads (planar) or slots (interleaved)
  int slot_inverse;  // 2^20 / groups, rounded up
  int64_t vectors;   // interleaved: chunks of a pixel
  int tile;          // pixels of a block
  int64_t tiles;     // blocks of an image

  int64_t blocks() const { return batch * tiles; }
};

constexpr int kSlots = 4 * kThreads;     // of a block, interleaved
constexpr int kPartials = 8 * kThreads;  // at most: planar with 8 lanes a chunk
constexpr int64_t kEnoughBlocks = 1056;  // eight blocks for each multiprocessor of an H100

inline bool is_whole(const Field& field, int64_t batch, bool planar, int lanes) {
  return field.data == nullptr || (is_aligned(field.data) && (batch == 1 || field.batch_stride % lanes == 0) &&
                                   (planar ? field.channel_stride : field.pixel_stride) % lanes == 0);
}

// Cuts the work into blocks.
inline void plan(GaussianPosteriorArgs& args) {
  const int chunk = args.storage == Storage::kFloat32 ? 4 : 8;
  args.whole = (args.planar ? args.pixels : args.channels) % chunk == 0 && is_aligned(args.grad_kl) &&
               is_aligned(args.grad_variance);
  for (const Field* field : {&args.mu, &args.logvar, &args.eps, &args.sample, &args.grad_sample, &args.grad_mu,
                             &args.grad_logvar, &args.grad_eps}) {
    args.whole = args.whole && is_whole(*field, args.batch, args.planar, chunk);
  }
  args.vectors = (args.channels + chunk - 1) / chunk;
  if (args.planar) {
    // As many lanes as leave enough blocks. 8 lanes of 16 bytes are one cache line of 128 bytes.
    args.lanes = 32;
    while (args.lanes > 8 && (args.batch * args.pixels / (args.lanes * chunk) < kEnoughBlocks)) args.lanes /= 2;
    args.groups = kThreads / args.lanes;
    args.tile = args.lanes * chunk;
  } else {
    args.lanes = 1;
    args.groups = static_cast<int>(args.vectors < kThreads ? args.vectors : kThreads);
    args.tile = kSlots / args.groups;
  }
  args.slot_inverse = ((1 << 20) + args.groups - 1) / args.groups;
  args.tiles = (args.pixels + args.tile - 1) / args.tile;
}

template <typename S>
SAVL_HOST_DEVICE const S* element(const Field& field, int64_t batch, int64_t channel, int64_t pixel) {
  return static_cast<const S*>(field.data) + batch * field.batch_stride + channel * field.channel_stride +
         pixel * field.pixel_stride;
}

template <typename S>
SAVL_HOST_DEVICE S* writable(const Field& field, int64_t batch, int64_t channel, int64_t pixel) {
  return const_cast<S*>(element<S>(field, batch, channel, pixel));
}

// The pixels of a block.
struct Tile {
  int64_t batch, first;
  int count;

  SAVL_HOST_DEVICE Tile(const GaussianPosteriorArgs& args, int64_t block) {
    batch = block / args.tiles;
    first = (block - batch * args.tiles) * args.tile;
    count = args.pixels - first < args.tile ? static_cast<int>(args.pixels - first) : args.tile;
  }
};

// A chunk of 16 bytes: its first element, and how the other elements lie.
struct Chunk {
  int64_t batch, channel, pixel;
  Access access;
};

// Planar: a thread keeps its pixels and goes through channels that are `groups` apart. Where chunks are not whole, the
// pixels of a thread are `lanes` apart, so that neighbouring threads still read neighbouring elements.
template <typename S>
SAVL_HOST_DEVICE Chunk planar_chunk(const GaussianPosteriorArgs& args, const Tile& tile, int thread) {
  const int lane = thread & (args.lanes - 1);
  const int local = args.whole ? lane * kLanes<S> : lane;
  const int step = args.whole ? 1 : args.lanes;
  const int left = (tile.count - local + step - 1) / step;
  return {tile.batch, thread / args.lanes, tile.first + local, {args.whole && left > 0, left > 0 ? left : 0, step}};
}

// Interleaved: a slot keeps its pixel and goes through chunks of channels that are `groups` chunks apart.
template <typename S>
SAVL_HOST_DEVICE Chunk interleaved_chunk(const GaussianPosteriorArgs& args, const Tile& tile, int slot) {
  const int pixel = static_cast<int>(static_cast<uint32_t>(slot) * static_cast<uint32_t>(args.slot_inverse) >> 20);
  const int64_t channel = static_cast<int64_t>(slot - pixel * args.groups) * kLanes<S>;
  const int64_t left = pixel < tile.count ? args.channels - channel : 0;
  return {tile.batch,
          channel,
          tile.first + pixel,
          {args.whole && left > 0,
           left < 0           ? 0
           : left < kLanes<S> ? static_cast<int>(left)
                              : kLanes<S>,
           1}};
}

// Drops the first lane of a chunk and appends one.
template <typename S>
SAVL_HOST_DEVICE void shift_in(Words& words, S last) {
  SAVL_UNROLL
  for (int index = 0; index < 4; ++index) {
    const uint32_t next = index < 3 ? words.word[(index + 1) % 4] : element_bits(last);
    words.word[index] = sizeof(S) == 4 ? next : words.word[index] >> 16 | next << 16;
  }
}

// The noise of a chunk, given or drawn, and rounded to the dtype of the field as the eager path rounds it. The loops
// around the generator are not unrolled, because its code is long.
template <typename S, NoiseSource kNoise, bool kPlanar>
SAVL_HOST_DEVICE Words noise_of(const GaussianPosteriorArgs& args, const Chunk& chunk) {
  if constexpr (kNoise == NoiseSource::kGiven) {
    return load_chunk(element<S>(args.eps, chunk.batch, chunk.channel, chunk.pixel), chunk.access);
  }
  Words words = {};
  if constexpr (kNoise == NoiseSource::kDrawn) {
    uint64_t number = (chunk.batch * args.channels + chunk.channel) * args.pixels + chunk.pixel;
    if (kPlanar && chunk.access.whole) {  // a chunk is one or two counters
      SAVL_NO_UNROLL
      for (int first = 0; first < kLanes<S>; first += 4) {
        float four[4];
        standard_normals(args.offset + (number + first) / 4, args.seed, four);
        SAVL_UNROLL
        for (int lane = 0; lane < 4; ++lane) shift_in(words, narrow<S>(four[lane]));
      }
    } else {
      const int64_t step = kPlanar ? chunk.access.step : args.pixels;
      SAVL_NO_UNROLL
      for (int lane = 0; lane < kLanes<S>; ++lane, number += step) {
        shift_in(words, narrow<S>(standard_normal(number, args.offset, args.seed)));
      }
    }
  }
  return words;
}

// Interleaved: moves on to the next chunk of the same slot. Where there is none, returns false and leaves an empty
// chunk.
template <typename S>
SAVL_HOST_DEVICE bool advance(const GaussianPosteriorArgs& args, Chunk& chunk) {
  if (chunk.access.count == 0) return false;
  chunk.channel += static_cast<int64_t>(args.groups) * kLanes<S>;
  const int64_t left = args.channels - chunk.channel;
  chunk.access.count = left < 0 ? 0 : left < kLanes<S> ? static_cast<int>(left) : kLanes<S>;
  return chunk.access.count > 0;
}

// Calls `launch(kernel, args, blocks)` with the instance of `Kernel`, which is the forward or the backward kernel, for
// the dtype, the noise and the layout.
template <template <typename, NoiseSource, bool> typename Kernel, typename Launch>
auto dispatch_gaussian_posterior(const GaussianPosteriorArgs& args, const Launch& launch) {
  const auto with_noise = [&]<typename S, NoiseSource kNoise>() {
    return args.planar ? launch(Kernel<S, kNoise, true>{}, args, args.blocks())
                       : launch(Kernel<S, kNoise, false>{}, args, args.blocks());
  };
  const auto with_storage = [&]<typename S>() {
    switch (args.noise) {
      case NoiseSource::kGiven:
        return with_noise.template operator()<S, NoiseSource::kGiven>();
      case NoiseSource::kDrawn:
        return with_noise.template operator()<S, NoiseSource::kDrawn>();
      default:
        return with_noise.template operator()<S, NoiseSource::kNone>();
    }
  };
  switch (args.storage) {
    case Storage::kBFloat16:
      return with_storage.template operator()<BFloat16>();
    case Storage::kFloat16:
      return with_storage.template operator()<Float16>();
    default:
      return with_storage.template operator()<float>();
  }
}

}  // namespace savl::gpu
