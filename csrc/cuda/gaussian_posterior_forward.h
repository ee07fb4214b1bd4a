// The forward kernel of the Gaussian posterior; see gaussian_posterior.h.
#pragma once

#include <cstdint>

#include "compiler.h"
#include "cuda/elements.h"
#include "cuda/gaussian_posterior.h"
#include "gaussian_posterior_math.h"

namespace savl::gpu {

// The partial sums of the pixels of a block. Those of one pixel are `group_step` apart.
struct PosteriorShared {
  float kl[kPartials], variance[kPartials];
  double sums[2][kWarp];
};

struct PartialLayout {
  int pixel_step, group_step;

  // An odd step between the pixels of an interleaved tile avoids bank conflicts between the threads that add them up.
  SAVL_HOST_DEVICE explicit PartialLayout(const GaussianPosteriorArgs& args)
      : pixel_step(args.planar ? 1 : args.groups | 1), group_step(args.planar ? args.tile : 1) {}
};

// Phases: each thread adds up its share of the channels; one thread per pixel adds up the shares and writes the maps; a
// warp adds up the variances of the pixels and their squares; one thread writes the moments of the tile.
template <typename S, NoiseSource kNoise, bool kPlanar>
struct GaussianPosteriorForward {
  using Args = GaussianPosteriorArgs;
  using Shared = PosteriorShared;
  static constexpr int kPhases = 4;
  // Chunks of each input that a thread loads at a time. Where noise is drawn, memory is not the limit.
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
        shared.variance[at] = variance;  // no other thread reads or writes the partial sums of this pixel
      }
    } else if constexpr (kPhase == 2) {
      if (thread >= kWarp) return;
      // Differences from one of the variances: neither sum suffers from cancellation.
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
  // Four sums side by side: a single sum over many shares would round once for each share.
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

  // Writes the sample of a chunk, and calls `take(lane, divergence, variance)` for each of its elements.
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
        // There is more than one round where a pixel has more chunks than a block has threads.
        bool more = false;
        SAVL_UNROLL
        for (int k = 0; k < kAtOnce; ++k) more = advance<S>(args, chunks[k]) || more;
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
};

}  // namespace savl::gpu
