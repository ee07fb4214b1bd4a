// The Gaussian posterior on CUDA: what one thread of a block does, phase by phase. All threads of a block finish a
// phase before any begins the next; csrc/twin runs the same phases on a CPU.
//
// Bytes per element (of R channels; a map is 4 bytes per pixel, 1/R of an element's share each), float32 and 16 bits:
//   forward, no noise or seeded   8 (+ 4 for the sample)    4 (+ 2)     and 2 maps written
//   forward, eps                 16                         8           and 2 maps written
//   backward, all gradients      24                        12           and 2 maps read
// An H100 moves 3.35 TB/s: with R = 64 and 16 bits, the forward of a 512 x 512 image takes no less than 20 us without
// noise and 41 us with eps, its backward 61 us. The arithmetic of an element is some forty instructions (an estimate);
// in the time that memory takes an H100 issues about 34 for 4 bytes and 68 for 8. So 16 bits without noise may be bound
// by arithmetic, everything else by memory; but seeded noise adds some forty operations in double per element, twice
// that where a chunk's elements do not follow each other in the stream.
//
// Launch shapes: blocks of 256 threads, one tile of pixels each. Planar: 8, 16 or 32 threads side by side along the
// pixels, 16 bytes of each channel per thread, and 32, 16 or 8 such rows that share the channels out. Interleaved:
// about 1024 slots of 16 bytes, four per thread. Either way sums over channels meet in shared memory in a fixed order,
// which depends on shapes alone: results have the same bits on every run, and no GPU cuts the work in its own way.
#pragma once

#include <cmath>

#include "cuda/elements.h"
#include "field.h"
#include "philox.h"
#include "severity_math.h"

namespace savl::gpu {

#include "posterior_math.h"

constexpr int kThreads = 256;
constexpr int kWarp = 32;

enum class Storage : int { kFloat32, kBFloat16, kFloat16 };
enum class NoiseSource : int { kNone, kGiven, kDrawn };

// Partial statistics of a run of pixels, in double: sums of a whole image would lose too much in float.
struct Moments {
  double mean, squares;  // squares: sum of squared differences from the mean
};

// `planar`: pixel_stride is 1 in every field; otherwise channel_stride is.
struct PosteriorArgs {
  Storage storage;
  NoiseSource noise;
  bool planar;
  Field mu, logvar;
  Field eps;  // where noise is given
  uint64_t seed, offset;
  Field sample;      // written; data null where there is no noise
  float* kl;         // (B, pixels), written
  float* variance;   // (B, pixels), written
  Moments* moments;  // (B, tiles), written
  int64_t batch, channels, pixels;

  // Backward only; a null gradient is zero.
  Field grad_sample;                     // dtype as mu, same layout
  const float* grad_kl;                  // (B, pixels)
  const float* grad_variance;            // (B, pixels), with what severity and statistics pass on
  Field grad_mu, grad_logvar, grad_eps;  // written, dtype as mu; eps's data null where not wanted

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
constexpr int64_t kEnoughBlocks = 1056;  // eight for each multiprocessor of an H100

inline bool is_whole(const Field& field, int64_t batch, bool planar, int lanes) {
  return field.data == nullptr || (is_aligned(field.data) && (batch == 1 || field.batch_stride % lanes == 0) &&
                                   (planar ? field.channel_stride : field.pixel_stride) % lanes == 0);
}

// Cuts the work into blocks.
inline void plan(PosteriorArgs& args) {
  const int chunk = args.storage == Storage::kFloat32 ? 4 : 8;
  args.whole = (args.planar ? args.pixels : args.channels) % chunk == 0 && is_aligned(args.grad_kl) &&
               is_aligned(args.grad_variance);
  for (const Field* field : {&args.mu, &args.logvar, &args.eps, &args.sample, &args.grad_sample, &args.grad_mu,
                             &args.grad_logvar, &args.grad_eps}) {
    args.whole = args.whole && is_whole(*field, args.batch, args.planar, chunk);
  }
  args.vectors = (args.channels + chunk - 1) / chunk;
  if (args.planar) {
    // Rows as wide as leaves enough blocks, and no wider than the image; 128 bytes are one line of the cache.
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

  SAVL_HOST_DEVICE Tile(const PosteriorArgs& args, int64_t block) {
    batch = block / args.tiles;
    first = (block - batch * args.tiles) * args.tile;
    count = args.pixels - first < args.tile ? static_cast<int>(args.pixels - first) : args.tile;
  }
};

// The place of a chunk: its first element, and how the others lie.
struct Chunk {
  int64_t batch, channel, pixel;
  Access access;
};

// Planar: a thread keeps its pixels and goes through the channels of its row, `groups` apart. Where chunks are not
// whole its pixels lie `lanes` apart, so that neighbouring threads still read neighbouring elements.
template <typename S>
SAVL_HOST_DEVICE Chunk planar_chunk(const PosteriorArgs& args, const Tile& tile, int thread) {
  const int lane = thread & (args.lanes - 1);
  const int local = args.whole ? lane * kLanes<S> : lane;
  const int step = args.whole ? 1 : args.lanes;
  const int left = (tile.count - local + step - 1) / step;
  return {tile.batch, thread / args.lanes, tile.first + local, {args.whole && left > 0, left > 0 ? left : 0, step}};
}

// Interleaved: a slot keeps its pixel and goes through the channels, `groups` chunks apart.
template <typename S>
SAVL_HOST_DEVICE Chunk interleaved_chunk(const PosteriorArgs& args, const Tile& tile, int slot) {
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
    const uint32_t next = index < 3 ? words.word[(index + 1) % 4] : bits_from(last);
    words.word[index] = sizeof(S) == 4 ? next : words.word[index] >> 16 | next << 16;
  }
}

// The noise of a chunk, given or drawn, rounded to the dtype of the field as the eager path rounds it. The loops around
// the generator stay loops: it is long.
template <typename S, NoiseSource kNoise, bool kPlanar>
SAVL_HOST_DEVICE Words noise_of(const PosteriorArgs& args, const Chunk& chunk) {
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

// Partial sums of the block's pixels: those of one pixel lie `group_step` apart.
struct PosteriorShared {
  float kl[kPartials], variance[kPartials];
  double sums[2][kWarp];
};

struct PartialLayout {
  int pixel_step, group_step;

  // An odd step between the pixels of an interleaved tile keeps threads that walk through them off each other's banks.
  SAVL_HOST_DEVICE explicit PartialLayout(const PosteriorArgs& args)
      : pixel_step(args.planar ? 1 : args.groups | 1), group_step(args.planar ? args.tile : 1) {}
};

// Forward. Phases: each thread adds up its share of the channels; a thread per pixel adds up the shares and writes the
// maps; a warp adds up the pixels' variances and their squares; one thread writes the moments of the tile.
template <typename S, NoiseSource kNoise, bool kPlanar>
struct PosteriorForward {
  using Args = PosteriorArgs;
  using Shared = PosteriorShared;
  static constexpr int kPhases = 4;
  // Chunks of each input that a thread has under way; drawing noise takes longer than memory.
  static constexpr int kAtOnce = kNoise == NoiseSource::kDrawn ? 1 : 2;
  static constexpr int kResident = kNoise == NoiseSource::kNone ? 3 : 2;

  template <int kPhase>
  SAVL_HOST_DEVICE static void phase(const Args& args, int64_t block, int thread, Shared& shared) {
    const Tile tile(args, block);
    const PartialLayout layout(args);
    if constexpr (kPhase == 0) {
      if constexpr (kPlanar) {
        add_planar(args, tile, thread, shared);
      } else {
        add_interleaved(args, tile, thread, layout, shared);
      }
    } else if constexpr (kPhase == 1) {
      for (int pixel = thread; pixel < tile.count; pixel += kThreads) {
        const int at = pixel * layout.pixel_step;
        const float kl = sum_of_shares(shared.kl + at, layout.group_step, args.groups);
        const float variance =
            sum_of_shares(shared.variance + at, layout.group_step, args.groups) / static_cast<float>(args.channels);
        const int64_t out = tile.batch * args.pixels + tile.first + pixel;
        args.kl[out] = kl * 0.5f;
        args.variance[out] = variance;
        shared.variance[at] = variance;  // this thread alone reads and writes the pixel's partial sums
      }
    } else if constexpr (kPhase == 2) {
      if (thread >= kWarp) return;
      // Differences from one of them: neither sum cancels.
      const double centre = shared.variance[0];
      double sum = 0, squares = 0;
      for (int pixel = thread; pixel < tile.count; pixel += kWarp) {
        const double difference = shared.variance[pixel * layout.pixel_step] - centre;
        sum += difference;
        squares += difference * difference;
      }
      shared.sums[0][thread] = sum;
      shared.sums[1][thread] = squares;
    } else {
      if (thread != 0) return;
      double sum = 0, squares = 0;
      for (int lane = 0; lane < kWarp; ++lane) {
        sum += shared.sums[0][lane];
        squares += shared.sums[1][lane];
      }
      const double mean = sum / tile.count;
      const double about_mean = squares - sum * mean;
      args.moments[block] = {shared.variance[0] + mean, about_mean < 0 ? 0 : about_mean};
    }
  }

 private:
  // Four sums side by side: of many shares one sum would round as often as there are shares.
  SAVL_HOST_DEVICE static float sum_of_shares(const float* shares, int step, int count) {
    float sums[4] = {};
    for (int first = 0; first < count; first += 4) {
      SAVL_UNROLL
      for (int k = 0; k < 4; ++k) {
        if (first + k < count) sums[k] += shares[(first + k) * step];
      }
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  // Writes the sample of a chunk and calls `take(lane, divergence, variance)` for its elements.
  template <typename Take>
  SAVL_HOST_DEVICE static void work(const Args& args, const Chunk& chunk, const Words& mu, const Words& logvar,
                                    const Words& noise, const Take& take) {
    Words sample;
    SAVL_UNROLL
    for (int pair = 0; pair < kLanes<S>; pair += 2) {
      float samples[2];
      SAVL_UNROLL
      for (int k = 0; k < 2; ++k) {
        const float mean = lane_of<S>(mu, pair + k);
        const PosteriorTerms<float> terms = posterior_terms(lane_of<S>(logvar, pair + k));
        if constexpr (kNoise != NoiseSource::kNone) samples[k] = sample_of(mean, terms, lane_of<S>(noise, pair + k));
        take(pair + k, divergence_of(mean, terms), terms.variance);
      }
      if constexpr (kNoise != NoiseSource::kNone) set_pair<S>(sample, pair, samples);
    }
    if constexpr (kNoise != NoiseSource::kNone) {
      store_chunk(writable<S>(args.sample, chunk.batch, chunk.channel, chunk.pixel), sample, chunk.access);
    }
  }

  struct Loaded {
    Words mu, logvar, noise;

    SAVL_HOST_DEVICE void load(const Args& args, const Chunk& chunk) {
      mu = load_chunk(element<S>(args.mu, chunk.batch, chunk.channel, chunk.pixel), chunk.access);
      logvar = load_chunk(element<S>(args.logvar, chunk.batch, chunk.channel, chunk.pixel), chunk.access);
      noise = noise_of<S, kNoise, kPlanar>(args, chunk);
    }
  };

  SAVL_HOST_DEVICE static void add_planar(const Args& args, const Tile& tile, int thread, Shared& shared) {
    float kl[kLanes<S>] = {}, variance[kLanes<S>] = {};
    Chunk chunk = planar_chunk<S>(args, tile, thread);
    const int row = thread / args.lanes;
    if (chunk.access.count > 0) {
      for (int64_t channel = row; channel < args.channels; channel += kAtOnce * args.groups) {
        Loaded loaded[kAtOnce];
        SAVL_UNROLL
        for (int k = 0; k < kAtOnce; ++k) {
          chunk.channel = channel + k * args.groups;
          if (chunk.channel < args.channels) loaded[k].load(args, chunk);
        }
        SAVL_UNROLL
        for (int k = 0; k < kAtOnce; ++k) {
          chunk.channel = channel + k * args.groups;
          if (chunk.channel >= args.channels) continue;
          work(args, chunk, loaded[k].mu, loaded[k].logvar, loaded[k].noise, [&](int lane, float divergence, float v) {
            kl[lane] += divergence;
            variance[lane] += v;
          });
        }
      }
    }
    const int at = row * args.tile + static_cast<int>(chunk.pixel - tile.first);
    SAVL_UNROLL
    for (int lane = 0; lane < kLanes<S>; ++lane) {
      shared.kl[at + lane * static_cast<int>(chunk.access.step)] = kl[lane];
      shared.variance[at + lane * static_cast<int>(chunk.access.step)] = variance[lane];
    }
  }

  SAVL_HOST_DEVICE static void add_interleaved(const Args& args, const Tile& tile, int thread,
                                               const PartialLayout& layout, Shared& shared) {
    const int slots = args.tile * args.groups;
    for (int slot = thread; slot < slots; slot += kAtOnce * kThreads) {
      Chunk chunks[kAtOnce];
      float kl[kAtOnce] = {}, variance[kAtOnce] = {};
      SAVL_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        chunks[k] = interleaved_chunk<S>(args, tile, slot + k * kThreads);
        if (slot + k * kThreads >= slots) chunks[k].access.count = 0;
      }
      while (true) {
        Loaded loaded[kAtOnce];
        SAVL_UNROLL
        for (int k = 0; k < kAtOnce; ++k) {
          if (chunks[k].access.count > 0) loaded[k].load(args, chunks[k]);
        }
        SAVL_UNROLL
        for (int k = 0; k < kAtOnce; ++k) {
          if (chunks[k].access.count == 0) continue;
          const int count = chunks[k].access.count;
          work(args, chunks[k], loaded[k].mu, loaded[k].logvar, loaded[k].noise,
               [&](int lane, float divergence, float v) {
                 kl[k] += lane < count ? divergence : 0.0f;
                 variance[k] += lane < count ? v : 0.0f;
               });
        }
        // Pixels of more chunks than a block has threads.
        bool more = false;
        SAVL_UNROLL
        for (int k = 0; k < kAtOnce; ++k) more = advance(args, chunks[k]) || more;
        if (!more) break;
      }
      SAVL_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        const int number = slot + k * kThreads;
        if (number >= slots) continue;
        const int pixel = static_cast<int>(chunks[k].pixel - tile.first);
        const int at = pixel * layout.pixel_step + number - pixel * args.groups;
        shared.kl[at] = kl[k];
        shared.variance[at] = variance[k];
      }
    }
  }

 public:
  // To the next chunk of the same slot; false, and an empty one, where there is none.
  SAVL_HOST_DEVICE static bool advance(const Args& args, Chunk& chunk) {
    if (chunk.access.count == 0) return false;
    chunk.channel += static_cast<int64_t>(args.groups) * kLanes<S>;
    const int64_t left = args.channels - chunk.channel;
    chunk.access.count = left < 0 ? 0 : left < kLanes<S> ? static_cast<int>(left) : kLanes<S>;
    return chunk.access.count > 0;
  }
};

struct NothingShared {};

// Backward. Every element on its own.
template <typename S, NoiseSource kNoise, bool kPlanar>
struct PosteriorBackward {
  using Args = PosteriorArgs;
  using Shared = NothingShared;
  static constexpr int kPhases = 1;
  static constexpr int kResident =
      kNoise == NoiseSource::kDrawn || (kNoise == NoiseSource::kGiven && sizeof(S) == 2) ? 2 : 3;

  template <int kPhase>
  SAVL_HOST_DEVICE static void phase(const Args& args, int64_t block, int thread, Shared&) {
    const Tile tile(args, block);
    if constexpr (kPlanar) {
      Chunk chunk = planar_chunk<S>(args, tile, thread);
      if (chunk.access.count == 0) return;
      const int64_t at = chunk.batch * args.pixels + chunk.pixel;
      float to_kl[kLanes<S>] = {}, to_variance[kLanes<S>] = {};
      if (args.grad_kl != nullptr) load_floats<S>(args.grad_kl + at, chunk.access, to_kl);
      if (args.grad_variance != nullptr) load_floats<S>(args.grad_variance + at, chunk.access, to_variance);
      SAVL_UNROLL
      for (int lane = 0; lane < kLanes<S>; ++lane) to_variance[lane] /= static_cast<float>(args.channels);
      for (; chunk.channel < args.channels; chunk.channel += args.groups) {
        work(args, chunk, [&](int lane) { return to_kl[lane]; }, [&](int lane) { return to_variance[lane]; });
      }
    } else {
      const int slots = args.tile * args.groups;
      for (int slot = thread; slot < slots; slot += kThreads) {
        Chunk chunk = interleaved_chunk<S>(args, tile, slot);
        if (chunk.access.count == 0) continue;
        const int64_t at = chunk.batch * args.pixels + chunk.pixel;
        const float to_kl = args.grad_kl != nullptr ? args.grad_kl[at] : 0.0f;
        const float to_variance =
            args.grad_variance != nullptr ? args.grad_variance[at] / static_cast<float>(args.channels) : 0.0f;
        do {
          work(args, chunk, [&](int) { return to_kl; }, [&](int) { return to_variance; });
        } while (PosteriorForward<S, kNoise, kPlanar>::advance(args, chunk));
      }
    }
  }

 private:
  template <typename ToKl, typename ToVariance>
  SAVL_HOST_DEVICE static void work(const Args& args, const Chunk& chunk, const ToKl& to_kl,
                                    const ToVariance& to_variance) {
    const auto place = [&](const Field& field) { return element<S>(field, chunk.batch, chunk.channel, chunk.pixel); };
    const auto target = [&](const Field& field) { return const_cast<S*>(place(field)); };
    const bool sampled = kNoise != NoiseSource::kNone && args.grad_sample.data != nullptr;
    const Words mu = load_chunk(place(args.mu), chunk.access);
    const Words logvar = load_chunk(place(args.logvar), chunk.access);
    Words to_sample = {}, noise = {};
    if (sampled) {
      to_sample = load_chunk(place(args.grad_sample), chunk.access);
      noise = noise_of<S, kNoise, kPlanar>(args, chunk);
    }
    Words grad_mu, grad_logvar, grad_eps;
    SAVL_UNROLL
    for (int pair = 0; pair < kLanes<S>; pair += 2) {
      float to_mu[2], to_logvar[2], to_eps[2] = {};
      SAVL_UNROLL
      for (int k = 0; k < 2; ++k) {
        const int lane = pair + k;
        const float mean = lane_of<S>(mu, lane);
        const PosteriorTerms<float> terms = posterior_terms(lane_of<S>(logvar, lane));
        PosteriorGradients<float> gradients;
        if (args.grad_kl != nullptr) gradients.add_divergence(to_kl(lane), mean, terms);
        if (args.grad_variance != nullptr) gradients.add_variance(to_variance(lane), terms);
        if (sampled) {
          const float g = lane_of<S>(to_sample, lane);
          gradients.add_sample(g, terms, lane_of<S>(noise, lane));
          to_eps[k] = g * terms.deviation;
        }
        to_mu[k] = gradients.mu;
        to_logvar[k] = gradients.logvar;
      }
      set_pair<S>(grad_mu, pair, to_mu);
      set_pair<S>(grad_logvar, pair, to_logvar);
      set_pair<S>(grad_eps, pair, to_eps);
    }
    store_chunk(target(args.grad_mu), grad_mu, chunk.access);
    store_chunk(target(args.grad_logvar), grad_logvar, chunk.access);
    if (sampled && args.grad_eps.data != nullptr) store_chunk(target(args.grad_eps), grad_eps, chunk.access);
  }
};

}  // namespace savl::gpu
