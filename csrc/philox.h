// Philox4x32-10 and Box-Muller: the noise of a seeded posterior sample. The twin of savl/ops/philox.py, and the one
// definition of the stream for CPU and CUDA: a number depends on (seed, offset, position) and on nothing else.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

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

// Strictly inside (0, 1), so that the logarithm below is finite.
SAVL_HOST_DEVICE double uniform_from(uint32_t word) { return (word + 0.5) * 0x1p-32; }

// Four normals of one counter. In double: every backend rounds the same number to float, but where the last bits of two
// logarithms or cosines lie on both sides of a rounding, about once in 10^8 numbers.
SAVL_HOST_DEVICE void standard_normals(uint64_t counter, uint64_t seed, float normals[4]) {
  const PhiloxWords words = philox_4x32(counter, seed);
  for (int pair = 0; pair < 2; ++pair) {
    const double radius = sqrt(-2.0 * log(uniform_from(words.word[2 * pair])));
    const double angle = 2.0 * 3.14159265358979323846 * uniform_from(words.word[2 * pair + 1]);
    normals[2 * pair] = static_cast<float>(radius * cos(angle));
    normals[2 * pair + 1] = static_cast<float>(radius * sin(angle));
  }
}

}  // namespace savl
