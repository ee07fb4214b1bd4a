// Panels: the columns of a matrix product, in groups of vectors whose sums are in registers at the same time.
#pragma once

#include <cstdint>

#include "cpu/bfloat16_products.h"
#include "cpu/simd.h"

SAVL_BEGIN_KERNELS

constexpr int kPanel = 3;  // the most vectors of columns in a panel

// The number of operands in a sum is padded to whole tiles of AMX.
#if defined(SAVL_BFLOAT16_TILES)
constexpr int kDepthStep = kTileRows;
#else
constexpr int kDepthStep = 1;
#endif

// If at least half of a vector of columns would be empty, the columns of two consecutive operands are stored in one
// vector, in alternating lanes. One multiplication then computes two products for each column, and adjacent lanes are
// added after the sum.
template <typename P>
constexpr bool kSharesVectors = SAVL_VECTOR_BYTES == 64 && sizeof(P) == 4 && !kTiles<P>;

typedef uint32_t HalfVector __attribute__((vector_size(SAVL_VECTOR_BYTES / 2)));

// Interleaves the lower halves of two vectors of columns.
template <typename P>
SAVL_INLINE Vec<P> interleave(Vec<P> first, Vec<P> second) {
  HalfVector halves[2];
  __builtin_memcpy(&halves[0], &first, sizeof(HalfVector));
  __builtin_memcpy(&halves[1], &second, sizeof(HalfVector));
  return bits_of<Vec<P>>(__builtin_convertvector(halves[0], Vec<uint64_t>) |
                         __builtin_convertvector(halves[1], Vec<uint64_t>) << 32);
}

// Broadcasts two adjacent operands to alternating lanes.
template <typename P>
SAVL_INLINE Vec<P> broadcast_two(const P* operands) {
  uint64_t two;
  __builtin_memcpy(&two, operands, sizeof(two));
  return bits_of<Vec<P>>(broadcast(two));
}

// Adds adjacent lanes. The sums are in the lower half, and the upper half is 0.
template <typename T>
SAVL_INLINE Vec<T> sums_of_two(Vec<T> sums) {
  T lanes[kWidth<T>], result[kWidth<T>] = {};
  store(lanes, sums);
  for (int i = 0; i < kWidth<T> / 2; ++i) result[i] = lanes[2 * i] + lanes[2 * i + 1];
  return load(result);
}
#if defined(__x86_64__) && SAVL_VECTOR_BYTES == 64 && !defined(SAVL_EMULATE_AVX512)
template <>
SAVL_INLINE Vec<float> sums_of_two<float>(Vec<float> sums) {
  return _mm512_maskz_compress_ps(0x5555, sums + bits_of<Vec<float>>(bits_of<Vec<uint64_t>>(sums) >> 32));
}
#endif

// Vectors of the next panel when `left` vectors are left: kPanel, but never so many that one alone remains where two
// and two would do. One vector of accumulators is too few to hide the latency of a multiplication.
SAVL_INLINE int64_t panel_vectors(int64_t left) { return left == kPanel + 1 ? 2 : smaller(kPanel, left); }

// Calls `work.operator()<kVectors>(first)` for the panels of `columns` columns (a multiple of the vector width): a
// panel has kVectors vectors of columns and begins at column `first`.
template <typename T, typename Work>
SAVL_INLINE void for_panels(int64_t columns, const Work& work) {
  static_assert(kPanel == 3);
  int64_t vectors = 0;
  for (int64_t first = 0; first < columns; first += vectors * kWidth<T>) {
    vectors = panel_vectors((columns - first) / kWidth<T>);
    if (vectors == 3) {
      work.template operator()<3>(first);
    } else if (vectors == 2) {
      work.template operator()<2>(first);
    } else {
      work.template operator()<1>(first);
    }
  }
}

SAVL_END_KERNELS
