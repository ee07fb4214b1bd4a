// Panels: the columns of a matrix product, in groups of vectors whose sums are in registers at the same time.
#pragma once

#include <cstdint>

#include "cpu/bfloat16_products.h"
#include "cpu/simd.h"

SAVL_BEGIN_KERNELS

constexpr int kPanel = 3;  // the most vectors of columns in a panel

// In the sum of a product, operands are padded to whole tiles of AMX.
#if defined(SAVL_BFLOAT16_TILES)
constexpr int kDepthStep = kTileRows;
#else
constexpr int kDepthStep = 1;
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
