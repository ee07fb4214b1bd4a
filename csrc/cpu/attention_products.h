// The matrix products of the attention kernels, forward and backward, in tiles that stay in registers: rows times
// panels of keys, and weights times rows.
#pragma once

#include <cstdint>

#include "cpu/attention_pack.h"
#include "cpu/simd.h"

SAVL_BEGIN_KERNELS

// What is added to the products of a block of rows: for vector b of row r, the vector at row[r] + offset[b]. It is in a
// buffer, or in the bias table itself, where the keys of a row of pixels are contiguous.
template <typename T>
struct Addend {
  const T* row[kRowBlock];
  const int64_t* offset;
};

// out[r][:] = addend + sum_c rows[r][c] * panel[c][:] for kRowTile rows and kVectors vectors of columns.
template <typename T, int kVectors>
SAVL_INLINE void multiply_panel(int64_t depth, const T* rows, int64_t row_stride, const T* panel,
                                const T* const* addend, const int64_t* offset, T* out, int64_t out_stride,
                                Vec<T>* largest) {
  Vec<T> sums[kRowTile][kVectors] = {};
#pragma GCC unroll 4
  for (int64_t c = 0; c < depth; ++c) {
    Vec<T> columns[kVectors];
    for (int b = 0; b < kVectors; ++b) columns[b] = load(panel + (c * kVectors + b) * kWidth<T>);
    for (int r = 0; r < kRowTile; ++r) {
      const Vec<T> factor = broadcast(rows[r * row_stride + c]);
      for (int b = 0; b < kVectors; ++b) sums[r][b] = factor * columns[b] + sums[r][b];
    }
  }
  for (int r = 0; r < kRowTile; ++r) {
    Vec<T> row_largest = largest[r];
    for (int b = 0; b < kVectors; ++b) {
      const Vec<T> sum = sums[r][b] + load(addend[r] + offset[b]);
      store(out + r * out_stride + b * kWidth<T>, sum);
      row_largest = larger(sum, row_largest);
    }
    largest[r] = row_largest;
  }
}

// out[r][j] = addend + rows[r] . keys[j] for `count` rows (a multiple of kRowTile) and all keys of the panels. Raises
// `largest` to the largest of each row, lane by lane.
template <typename T>
SAVL_INLINE void multiply_panels(int64_t count, const T* rows, const AttentionShape<T>& shape, const T* panels,
                                 int64_t padded_keys, const Addend<T>& addend, T* out, Vec<T>* largest) {
  for_panels<T>(padded_keys, [&]<int kVectors>(int64_t first) SAVL_ALWAYS_INLINE {
    const T* panel = panels + first * shape.head_dim;
    const int64_t* offset = addend.offset + first / kWidth<T>;
    for (int64_t r = 0; r < count; r += kRowTile) {
      multiply_panel<T, kVectors>(shape.head_dim, rows + r * shape.padded_dim, shape.padded_dim, panel, addend.row + r,
                                  offset, out + r * padded_keys + first, padded_keys, largest + r);
    }
  });
}

// out[t][:] += sum_i weights[t * tile_step + i * sum_step] * rows[i][:] for kRowTile values of t, `count` values of i,
// and kVectors vectors of channels. The sums begin at zero: short sums of short sums round less than one long sum.
template <typename T, int kVectors>
SAVL_INLINE void add_weighted(int64_t count, const T* weights, int64_t tile_step, int64_t sum_step, const T* rows,
                              int64_t stride, T* out) {
  Vec<T> sums[kRowTile][kVectors] = {};
  for (int64_t i = 0; i < count; ++i, rows += stride) {
    Vec<T> row[kVectors];
    for (int b = 0; b < kVectors; ++b) row[b] = load(rows + b * kWidth<T>);
    for (int t = 0; t < kRowTile; ++t) {
      const Vec<T> weight = broadcast(weights[t * tile_step + i * sum_step]);
      for (int b = 0; b < kVectors; ++b) sums[t][b] = weight * row[b] + sums[t][b];
    }
  }
  for (int t = 0; t < kRowTile; ++t) {
    T* to = out + t * stride;
    for (int b = 0; b < kVectors; ++b) store(to + b * kWidth<T>, load(to + b * kWidth<T>) + sums[t][b]);
  }
}

// out[r][:] += sum_j weights[r][j] * values[j][:] for `rows` rows (a multiple of kRowTile) and `keys` values.
template <typename T>
SAVL_INLINE void add_all_weighted(int64_t rows, int64_t keys, const T* weights, int64_t weight_stride, const T* values,
                                  const AttentionShape<T>& shape, T* out) {
  const int64_t stride = shape.padded_dim;
  for (int64_t first = 0; first < keys; first += kKeyBlock) {
    const int64_t count = smaller(kKeyBlock, keys - first);
    for (int64_t r = 0; r < rows; r += kRowTile) {
      const T* weight = weights + r * weight_stride + first;
      for_panels<T>(stride, [&]<int kVectors>(int64_t c) SAVL_ALWAYS_INLINE {
        add_weighted<T, kVectors>(count, weight, weight_stride, 1, values + first * stride + c, stride,
                                  out + r * stride + c);
      });
    }
  }
}

// out[j][:] += sum_r weights[r][j] * rows[r][:] for `count` rows and all keys. `out` and the weights have room for keys
// up to the next multiple of kRowTile.
template <typename T>
SAVL_INLINE void add_all_transposed(int64_t count, int64_t keys, const T* weights, int64_t weight_stride, const T* rows,
                                    const AttentionShape<T>& shape, T* out) {
  const int64_t stride = shape.padded_dim;
  for_panels<T>(stride, [&]<int kVectors>(int64_t c) SAVL_ALWAYS_INLINE {
    for (int64_t j = 0; j < keys; j += kRowTile) {
      add_weighted<T, kVectors>(count, weights + j, 1, weight_stride, rows + c, stride, out + j * stride + c);
    }
  });
}

SAVL_END_KERNELS
