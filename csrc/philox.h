// Philox4x32-10 and Box-Muller: the noise of a seeded posterior sample, for CPU and CUDA. savl/ops/philox.py computes
// the same stream in Python. A number depends on (seed, offset, position) and on nothing else.
#pragma once

#include <cmath>
#include <cstdint>

#include "arithmetic.h"
#include "compiler.h"

SAVL_BEGIN_TARGET
namespace savl {

struct PhiloxWords {
  uint32_t word[4];
};

// Ten rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The counter's high 64 bits are 0.
SAVL_HOST_DEVICE PhiloxWords philox_4x32(uint64_t counter, uint64_t seed) {
  uint32_t w0 = static_cast<uint32_t>(counter), w1 = static_cast<uint32_t>(counter >> 32), w2 = 0, w3 = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(w0) * 0xD2511F53u;
    const uint64_t product1 = static_cast<uint64_t>(w2) * 0xCD9E8D57u;
    w0 = static_cast<uint32_t>(product1 >> 32) ^ w1 ^ key0;
    w2 = static_cast<uint32_t>(product0 >> 32) ^ w3 ^ key1;
    w1 = static_cast<uint32_t>(product1);
    w3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{w0, w1, w2, w3}};
}

// Logarithm, sine and cosine are written out, for the arguments that occur here only, so that every device computes the
// same numbers. Their error is one or two units in the last place of a double; the polynomials are minimax.

// log(u) for a normal u: u = 2^n m with m in [sqrt(1/2), sqrt(2)), and log(m) = 2 atanh((m - 1) / (m + 1)).
SAVL_HOST_DEVICE double log_of_uniform(double u) {
  constexpr uint64_t kOne = 0x3ff0000000000000, kRootHalf = 0x3fe6a09e00000000;
  const uint64_t shifted = bits_of<uint64_t>(u) + (kOne - kRootHalf);
  const double n = static_cast<double>(static_cast<int>(shifted >> 52) - 0x3ff);
  const double f = bits_of<double>((shifted & 0x000fffffffffffff) + kRootHalf) - 1.0;
  const double s = f / (2.0 + f);
  const double z = s * s;
  double p = z * 0.1461644968504386 + 0.15331721600555998;
  p = p * z + 0.18182889125261723;
  p = p * z + 0.2222221113479508;
  p = p * z + 0.28571428625975487;
  p = p * z + 0.39999999999899505;
  p = p * z + 0.666666666666667;
  // ln 2 in two parts: n times the first is exact.
  return n * 6.93147180369123816490e-01 + (2.0 * s + (s * z * p + n * 1.90821492927058770002e-10));
}

struct SineCosine {
  double sine, cosine;
};

// Sine and cosine of 2 pi (word + 1/2) / 2^32. The nearest quarter turn is removed while the angle is still an integer.
SAVL_HOST_DEVICE SineCosine sine_cosine_of_turn(uint32_t word) {
  const uint32_t quarter = (word + 0x20000000u) >> 30;
  const double rest = static_cast<int32_t>(word - (quarter << 30)) + 0.5;
  const double x = rest * (6.283185307179586477 * 0x1p-32);  // |x| <= pi / 4
  const double z = x * x;
  double p = z * 1.5918129294866605e-10 - 2.5051131845003624e-08;
  p = p * z + 2.755731610255244e-06;
  p = p * z - 1.9841269836758574e-04;
  p = p * z + 8.333333333330948e-03;
  p = p * z - 1.6666666666666666e-01;
  const double sine = x + x * z * p;
  double q = z * -1.1382632425521717e-11 + 2.08761462684032e-09;
  q = q * z - 2.7557317271729793e-07;
  q = q * z + 2.480158729876569e-05;
  q = q * z - 1.3888888888887398e-03;
  q = q * z + 4.1666666666666664e-02;
  const double cosine = 1.0 - (0.5 * z - z * z * q);
  const bool swapped = (quarter & 1) != 0;
  const double first = swapped ? cosine : sine, second = swapped ? sine : cosine;
  return {quarter >= 2 ? -first : first, quarter == 1 || quarter == 2 ? -second : second};
}

struct NormalPair {
  float first, second;
};

// Two normal numbers from two words (Box and Muller), computed in double. All backends then round to the same float,
// except for about one number in 10^7 whose last bits in double lie on different sides of a rounding boundary.
SAVL_HOST_DEVICE NormalPair normal_pair(uint32_t radius_word, uint32_t angle_word) {
  // (word + 1/2) / 2^32 lies strictly inside (0, 1): the logarithm is finite.
  const double radius = sqrt(-2.0 * log_of_uniform((radius_word + 0.5) * 0x1p-32));
  const SineCosine angle = sine_cosine_of_turn(angle_word);
  return {static_cast<float>(radius * angle.cosine), static_cast<float>(radius * angle.sine)};
}

// The four normal numbers of one counter.
SAVL_HOST_DEVICE void standard_normals(uint64_t counter, uint64_t seed, float normals[4]) {
  const PhiloxWords words = philox_4x32(counter, seed);
  for (int pair = 0; pair < 2; ++pair) {
    const NormalPair two = normal_pair(words.word[2 * pair], words.word[2 * pair + 1]);
    normals[2 * pair] = two.first;
    normals[2 * pair + 1] = two.second;
  }
}

// Number `element` of the stream that begins at counter `offset`, counted from 0.
SAVL_HOST_DEVICE float standard_normal(uint64_t element, uint64_t offset, uint64_t seed) {
  const PhiloxWords words = philox_4x32(offset + element / 4, seed);
  const bool later = (element & 2) != 0;
  const NormalPair two = normal_pair(later ? words.word[2] : words.word[0], later ? words.word[3] : words.word[1]);
  return (element & 1) != 0 ? two.second : two.first;
}

}  // namespace savl
SAVL_END_TARGET
