// The mathematics of one element of the Gaussian posterior, and of the severity of one pixel, shared by CPU and CUDA. V
// is a vector of float32 (cpu/simd.h) or the float of one CUDA thread.
//
// One exponential per element is enough. With h = logvar / 2 and a = e^h - 1, the variance is 1 + (2 a + a^2), and the
// term e^logvar - 1 - logvar of the divergence is a^2 + 2 (a - h), which does not cancel near the prior.
#pragma once

#include "arithmetic.h"
#include "compiler.h"

SAVL_BEGIN_TARGET
namespace savl {

// e^x without its power of two: x = n ln 2 + r with |r| <= ln 2 / 2, and `excess` = e^r - 1 - r. Both r and `excess`
// are accurate where x is small, which keeps the divergence accurate near the prior.
template <typename V>
struct ExponentParts {
  V r, excess, low, high;  // e^x = (1 + r + excess) * low * high
};

template <typename V>
SAVL_HOST_DEVICE ExponentParts<V> exponent_parts(V x) {
  using Traits = ArithmeticTraits<V>;
  using Integers = typename Traits::Integers;
  // Outside this range e^x is 0 or infinity in float.
  x = Traits::lesser(V{} + 89.0f, Traits::larger(V{} - 104.0f, x));
  // The low bits of x / ln 2 + 1.5 * 2^23 are the nearest integer.
  const V shifted = x * 1.44269504088896341f + 12582912.0f;
  const V n = shifted - 12582912.0f;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2, minimax (Cephes).
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  // 2^n in two factors, so that subnormal results and results near the largest float are right.
  const Integers whole = bits_of<Integers>(shifted) - 0x4b400000;
  const Integers half = whole >> 1;
  const V low = bits_of<V>((half + 127) << 23);
  const V high = bits_of<V>((whole - half + 127) << 23);
  return {r, p * r * r, low, high};
}

template <typename V>
struct PosteriorTerms {
  V deviation, variance;  // e^h, e^logvar
  V variance_less_one;    // e^logvar - 1
  V divergence;           // e^logvar - 1 - logvar
};

template <typename V>
SAVL_HOST_DEVICE PosteriorTerms<V> posterior_terms(V logvar) {
  const V h = logvar * 0.5f;
  const ExponentParts<V> parts = exponent_parts(h);
  const V a = parts.r + parts.excess;                   // e^r - 1; r is h itself near the prior
  const V square_excess = a * a + parts.excess * 2.0f;  // e^2r - 1 - 2r
  const V square_less_one = parts.r * 2.0f + square_excess;
  const V deviation = (a + 1.0f) * parts.low * parts.high;
  const V power = parts.low * parts.high;
  const V variance = (square_less_one + 1.0f) * power * power;
  const V far = variance - 1.0f;
  const auto near = parts.r == h;
  return {deviation, variance, near ? square_less_one : far, near ? square_excess : far - logvar};
}

// The contribution of one element to twice the divergence of its pixel.
template <typename V>
SAVL_HOST_DEVICE V divergence_of(V mu, const PosteriorTerms<V>& terms) {
  return mu * mu + terms.divergence;
}

template <typename V>
SAVL_HOST_DEVICE V sample_of(V mu, const PosteriorTerms<V>& terms, V noise) {
  return mu + terms.deviation * noise;
}

// The gradients of one element: the sum of the contributions of divergence, variance and sample. A kernel adds only the
// contributions of outputs that received a gradient.
template <typename V>
struct PosteriorGradients {
  V mu{}, logvar{};

  SAVL_HOST_DEVICE void add_divergence(V grad_kl, V mu_value, const PosteriorTerms<V>& terms) {
    mu += grad_kl * mu_value;
    logvar += grad_kl * 0.5f * terms.variance_less_one;
  }
  SAVL_HOST_DEVICE void add_variance(V grad_of_mean, const PosteriorTerms<V>& terms) {
    logvar += grad_of_mean * terms.variance;
  }
  SAVL_HOST_DEVICE void add_sample(V grad_sample, const PosteriorTerms<V>& terms, V noise) {
    mu += grad_sample;
    logvar += grad_sample * noise * terms.deviation * 0.5f;
  }
};

// The severity of one pixel from its variance and the statistics of the whole image. `scale` is the variance of the
// per-pixel variance, plus epsilon.
template <typename T>
SAVL_HOST_DEVICE T severity_of(T variance, T mean, T scale, T most) {
  T value = 1 - (variance - mean) / scale;
  value = value < 0 ? 0 : value;  // NaN passes both comparisons
  return value > most ? most : value;
}

}  // namespace savl
SAVL_END_TARGET
