// The mathematics of one element of the Gaussian posterior, for CPU vectors and CUDA threads alike: V is a Vec<float>
// of cpu/simd.h or the float of one thread. With h = logvar / 2 and a = e^h - 1 one exponential gives all: the variance
// is 1 + (2 a + a^2), and the divergence's e^logvar - 1 - logvar is a^2 + 2 (a - h), which does not cancel near the
// prior.
//
// Included inside the namespace of a backend, after what it is made of: IntegersOf<V>, bits_of, larger and lesser.

// The part of e^x that is left after a power of two is taken out: x = n ln 2 + r, |r| <= ln 2 / 2, and
// `excess` = e^r - 1 - r. Both are exact where x is small, which the divergence near the prior lives on.
template <typename V>
struct ExponentParts {
  V r, excess, low, high;  // e^x = (1 + r + excess) * low * high
};

template <typename V>
SAVL_HOST_DEVICE ExponentParts<V> exponent_parts(V x) {
  using Integers = typename IntegersOf<V>::type;
  // Outside this range e^x is 0 or infinity in float.
  x = lesser(V{} + 89.0f, larger(V{} - 104.0f, x));
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
  // 2^n in two factors, so that subnormal results and those near the largest float come out as they should.
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

// What one element adds to twice the divergence of its pixel.
template <typename V>
SAVL_HOST_DEVICE V divergence_of(V mu, const PosteriorTerms<V>& terms) {
  return mu * mu + terms.divergence;
}

template <typename V>
SAVL_HOST_DEVICE V sample_of(V mu, const PosteriorTerms<V>& terms, V noise) {
  return mu + terms.deviation * noise;
}

// The gradients of one element: sums of what divergence, variance and sample pass back, each left out where it got
// none.
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
