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
  T scale = 1;  // of the products
  // Where `run` is not 0, which tiles alone provide for: element j of row[r] belongs to key j of the first row of keys,
  // which has `run` >= kWidth keys, and the elements of each further row of keys are `step` after those of the last
  // one.
  int64_t keys = 0, run = 0, step = 0;
};

// out[r][:] = addend + scale * sum_c rows[r][c] * panel[c][:] for kRowTile rows and kVectors vectors of columns.
template <typename P, int kVectors, typename T = Sum<P>>
SAVL_INLINE void multiply_panel(int64_t depth, const P* rows, int64_t row_stride, const P* panel,
                                const T* const* addend, const int64_t* offset, T scale, T* out, int64_t out_stride,
                                Vec<T>* largest) {
  Vec<T> sums[kRowTile][kVectors] = {};
#pragma GCC unroll 4
  for (int64_t c = 0; c < depth; ++c) {
    Vec<P> columns[kVectors];
    for (int b = 0; b < kVectors; ++b) columns[b] = load(panel + (c * kVectors + b) * kWidth<P>);
    for (int r = 0; r < kRowTile; ++r) {
      const Vec<P> factor = broadcast(rows[r * row_stride + c]);
      for (int b = 0; b < kVectors; ++b) sums[r][b] = multiply_add(factor, columns[b], sums[r][b]);
    }
  }
  for (int r = 0; r < kRowTile; ++r) {
    Vec<T> row_largest = largest[r];
    for (int b = 0; b < kVectors; ++b) {
      const Vec<T> product = kNumbers<P> == 1 ? sums[r][b] : sums[r][b] * scale;
      const Vec<T> sum = product + load(addend[r] + offset[b]);
      store(out + r * out_stride + b * kWidth<T>, sum);
      row_largest = larger(sum, row_largest);
    }
    largest[r] = row_largest;
  }
}

// out[r][j] = addend + scale * rows[r] . keys[j] for `count` rows (a multiple of kRowTile) and all keys of the panels.
// Raises `largest` to the largest of each row, lane by lane.
template <typename P, typename T = Sum<P>>
SAVL_INLINE void multiply_panels(int64_t count, const P* rows, const AttentionShape<P>& shape, const P* panels,
                                 int64_t padded_keys, const Addend<T>& addend, T* /*products*/, T* out,
                                 Vec<T>* largest) {
  for_panels<T>(padded_keys, [&]<int kVectors>(int64_t first) SAVL_ALWAYS_INLINE {
    const P* panel = panels + first * shape.depth;
    const int64_t* offset = addend.offset + first / kWidth<T>;
    for (int64_t r = 0; r < count; r += kRowTile) {
      multiply_panel<P, kVectors>(shape.depth, rows + r * shape.padded_depth, shape.padded_depth, panel, addend.row + r,
                                  offset, addend.scale, out + r * padded_keys + first, padded_keys, largest + r);
    }
  });
}

// out[t][:] += sum_i weights[t * tile_step + i * sum_step] * rows[i][:] for kRowTile values of t, `count` values of i,
// and kVectors vectors of channels. The sums begin at zero: short sums of short sums round less than one long sum.
template <typename P, int kVectors, typename T = Sum<P>>
SAVL_INLINE void add_weighted(int64_t count, const P* weights, int64_t tile_step, int64_t sum_step, const P* rows,
                              int64_t stride, T* out) {
  Vec<T> sums[kRowTile][kVectors] = {};
  for (int64_t i = 0; i < count; ++i, rows += stride) {
    Vec<P> row[kVectors];
    for (int b = 0; b < kVectors; ++b) row[b] = load(rows + b * kWidth<P>);
    for (int t = 0; t < kRowTile; ++t) {
      const Vec<P> weight = broadcast(weights[t * tile_step + i * sum_step]);
      for (int b = 0; b < kVectors; ++b) sums[t][b] = multiply_add(weight, row[b], sums[t][b]);
    }
  }
  for (int t = 0; t < kRowTile; ++t) {
    T* to = out + t * stride;
    for (int b = 0; b < kVectors; ++b) store(to + b * kWidth<T>, load(to + b * kWidth<T>) + sums[t][b]);
  }
}

// out[t][:] += sum_i weights[t * tile_step + i] * row i for kRowTile values of t and `count` values of i (even), whose
// rows share their last vectors: kVectors vectors of channels and, if kShared is true, the shared vector after them.
// `rows` points to the first of these channels in row 0; row 1 begins `whole` operands later.
template <typename P, int kVectors, bool kShared, typename T = Sum<P>>
SAVL_INLINE void add_weighted_sharing(int64_t count, const P* weights, int64_t tile_step, const P* rows, int64_t whole,
                                      T* out, int64_t out_stride) {
  Vec<T> sums[kRowTile][kVectors + 1] = {};
  for (int64_t i = 0; i < count; i += 2, rows += 2 * whole + kWidth<P>) {
    Vec<P> first[kVectors + 1], second[kVectors + 1], shared{};
    for (int b = 0; b < kVectors; ++b) first[b] = load(rows + b * kWidth<P>);
    for (int b = 0; b < kVectors; ++b) second[b] = load(rows + whole + b * kWidth<P>);
    if (kShared) shared = load(rows + kVectors * kWidth<P> + whole);
    for (int t = 0; t < kRowTile; ++t) {
      const P* weight = weights + t * tile_step + i;
      const Vec<P> one = broadcast(weight[0]), other = broadcast(weight[1]);
      for (int b = 0; b < kVectors; ++b) sums[t][b] = multiply_add(one, first[b], sums[t][b]);
      for (int b = 0; b < kVectors; ++b) sums[t][b] = multiply_add(other, second[b], sums[t][b]);
      if (kShared) sums[t][kVectors] = multiply_add(broadcast_two(weight), shared, sums[t][kVectors]);
    }
  }
  for (int t = 0; t < kRowTile; ++t) {
    T* to = out + t * out_stride;
    for (int b = 0; b < kVectors; ++b) store(to + b * kWidth<T>, load(to + b * kWidth<T>) + sums[t][b]);
    if (kShared) {
      T* last = to + kVectors * kWidth<T>;
      store(last, load(last) + sums_of_two<T>(sums[t][kVectors]));
    }
  }
}

// out[r][:] = sum_j weights[r][j] * values[j][:] for `rows` rows (a multiple of kRowTile) and `keys` values, after
// `share_last_vectors`.
template <typename P, typename T = Sum<P>>
SAVL_INLINE void multiply_values(int64_t rows, int64_t keys, const P* weights, int64_t weight_stride, const P* values,
                                 const AttentionShape<P>& shape, T* out) {
  const int64_t stride = shape.padded_dim, operands = operands_of<P>(keys);
  zero_rows(out, 0, rows, stride);
  if constexpr (kSharesVectors<P>) {
    if (shape.shares_last_vectors) {
      const int64_t whole = stride - kWidth<P>, two = 2 * whole + kWidth<P>;
      for (int64_t first = 0; first < operands; first += kKeyBlock) {
        const int64_t count = round_up(smaller(kKeyBlock, operands - first), 2);
        for (int64_t r = 0; r < rows; r += kRowTile) {
          const P* weight = weights + r * weight_stride + first;
          const P* value = values + first / 2 * two;
          T* to = out + r * stride;
          if (whole == 0) add_weighted_sharing<P, 0, true>(count, weight, weight_stride, value, whole, to, stride);
          for_panels<T>(whole, [&]<int kVectors>(int64_t c) SAVL_ALWAYS_INLINE {
            if (c + kVectors * kWidth<P> == whole) {
              add_weighted_sharing<P, kVectors, true>(count, weight, weight_stride, value + c, whole, to + c, stride);
            } else {
              add_weighted_sharing<P, kVectors, false>(count, weight, weight_stride, value + c, whole, to + c, stride);
            }
          });
        }
      }
      return;
    }
  }
  for (int64_t first = 0; first < operands; first += kKeyBlock) {
    const int64_t count = smaller(kKeyBlock, operands - first);
    for (int64_t r = 0; r < rows; r += kRowTile) {
      const P* weight = weights + r * weight_stride + first;
      for_panels<T>(stride, [&]<int kVectors>(int64_t c) SAVL_ALWAYS_INLINE {
        add_weighted<P, kVectors>(count, weight, weight_stride, 1, values + first * stride + c, stride,
                                  out + r * stride + c);
      });
    }
  }
}

// out[j][:] += sum_r weights[r][j] * rows[r][:] for `count` rows of operands and all keys. `out` and the weights have
// room for keys up to the next multiple of kRowTile.
template <typename P, typename T = Sum<P>>
SAVL_INLINE void add_all_transposed(int64_t count, int64_t keys, const P* weights, int64_t weight_stride, const P* rows,
                                    const AttentionShape<P>& shape, T* out, P* /*tile_row*/ = nullptr) {
  const int64_t stride = shape.padded_dim;
  for_panels<T>(stride, [&]<int kVectors>(int64_t c) SAVL_ALWAYS_INLINE {
    for (int64_t j = 0; j < keys; j += kRowTile) {
      add_weighted<P, kVectors>(count, weights + j, 1, weight_stride, rows + c, stride, out + j * stride + c);
    }
  });
}

SAVL_END_KERNELS
