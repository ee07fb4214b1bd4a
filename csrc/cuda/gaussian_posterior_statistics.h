// The statistics of the Gaussian posterior: from the moments of tiles to the moments of an image, and from these to the
// severity map. There are no atomics: every block that needs the moments of an image adds them up itself, in the same
// order.
//
// Reads the variance map, which the forward kernel has just written to the cache, and writes the severity map: 8 bytes
// per pixel. Blocks of 256 threads, 1024 pixels each.
#pragma once

#include <cstdint>

#include "compiler.h"
#include "cuda/elements.h"
#include "cuda/gaussian_posterior.h"
#include "gaussian_posterior_math.h"

namespace savl::gpu {

constexpr int kMergedAtOnce = 2048;  // moments that one block adds up

struct StatisticsArgs {
  const Moments* moments;  // (B, count), of `span` pixels each; the last of an image may have fewer
  int64_t batch, pixels, count, span;
  Moments* merged;  // (B, merged_count), written by `MergeMoments`
  int64_t merged_count;

  // `NormaliseSeverity` only
  const float* variance;  // (B, pixels)
  float* severity;        // (B, pixels), written
  float *mean, *var;      // (B), written
  float severity_eps, severity_max;
  int64_t tiles;  // blocks of an image
  bool whole;     // chunks are aligned
};

struct StatisticsShared {
  double sums[kThreads], warp_sums[kWarp];
  double mean, squares;
};

// Computes the mean and the sum of squared differences of moments [begin, end) of an image, in six phases.
struct MomentsOfRange {
  static constexpr int kPhases = 6;

  template <int kPhase>
  SAVL_HOST_DEVICE static void phase(const StatisticsArgs& args, int64_t batch, int64_t begin, int64_t end, int thread,
                                     StatisticsShared& shared) {
    if constexpr (kPhase == 0 || kPhase == 3) {
      double sum = 0;
      for (int64_t index = begin + thread; index < end; index += kThreads) {
        const Moments moments = args.moments[batch * args.count + index];
        const double pixels = static_cast<double>(pixels_before(args, index + 1) - pixels_before(args, index));
        if constexpr (kPhase == 0) {
          sum += pixels * moments.mean;
        } else {
          const double difference = moments.mean - shared.mean;
          sum += moments.squares + pixels * difference * difference;
        }
      }
      shared.sums[thread] = sum;
    } else if constexpr (kPhase == 1 || kPhase == 4) {
      if (thread >= kWarp) return;
      double sum = 0;
      for (int other = thread; other < kThreads; other += kWarp) sum += shared.sums[other];
      shared.warp_sums[thread] = sum;
    } else {
      if (thread != 0) return;
      double sum = 0;
      for (const double warp_sum : shared.warp_sums) sum += warp_sum;
      if constexpr (kPhase == 2) {
        shared.mean = sum / static_cast<double>(pixels_before(args, end) - pixels_before(args, begin));
      } else {
        shared.squares = sum;
      }
    }
  }

 private:
  SAVL_HOST_DEVICE static int64_t pixels_before(const StatisticsArgs& args, int64_t index) {
    const int64_t pixels = index * args.span;
    return pixels < args.pixels ? pixels : args.pixels;
  }
};

// Merges the moments of up to `kMergedAtOnce` runs into those of one run. Needed for images of more runs than one block
// adds up.
struct MergeMoments {
  using Args = StatisticsArgs;
  using Shared = StatisticsShared;
  static constexpr int kPhases = MomentsOfRange::kPhases + 1;
  static constexpr int kResident = 3;

  template <int kPhase>
  SAVL_HOST_DEVICE static void phase(const Args& args, int64_t block, int thread, Shared& shared) {
    const int64_t batch = block / args.merged_count, begin = block % args.merged_count * kMergedAtOnce;
    const int64_t end = begin + kMergedAtOnce < args.count ? begin + kMergedAtOnce : args.count;
    if constexpr (kPhase < MomentsOfRange::kPhases) {
      MomentsOfRange::phase<kPhase>(args, batch, begin, end, thread, shared);
    } else {
      if (thread == 0) args.merged[block] = {shared.mean, shared.squares};
    }
  }
};

struct NormaliseSeverity {
  using Args = StatisticsArgs;
  using Shared = StatisticsShared;
  static constexpr int kPhases = MomentsOfRange::kPhases + 1;
  static constexpr int kResident = 3;
  static constexpr int kTile = 4 * kThreads;

  template <int kPhase>
  SAVL_HOST_DEVICE static void phase(const Args& args, int64_t block, int thread, Shared& shared) {
    const int64_t batch = block / args.tiles, tile = block % args.tiles;
    if constexpr (kPhase < MomentsOfRange::kPhases) {
      MomentsOfRange::phase<kPhase>(args, batch, 0, args.count, thread, shared);
    } else {
      const float mean = static_cast<float>(shared.mean);
      const float var = static_cast<float>(shared.squares / static_cast<double>(args.pixels));
      if (tile == 0 && thread == 0) {
        args.mean[batch] = mean;
        args.var[batch] = var;
      }
      const float scale = var + args.severity_eps;
      const int64_t first = tile * kTile + (args.whole ? 4 * thread : thread);
      const int64_t step = args.whole ? 1 : kThreads;
      const int64_t left = (args.pixels - first + step - 1) / step;
      if (left <= 0) return;
      const Access access{args.whole, left < 4 ? static_cast<int>(left) : 4, step};
      const Words words = load_chunk(args.variance + batch * args.pixels + first, access);
      Words severity;
      SAVL_UNROLL
      for (int lane = 0; lane < 4; ++lane) {
        const float value = severity_of(lane_of<float>(words, lane), mean, scale, args.severity_max);
        severity.word[lane] = bits_of<uint32_t>(value);
      }
      store_chunk(args.severity + batch * args.pixels + first, severity, access);
    }
  }
};

template <typename Launch>
auto dispatch_merge_moments(const StatisticsArgs& args, const Launch& launch) {
  return launch(MergeMoments{}, args, args.batch * args.merged_count);
}

template <typename Launch>
auto dispatch_normalise_severity(const StatisticsArgs& args, const Launch& launch) {
  return launch(NormaliseSeverity{}, args, args.batch * args.tiles);
}

}  // namespace savl::gpu
