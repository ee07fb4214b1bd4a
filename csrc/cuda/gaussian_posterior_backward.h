// The backward kernel of the Gaussian posterior; see gaussian_posterior.h.
#pragma once

#include <cstdint>

#include "compiler.h"
#include "cuda/elements.h"
#include "cuda/gaussian_posterior.h"
#include "gaussian_posterior_math.h"

namespace savl::gpu {

// Every element is independent of the others.
template <typename S, NoiseSource kNoise, bool kPlanar>
struct GaussianPosteriorBackward {
  using Args = GaussianPosteriorArgs;
  using Shared = NoSharedMemory;
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
        } while (advance<S>(args, chunk));
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
