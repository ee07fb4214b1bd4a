// Loads, stores and conversions of tensor elements in a CUDA thread. A thread loads and stores a *chunk* of 16 bytes at
// a time, and computes in float. Everything also compiles for the host: csrc/twin is a library for tests that runs the
// CUDA kernels on the CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "arithmetic.h"
#include "compiler.h"

namespace savl::gpu {

constexpr int kThreads = 256;  // Threads per block, in every kernel.
constexpr int kWarp = 32;      // Threads per warp.

enum class Storage : int { kFloat32, kBFloat16, kFloat16 };

// Type of the shared memory of a kernel that uses no shared memory.
struct NoSharedMemory {};

// Return the larger (lesser) of two values. If `b` is NaN, the result is NaN. `a` must not be NaN.
SAVL_HOST_DEVICE float larger(float a, float b) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a > b ? a : b;
#endif
}
SAVL_HOST_DEVICE float lesser(float a, float b) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a < b ? a : b;
#endif
}

}  // namespace savl::gpu

namespace savl {

template <>
struct ArithmeticTraits<float> {
  using Integers = int32_t;
  SAVL_HOST_DEVICE static float larger(float a, float b) { return gpu::larger(a, b); }
  SAVL_HOST_DEVICE static float lesser(float a, float b) { return gpu::lesser(a, b); }
};

}  // namespace savl

namespace savl::gpu {

// Storage types of tensor elements. The 16-bit types hold the bits of the number; arithmetic needs `widen` first.

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Convert a stored element to float. The conversion is exact.
SAVL_HOST_DEVICE float widen(float value) { return value; }
SAVL_HOST_DEVICE float widen(BFloat16 value) { return bits_of<float>(static_cast<uint32_t>(value.bits) << 16); }
SAVL_HOST_DEVICE float widen(Float16 value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_of<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinity, NaN
  // Multiplying by 2^112 corrects the bias of the exponent, which also holds for subnormal numbers.
  const float magnitude = bits_of<float>(rest << 13) * bits_of<float>(0x77800000u);
  return bits_of<float>(sign | bits_of<uint32_t>(magnitude));
#endif
}

// Convert a float to a storage type, rounding to nearest, ties to even.
template <typename S>
SAVL_HOST_DEVICE S narrow(float value);
template <>
SAVL_HOST_DEVICE float narrow<float>(float value) {
  return value;
}
template <>
SAVL_HOST_DEVICE BFloat16 narrow<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  if (value != value) return {0x7fc0};
  const uint32_t bits = bits_of<uint32_t>(value);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}
template <>
SAVL_HOST_DEVICE Float16 narrow<Float16>(float value) {
#if defined(__CUDA_ARCH__)
  Float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = bits_of<uint32_t>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // The result is at least 2^16.
  uint32_t rounded;
  if (magnitude < 0x38800000) {
    // Below 2^-14, the result is subnormal, a multiple of 2^-24. Floats from 0.5 to 1 are multiples of 2^-24 too, so
    // adding 0.5 rounds the value to such a multiple.
    rounded = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    rounded = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | rounded)};
#endif
}

// Convert two floats to a 16-bit storage type and pack them into one word, the first one into the lower half.
template <typename S>
SAVL_HOST_DEVICE uint32_t narrow_pair(float first, float second) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  if constexpr (std::is_same_v<S, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
  }
  return result;
#else
  return narrow<S>(first).bits | static_cast<uint32_t>(narrow<S>(second).bits) << 16;
#endif
}

// Round a float to the precision of a storage type.
template <typename S>
SAVL_HOST_DEVICE float rounded(float value) {
  return widen(narrow<S>(value));
}

// The 16 bytes of a chunk.
struct alignas(16) Words {
  uint32_t word[4];
};

template <typename S>
constexpr int kLanes = 16 / static_cast<int>(sizeof(S));  // Elements per chunk.

// Return element `lane` of a chunk as it is stored. The words are in registers, so `lane` must be a compile-time
// constant once the loop around the call is unrolled.
template <typename S>
SAVL_HOST_DEVICE S stored_lane(const Words& words, int lane) {
  if constexpr (sizeof(S) == 4) {
    return bits_of<float>(words.word[lane]);
  } else {
    return S{static_cast<uint16_t>(words.word[lane / 2] >> lane % 2 * 16)};
  }
}

// Return element `lane` of a chunk as a float.
template <typename S>
SAVL_HOST_DEVICE float lane_of(const Words& words, int lane) {
  return widen(stored_lane<S>(words, lane));
}

// Set elements `lane` and `lane + 1` of a chunk. `lane` must be even.
template <typename S>
SAVL_HOST_DEVICE void set_pair(Words& words, int lane, const float (&values)[2]) {
  if constexpr (sizeof(S) == 4) {
    words.word[lane] = bits_of<uint32_t>(values[0]);
    words.word[lane + 1] = bits_of<uint32_t>(values[1]);
  } else {
    words.word[lane / 2] = narrow_pair<S>(values[0], values[1]);
  }
}

// Return the bits of a stored element; those of a 16-bit element are in the lower half.
template <typename S>
SAVL_HOST_DEVICE uint32_t element_bits(S value) {
  if constexpr (sizeof(S) == 4) {
    return bits_of<uint32_t>(value);
  } else {
    return value.bits;
  }
}

// The memory layout of the elements of a chunk.
struct Access {
  bool whole;    // Whether the chunk is 16 contiguous bytes, aligned to 16 bytes. `step` is ignored then.
  int count;     // Number of elements that exist. The others are loaded as zero and not stored.
  int64_t step;  // Distance between neighbouring elements, in elements.
};

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// A GPU reports an unaligned access as an error, but a CPU allows it. This check finds such errors on the CPU.
inline void check_alignment(const void* data) {
  if (!is_aligned(data)) throw std::runtime_error("an access of 16 bytes at an address that is not a multiple of 16");
}

template <typename S>
SAVL_HOST_DEVICE Words load_chunk(const S* from, const Access& access) {
  Words words = {};
  if (access.whole) {
#if defined(__CUDA_ARCH__)
    const uint4 four = __ldg(reinterpret_cast<const uint4*>(from));
    words = {{four.x, four.y, four.z, four.w}};
#else
    check_alignment(from);
    memcpy(&words, from, sizeof(words));
#endif
    return words;
  }
  SAVL_UNROLL
  for (int lane = 0; lane < kLanes<S>; ++lane) {
    if (lane >= access.count) continue;
    const uint32_t bits = element_bits(from[lane * access.step]);
    words.word[lane * sizeof(S) / 4] |= sizeof(S) == 4 ? bits : bits << lane % 2 * 16;
  }
  return words;
}

template <typename S>
SAVL_HOST_DEVICE void store_chunk(S* to, const Words& words, const Access& access) {
  if (access.whole) {
#if defined(__CUDA_ARCH__)
    *reinterpret_cast<uint4*>(to) = make_uint4(words.word[0], words.word[1], words.word[2], words.word[3]);
#else
    check_alignment(to);
    memcpy(to, &words, sizeof(words));
#endif
    return;
  }
  SAVL_UNROLL
  for (int lane = 0; lane < kLanes<S>; ++lane) {
    if (lane < access.count) to[lane * access.step] = stored_lane<S>(words, lane);
  }
}

// Load float32 values for the elements of a chunk of type S: as many values, with the same layout in elements.
template <typename S>
SAVL_HOST_DEVICE void load_floats(const float* from, const Access& access, float (&values)[kLanes<S>]) {
  constexpr int kParts = kLanes<S> / 4;
  SAVL_UNROLL
  for (int part = 0; part < kParts; ++part) {
    const Access here{access.whole, access.count - 4 * part, access.step};
    const Words words = load_chunk(from + part * 4 * (access.whole ? 1 : access.step), here);
    SAVL_UNROLL
    for (int lane = 0; lane < 4; ++lane) values[4 * part + lane] = bits_of<float>(words.word[lane]);
  }
}

}  // namespace savl::gpu
