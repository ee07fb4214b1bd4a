// The matrix products of the attention kernels in tiles of AMX. The operands are those of cpu/attention_products.h:
// rows of pairs are tiles of rows, and panels and rows of pairs of values are tiles of columns.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/attention_pack.h"
#include "cpu/attention_products.h"
#include "cpu/bfloat16_products.h"
#include "cpu/simd.h"

#if defined(SAVL_BFLOAT16_TILES)

SAVL_BEGIN_KERNELS

// Tiles 0, 1, ... are sums, as many as there are tiles of columns at a time, tiles 4, 5, ... columns. Tile 7 is rows.
constexpr int kColumnTile = 4, kRowsTile = 7;

// Calls `work.operator()<kTile>()` for tiles 0 to kCount - 1.
template <int kCount, typename Work>
SAVL_INLINE void for_tiles(const Work& work) {
  [&]<int... kTile>(std::integer_sequence<int, kTile...>)
      SAVL_ALWAYS_INLINE { (work.template operator()<kTile>(), ...); }(std::make_integer_sequence<int, kCount>{});
}

// out[r][j] = sum_p rows[r][p] * columns[p][j] for kTileRows rows, `depth` pairs (a multiple of kTileRows), and
// kColumns tiles of columns.
template <int kColumns>
SAVL_INLINE void multiply_to_memory(int64_t depth, const BFloat16Pair* rows, int64_t row_stride,
                                    const BFloat16Pair* columns, int64_t column_stride, float* out,
                                    int64_t out_stride) {
  for_tiles<kColumns>([&]<int kTile>() SAVL_ALWAYS_INLINE { zero_tile<kTile>(); });
  for (int64_t p = 0; p < depth; p += kTileRows) {
    load_tile<kRowsTile>(rows + p, row_stride);
    for_tiles<kColumns>([&]<int kTile>() SAVL_ALWAYS_INLINE {
      load_tile<kColumnTile + kTile>(columns + p * column_stride + kTile * kTileRows, column_stride);
      multiply_tiles<kTile, kRowsTile, kColumnTile + kTile>();
    });
  }
  for_tiles<kColumns>([&]<int kTile>() SAVL_ALWAYS_INLINE { store_tile<kTile>(out + kTile * kTileRows, out_stride); });
}

// out[j] = addend + scale * products[j] for all keys of row r of a block. Returns the largest, lane by lane.
SAVL_INLINE Vec<float> add_to_products(const Addend<float>& addend, int64_t r, const float* products,
                                       int64_t padded_keys, float* out) {
  Vec<float> largest = broadcast(-__builtin_inff());
  const auto add = [&](int64_t j, const float* from) SAVL_ALWAYS_INLINE {
    const Vec<float> sum = load(products + j) * addend.scale + load(from);
    store(out + j, sum);
    largest = larger(sum, largest);
  };
  if (addend.run == 0) {
    for (int64_t j = 0; j < padded_keys; j += kWidth<float>) add(j, addend.row[r] + addend.offset[j / kWidth<float>]);
    return largest;
  }
  const float* from = addend.row[r];
  for (int64_t first = 0; first < addend.keys; first += addend.run, from += addend.step) {
    for_overlapping_vectors<float>(addend.run, [&](int64_t j) SAVL_ALWAYS_INLINE { add(first + j, from + j); });
  }
  for (int64_t j = addend.keys; j < padded_keys; ++j) out[j] = -__builtin_inff();
  return largest;
}

// The functions of cpu/attention_products.h with these names, for `count` and `rows` that are multiples of kTileRows.

// If `largest` is null, computes the products alone.
SAVL_INLINE void multiply_panels(int64_t count, const BFloat16Pair* rows, const AttentionShape<BFloat16Pair>& shape,
                                 const BFloat16Pair* panels, int64_t padded_keys, const Addend<float>& addend,
                                 float* products, float* out, Vec<float>* largest) {
  float* to = largest == nullptr ? out : products;
  for (int64_t r = 0; r < count; r += kTileRows) {
    for_panels<float>(padded_keys, [&]<int kVectors>(int64_t first) SAVL_ALWAYS_INLINE {
      multiply_to_memory<kVectors>(shape.depth, rows + r * shape.padded_depth, shape.padded_depth,
                                   panels + first * shape.depth, kVectors * kTileRows, to + r * padded_keys + first,
                                   padded_keys);
    });
  }
  for (int64_t r = 0; largest != nullptr && r < count; ++r) {
    largest[r] = add_to_products(addend, r, products + r * padded_keys, padded_keys, out + r * padded_keys);
  }
}

SAVL_INLINE void multiply_values(int64_t rows, int64_t keys, const BFloat16Pair* weights, int64_t weight_stride,
                                 const BFloat16Pair* values, const AttentionShape<BFloat16Pair>& shape, float* out) {
  const int64_t stride = shape.padded_dim, pairs = round_up(operands_of<BFloat16Pair>(keys), kTileRows);
  for (int64_t r = 0; r < rows; r += kTileRows) {
    for_panels<float>(stride, [&]<int kVectors>(int64_t c) SAVL_ALWAYS_INLINE {
      multiply_to_memory<kVectors>(pairs, weights + r * weight_stride, weight_stride, values + c, stride,
                                   out + r * stride + c, stride);
    });
  }
}

// `tile_row` has room for 16 rows of the pairs. The weights are 0 up to the next multiple of kTileRows.
SAVL_INLINE void add_all_transposed(int64_t count, int64_t keys, const BFloat16Pair* weights, int64_t weight_stride,
                                    const BFloat16Pair* rows, const AttentionShape<BFloat16Pair>& shape, float* out,
                                    BFloat16Pair* tile_row) {
  const int64_t stride = shape.padded_dim, pairs = round_up(count, kTileRows);
  for (int64_t c = 0; c < stride; c += kTileRows) {
    for (int64_t p = 0; p < pairs; p += kTileRows) {
      Vec<BFloat16Pair> block[kTileRows];
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) block[i] = load(rows + (p + i) * stride + c);
      transpose<BFloat16Pair>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) store(tile_row + i * pairs + p, block[i]);
    }
    for_panels<float>(round_up(keys, kKeyStep<BFloat16Pair>), [&]<int kVectors>(int64_t first) SAVL_ALWAYS_INLINE {
      alignas(64) float product[kTileRows * kVectors * kTileRows];  // channels times keys
      multiply_to_memory<kVectors>(pairs, tile_row, pairs, weights + first, weight_stride, product,
                                   kVectors * kTileRows);
      for (int b = 0; b < kVectors; ++b) {
        Vec<float> block[kTileRows];
#pragma GCC unroll 16
        for (int i = 0; i < kTileRows; ++i) block[i] = load(product + (i * kVectors + b) * kTileRows);
        transpose<float>(block);
        float* to = out + (first + b * kTileRows) * stride + c;
#pragma GCC unroll 16
        for (int i = 0; i < kTileRows; ++i) store(to + i * stride, block[i]);
      }
    });
  }
}

SAVL_END_KERNELS

#endif
