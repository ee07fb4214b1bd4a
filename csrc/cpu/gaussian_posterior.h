// The Gaussian posterior: one pass over mu and logvar (and eps) computes the sample, the divergence and the variance of
// a block of pixels, whose sums stay in the first-level cache while the kernel goes through the channels. For each
// float32 element it reads 8 bytes (12 with eps), writes 4 where there is noise, and takes one exponential. The
// mathematics of an element is in gaussian_posterior_math.h, except that of float64; this file moves the data.
#pragma once

#include <cstdint>

#include "cpu/kernel.h"
#include "cpu/simd.h"
#include "field.h"
#include "gaussian_posterior_math.h"
#include "philox.h"

namespace savl::cpu {

// For S and T see cpu/kernel.h. A task is a block of pixels of one image. `planar`: pixel_stride is 1 in every field;
// otherwise channel_stride is.
struct GaussianPosteriorArgs {
  Field mu, logvar;
  Field eps;  // data null where there is no noise or it is seeded
  bool seeded;
  uint64_t seed, offset;
  Field sample;    // written; data null where there is no noise
  void* kl;        // T (B, pixels), written
  void* variance;  // T (B, pixels), written
  int64_t batch, channels, pixels;
  bool planar;

  // Backward only; a null gradient is zero.
  Field grad_sample;                     // dtype as mu, same layout
  const void* grad_kl;                   // T (B, pixels)
  const void* grad_variance;             // T (B, pixels), with the contributions of severity and statistics
  Field grad_mu, grad_logvar, grad_eps;  // written, dtype as mu; data of eps null where not wanted

  static constexpr int64_t kBlock = 1024;  // pixels of one task: a page of a channel
  int64_t block() const { return pixels < kBlock ? pixels : kBlock; }
  int64_t blocks() const { return (pixels + kBlock - 1) / kBlock; }
  int64_t tasks() const { return batch * blocks(); }
};

}  // namespace savl::cpu

SAVL_BEGIN_KERNELS

using savl::posterior_terms;  // for float32; the overload below would hide it
SAVL_INLINE PosteriorTerms<Vec<double>> posterior_terms(Vec<double> logvar) {
  const Vec<double> less_one = exponential_minus_one(logvar);
  return {exponential(logvar * 0.5), exponential(logvar), less_one, less_one - logvar};
}

template <typename S>
SAVL_INLINE const S* element(const Field& field, int64_t batch, int64_t channel, int64_t pixel) {
  return static_cast<const S*>(field.data) + batch * field.batch_stride + channel * field.channel_stride +
         pixel * field.pixel_stride;
}

// A vector rounded to the dtype of the field, because the eager path rounds its noise too.
template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE Vec<T> rounded(Vec<T> value) {
  S lanes[kWidth<T>];
  store_narrow(lanes, value);
  return load_wide(lanes);
}

// Draws the noise of `count` consecutive elements from element number `first` on, counted in row-major order.
template <typename T>
SAVL_NOINLINE void seeded_noise(const GaussianPosteriorArgs& args, int64_t first, int64_t count, T* noise) {
  float four[4];
  uint64_t drawn = ~uint64_t{0};
  for (int64_t n = first; n < first + count; ++n) {
    const uint64_t block = static_cast<uint64_t>(n) / 4;
    if (block != drawn) standard_normals(args.offset + block, args.seed, four);
    drawn = block;
    noise[n - first] = static_cast<T>(four[n % 4]);
  }
}

enum class NoiseSource { kNone, kGiven, kDrawn };

// The noise along a line of elements: eps, or numbers that were drawn before and lie `step` apart. Seeded noise is
// drawn channel by channel, which is the order of the stream, and read in the order of the layout.
template <typename S, NoiseSource kSource>
struct NoiseLine {
  using T = Arithmetic<S>;
  const S* eps = nullptr;
  const T* drawn = nullptr;
  int64_t step = 1;

  SAVL_INLINE Vec<T> at(int64_t i, int64_t lanes) const {
    if constexpr (kSource == NoiseSource::kGiven) return load_some(eps + i, lanes);
    T values[kWidth<T>] = {};
    for (int64_t lane = 0; lane < lanes; ++lane) values[lane] = drawn[(i + lane) * step];
    return rounded<S>(load(values));
  }
};

// The block of pixels of a task.
template <typename S>
struct PosteriorBlock {
  const GaussianPosteriorArgs& args;
  int64_t batch, first, count;  // pixels [first, first + count) of an image
  Arithmetic<S>* drawn;         // (channels, args.block()) seeded noise

  const S* input(const Field& field, int64_t channel, int64_t pixel) const {
    return element<S>(field, batch, channel, first + pixel);
  }
  S* output(const Field& field, int64_t channel, int64_t pixel) const {
    return field.data == nullptr ? nullptr : const_cast<S*>(input(field, channel, pixel));
  }
  int64_t line_step(const Field& field) const { return args.planar ? field.channel_stride : field.pixel_stride; }
  template <NoiseSource kSource>
  NoiseLine<S, kSource> noise(int64_t channel, int64_t pixel) const {
    if constexpr (kSource == NoiseSource::kNone) return {};
    if constexpr (kSource == NoiseSource::kGiven) return {input(args.eps, channel, pixel), nullptr, 1};
    return {nullptr, drawn + channel * args.block() + pixel, args.planar ? 1 : args.block()};
  }
};

// Works on one line of elements, along pixels or along channels: writes the sample where there is noise, and calls
// `take(i, lanes, divergence, variance)` for each vector. The divergence includes mu^2.
template <NoiseSource kSource, typename S, typename Take>
SAVL_INLINE void posterior_line(const PosteriorBlock<S>& block, int64_t channel, int64_t pixel, int64_t count,
                                const Take& take) {
  using T = Arithmetic<S>;
  const S* mu_line = block.input(block.args.mu, channel, pixel);
  const S* logvar_line = block.input(block.args.logvar, channel, pixel);
  S* sample_line = block.output(block.args.sample, channel, pixel);
  const auto noise = block.template noise<kSource>(channel, pixel);
  for_vectors<T>(count, [&](int64_t i, int64_t lanes) SAVL_ALWAYS_INLINE {
    // The next line begins on another page, which the processor does not prefetch by itself.
    prefetch_after(mu_line + i, block.line_step(block.args.mu));
    prefetch_after(logvar_line + i, block.line_step(block.args.logvar));
    if constexpr (kSource == NoiseSource::kGiven) prefetch_after(noise.eps + i, block.line_step(block.args.eps));
    const Vec<T> mu = load_some(mu_line + i, lanes);
    const PosteriorTerms<Vec<T>> terms = posterior_terms(load_some(logvar_line + i, lanes));
    if constexpr (kSource != NoiseSource::kNone) {
      store_some(sample_line + i, sample_of(mu, terms, noise.at(i, lanes)), lanes);
    }
    take(i, lanes, divergence_of(mu, terms), terms.variance);
  });
}

// Channels that are added up before they are added to the sum, which keeps rounding errors small.
constexpr int kChannelGroup = 8;

// Channel by channel along the pixels, which is the order of memory. Rows of different channels are often a power of
// two apart: read side by side, they would evict each other from the cache.
template <NoiseSource kSource, typename S, typename T = Arithmetic<S>>
SAVL_INLINE void posterior_block_planar(const PosteriorBlock<S>& block) {
  const GaussianPosteriorArgs& args = block.args;
  constexpr int64_t kBlock = GaussianPosteriorArgs::kBlock;
  T kl[kBlock] = {}, variance[kBlock] = {};              // of all earlier groups
  T group_kl[kBlock] = {}, group_variance[kBlock] = {};  // of the current group
  for (int64_t c = 0; c < args.channels; ++c) {
    posterior_line<kSource>(block, c, 0, block.count,
                            [&](int64_t p, int64_t, Vec<T> divergence, Vec<T> v) SAVL_ALWAYS_INLINE {
                              store(group_kl + p, load(group_kl + p) + divergence);
                              store(group_variance + p, load(group_variance + p) + v);
                            });
    if ((c + 1) % kChannelGroup != 0 && c + 1 != args.channels) continue;
    for (int64_t p = 0; p < block.count; p += kWidth<T>) {
      store(kl + p, load(kl + p) + load(group_kl + p));
      store(variance + p, load(variance + p) + load(group_variance + p));
      store(group_kl + p, Vec<T>{});
      store(group_variance + p, Vec<T>{});
    }
  }
  const T channels = static_cast<T>(args.channels);
  T* kl_out = static_cast<T*>(args.kl) + block.batch * args.pixels + block.first;
  T* variance_out = static_cast<T*>(args.variance) + block.batch * args.pixels + block.first;
  for (int64_t p = 0; p < block.count; ++p) {
    kl_out[p] = kl[p] * T(0.5);
    variance_out[p] = variance[p] / channels;
  }
}

template <NoiseSource kSource, typename S, typename T = Arithmetic<S>>
SAVL_INLINE void posterior_block_interleaved(const PosteriorBlock<S>& block) {
  const GaussianPosteriorArgs& args = block.args;
  const T channels = static_cast<T>(args.channels);
  for (int64_t pixel = 0; pixel < block.count; ++pixel) {
    Vec<T> divergence_sum{}, variance_sum{};
    T divergence_rest = 0, variance_rest = 0;
    posterior_line<kSource>(block, 0, pixel, args.channels,
                            [&](int64_t, int64_t lanes, Vec<T> divergence, Vec<T> v) SAVL_ALWAYS_INLINE {
                              if (lanes == kWidth<T>) {
                                divergence_sum += divergence;
                                variance_sum += v;
                                return;
                              }
                              for (int64_t lane = 0; lane < lanes; ++lane) {
                                divergence_rest += divergence[lane];
                                variance_rest += v[lane];
                              }
                            });
    const int64_t at = block.batch * args.pixels + block.first + pixel;
    static_cast<T*>(args.kl)[at] = (sum_of<T>(divergence_sum) + divergence_rest) * T(0.5);
    static_cast<T*>(args.variance)[at] = (sum_of<T>(variance_sum) + variance_rest) / channels;
  }
}

// Vector i of a line of pixels, or the one pixel to which a line of channels belongs.
template <bool kPlanar, typename T>
SAVL_INLINE Vec<T> of_pixels(const T* line, int64_t i, int64_t lanes) {
  return kPlanar ? load_some(line + i, lanes) : broadcast(*line);
}

// The gradients of one line of elements. Those of divergence and variance are one number per pixel: the line runs along
// pixels (`kPlanar`), or all of it belongs to one pixel.
template <NoiseSource kSource, bool kPlanar, typename S>
SAVL_INLINE void posterior_line_backward(const PosteriorBlock<S>& block, int64_t channel, int64_t pixel,
                                         int64_t count) {
  using T = Arithmetic<S>;
  const GaussianPosteriorArgs& args = block.args;
  const T channels = static_cast<T>(args.channels);
  const S* mu_line = block.input(args.mu, channel, pixel);
  const S* logvar_line = block.input(args.logvar, channel, pixel);
  const S* sample_line = block.output(args.grad_sample, channel, pixel);
  S* grad_mu_line = block.output(args.grad_mu, channel, pixel);
  S* grad_logvar_line = block.output(args.grad_logvar, channel, pixel);
  S* grad_eps_line = block.output(args.grad_eps, channel, pixel);
  const int64_t at = block.batch * args.pixels + block.first + pixel;
  const T* kl_line = args.grad_kl == nullptr ? nullptr : static_cast<const T*>(args.grad_kl) + at;
  const T* variance_line = args.grad_variance == nullptr ? nullptr : static_cast<const T*>(args.grad_variance) + at;
  const auto noise = block.template noise<kSource>(channel, pixel);
  for_vectors<T>(count, [&](int64_t i, int64_t lanes) SAVL_ALWAYS_INLINE {
    const Vec<T> mu = load_some(mu_line + i, lanes);
    const PosteriorTerms<Vec<T>> terms = posterior_terms(load_some(logvar_line + i, lanes));
    PosteriorGradients<Vec<T>> gradients;
    if (kl_line != nullptr) gradients.add_divergence(of_pixels<kPlanar>(kl_line, i, lanes), mu, terms);
    if (variance_line != nullptr) {
      gradients.add_variance(of_pixels<kPlanar>(variance_line, i, lanes) / channels, terms);
    }
    if constexpr (kSource != NoiseSource::kNone) {
      if (sample_line != nullptr) {
        const Vec<T> g = load_some(sample_line + i, lanes);
        gradients.add_sample(g, terms, noise.at(i, lanes));
        if (grad_eps_line != nullptr) store_some(grad_eps_line + i, g * terms.deviation, lanes);
      }
    }
    store_some(grad_mu_line + i, gradients.mu, lanes);
    store_some(grad_logvar_line + i, gradients.logvar, lanes);
  });
}

template <NoiseSource kSource, typename S>
SAVL_INLINE void posterior_block_backward(const PosteriorBlock<S>& block) {
  if (block.args.planar) {
    for (int64_t c = 0; c < block.args.channels; ++c) {
      posterior_line_backward<kSource, true>(block, c, 0, block.count);
    }
  } else {
    for (int64_t pixel = 0; pixel < block.count; ++pixel) {
      posterior_line_backward<kSource, false>(block, 0, pixel, block.args.channels);
    }
  }
}

// Draws the noise of each block of tasks [begin, end), and calls `work(block)`.
template <typename S, typename Work>
SAVL_INLINE void for_posterior_blocks(const GaussianPosteriorArgs& args, int64_t begin, int64_t end, const Work& work) {
  using T = Arithmetic<S>;
  const int64_t drawn = args.seeded ? args.channels * args.block() : 1;
  Scratch scratch(Scratch::bytes<T>(drawn));
  PosteriorBlock<S> block{args, 0, 0, 0, scratch.take<T>(drawn)};
  for (int64_t task = begin; task < end; ++task) {
    block.batch = task / args.blocks();
    block.first = task % args.blocks() * GaussianPosteriorArgs::kBlock;
    block.count = smaller(GaussianPosteriorArgs::kBlock, args.pixels - block.first);
    for (int64_t c = 0; args.seeded && c < args.channels; ++c) {
      seeded_noise(args, (block.batch * args.channels + c) * args.pixels + block.first, block.count,
                   block.drawn + c * args.block());
    }
    work(block);
  }
}

// Calls `work.operator()<kSource>()` with the source of the noise.
template <typename Work>
SAVL_INLINE void with_noise_source(const GaussianPosteriorArgs& args, const Work& work) {
  if (args.seeded) {
    work.template operator()<NoiseSource::kDrawn>();
  } else if (args.eps.data != nullptr) {
    work.template operator()<NoiseSource::kGiven>();
  } else {
    work.template operator()<NoiseSource::kNone>();
  }
}

template <typename S>
void gaussian_posterior_kernel(const GaussianPosteriorArgs& args, int64_t begin, int64_t end) {
  with_noise_source(args, [&]<NoiseSource kSource>() {
    for_posterior_blocks<S>(args, begin, end, [&](const PosteriorBlock<S>& block) {
      if (args.planar) {
        posterior_block_planar<kSource>(block);
      } else {
        posterior_block_interleaved<kSource>(block);
      }
    });
  });
}

template <typename S>
void gaussian_posterior_backward_kernel(const GaussianPosteriorArgs& args, int64_t begin, int64_t end) {
  with_noise_source(args, [&]<NoiseSource kSource>() {
    for_posterior_blocks<S>(args, begin, end,
                            [](const PosteriorBlock<S>& block) { posterior_block_backward<kSource>(block); });
  });
}

SAVL_END_KERNELS
