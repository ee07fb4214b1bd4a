// Packs the channels of a window's pixels for the attention kernels, and writes results back to pixels.
#pragma once

#include <cstdint>

#include "cpu/attention_window.h"
#include "cpu/bfloat16_products.h"
#include "cpu/panels.h"
#include "cpu/simd.h"

SAVL_BEGIN_KERNELS

constexpr int kRowTile = 4;  // query rows that share loads of keys and values in registers
// benchmarks/cpu_blocks.py builds and compares other sizes; these are the fastest.
#ifndef SAVL_ROW_BLOCK
#define SAVL_ROW_BLOCK 16
#endif
#ifndef SAVL_KEY_BLOCK
#define SAVL_KEY_BLOCK 64
#endif
// Query rows are padded to whole tiles.
#if defined(SAVL_BFLOAT16_TILES)
constexpr int kRowStep = kTileRows;
#else
constexpr int kRowStep = kRowTile;
#endif
constexpr int kRowBlock = SAVL_ROW_BLOCK < kRowStep ? kRowStep : SAVL_ROW_BLOCK;  // query rows whose logits are in the
                                                                                  // cache at the same time
constexpr int kKeyBlock = SAVL_KEY_BLOCK;  // values in the first-level cache at the same time
static_assert(kKeyBlock % 2 == 0);         // two of them may share a vector

// Keys are padded to whole vectors of operands, and to whole tiles where those are wider.
template <typename P>
constexpr int kKeyStep = kWidth<P> < kRowTile ? kRowTile : kNumbers<P> * kWidth<P>;

// The sizes of the buffers of a window, which depend on shape alone. P is the type of the operands of the products.
template <typename P>
struct AttentionShape {
  int64_t head_dim, padded_dim;  // channels of a head, and the same rounded up to whole vectors
  int64_t depth, padded_depth;   // operands of the channels of a head, and the same rounded up to whole vectors
  bool shares_last_vectors;      // whether two rows of a product with weights share their last vectors: cpu/panels.h
  int64_t most_queries, most_keys, padded_queries, padded_keys;

  explicit AttentionShape(const AttentionArgs& args)
      : head_dim(args.head_dim),
        padded_dim(round_up(head_dim, kWidth<P>)),
        depth(round_up(operands_of<P>(head_dim), kDepthStep)),
        padded_depth(round_up(depth, kWidth<P>)),
        shares_last_vectors(kSharesVectors<P> && padded_dim - head_dim >= kWidth<P> / 2),
        most_queries(args.queries()),
        most_keys(args.keys()),
        padded_queries(round_up(most_queries, kRowStep)),
        padded_keys(round_up(most_keys, kKeyStep<P>)) {}
};

// Calls `work(c)` for vectors of channels, from channel c on, that cover all channels. Where the last vector would have
// too few channels, it begins earlier and overlaps the vector before, so that some channels are worked on twice.
// If there are fewer channels than lanes, returns false without calling `work`.
template <typename T, typename Work>
SAVL_INLINE bool for_overlapping_vectors(int64_t channels, const Work& work) {
  if (channels < kWidth<T>) return false;
  int64_t c = 0;
  for (; c + kWidth<T> <= channels; c += kWidth<T>) work(c);
  if (c < channels) work(channels - kWidth<T>);
  return true;
}

// Multiplies the channels of a pixel by a factor in double: see `pack_rows`.
template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE void scale_channels(const S* pixel, int64_t channels, double factor, T* scaled) {
  const Factor<T> vector_factor(factor);
  const bool done = for_overlapping_vectors<T>(channels, [&](int64_t c) SAVL_ALWAYS_INLINE {
    store(scaled + c, factor == 1.0 ? load_wide(pixel + c) : vector_factor * load_wide(pixel + c));
  });
  for (int64_t c = done ? channels : 0; c < channels; ++c) scaled[c] = static_cast<T>(widen(pixel[c]) * factor);
}

#if defined(SAVL_BFLOAT16_PAIRS)
// The same for pairs of channels. Zeros follow the channels up to the next whole vector.
SAVL_INLINE void scale_channels(const BFloat16* pixel, int64_t channels, double factor, BFloat16Pair* scaled) {
  for (int64_t c = 0; c < channels; c += 2 * kWidth<float>, scaled += kWidth<float>) {
    const Vec<BFloat16Pair> pairs = load_pairs(pixel + c, channels - c);
    store(scaled, factor == 1.0 ? pairs : times(pairs, static_cast<float>(factor)));
  }
}
#endif

// Multiplies channels by a factor and writes them to a pixel.
template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE void write_channels(const T* channels, int64_t count, T factor, S* pixel) {
  const bool done = for_overlapping_vectors<T>(
      count, [&](int64_t c) SAVL_ALWAYS_INLINE { store_narrow(pixel + c, load(channels + c) * factor); });
  for (int64_t c = done ? count : 0; c < count; ++c) pixel[c] = narrow<S>(channels[c] * factor);
}

#if defined(SAVL_BFLOAT16_PAIRS)
SAVL_INLINE void write_channels(const float* channels, int64_t count, float factor, BFloat16* pixel) {
  int64_t c = 0;
  for (; c + kWidth<float> < count; c += 2 * kWidth<float>) {
    store_pairs(pixel + c, to_pairs(load(channels + c) * factor, load(channels + c + kWidth<float>) * factor),
                count - c);
  }
  if (c < count) store_pairs(pixel + c, to_pairs(load(channels + c) * factor, Vec<float>{}), count - c);
}
#endif

template <typename T>
SAVL_INLINE void zero_rows(T* rows, int64_t first, int64_t last, int64_t stride) {
  for (T* element = rows + first * stride; element < rows + last * stride; ++element) *element = 0;
}

// Packs the pixels of a grid into rows of `padded_depth` operands, with zeros after the channels and for pixels outside
// the image. Each row is multiplied by `scale` and by the factor of its pixel, if there are factors.
//
// The factors are double and the product is rounded once: the rounding error of a float factor would be the same for a
// whole row, and would add up in its logits instead of averaging out.
template <typename S, typename P>
SAVL_NOINLINE void pack_rows(const Window& window, const PixelGrid& grid, const Image& image, const RowFactors& factors,
                             const AttentionShape<P>& shape, double scale, P* packed) {
  using T = Arithmetic<S>;
  const T* of_head = static_cast<const T*>(factors.values);
  if (of_head != nullptr) of_head += window.head * factors.head_stride;
  const int64_t last = shape.padded_depth - kWidth<P>;
  for (int i = 0; i < grid.rows.length; ++i) {
    const bool row_inside = grid.rows.position[i] >= 0;
    const int64_t row = row_inside ? grid.rows.position[i] : 0;
    const S* first = pixel_of<S>(image, window, row, 0, shape.head_dim);
    const T* of_row = of_head == nullptr ? nullptr : of_head + factors.pixel(window.batch, row, 0);
    for (int j = 0; j < grid.columns.length; ++j, packed += shape.padded_depth) {
      const int64_t column = grid.columns.position[j];
      const bool inside = row_inside && column >= 0;
      for (int64_t c = inside ? last : 0; c <= last; c += kWidth<P>) store(packed + c, Vec<P>{});
      if (inside) {
        const S* pixel = first + column * image.column_stride;
        prefetch_row_below(image, pixel, shape.head_dim);
        prefetch_next_head(pixel, shape.head_dim);
        scale_channels(pixel, shape.head_dim, of_row == nullptr ? scale : scale * of_row[column], packed);
      }
    }
  }
}

// Packs rows into panels of columns. A panel holds, operand by operand, its vectors of keys.
template <typename P>
SAVL_NOINLINE void pack_panels(const P* rows, int keys, const AttentionShape<P>& shape, P* panels) {
  for_panels<P>(round_up(keys, kKeyStep<P>), [&]<int kVectors>(int64_t first) {
    constexpr int64_t kColumns = kVectors * kWidth<P>;
    P* panel = panels + first * shape.depth;
    for (int64_t j = 0; j < kColumns; j += kWidth<P>) {
      for (int64_t c = 0; c < shape.depth; c += kWidth<P>) {
        Vec<P> block[kWidth<P>];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kWidth<P>; ++i) {
          const int64_t key = first + j + i;
          block[i] = key < keys ? load(rows + key * shape.padded_depth + c) : Vec<P>{};
        }
        transpose<P>(block);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kWidth<P>; ++i) {
          if (c + i < shape.depth) store(panel + (c + i) * kColumns + j, block[i]);
        }
      }
    }
  });
}

#if defined(SAVL_BFLOAT16_PAIRS)
// Packs rows, which hold pairs of channels, into rows of pairs: row i of the result has `padded_dim` pairs of a channel
// of row 2 i and the same channel of row 2 i + 1. Rows of zeros follow up to the next multiple of kKeyStep.
SAVL_NOINLINE inline void pair_rows(const BFloat16Pair* rows, int64_t count, const AttentionShape<BFloat16Pair>& shape,
                                    BFloat16Pair* pairs) {
  const auto* numbers = reinterpret_cast<const BFloat16*>(rows);
  for (int64_t i = 0; i < round_up(count, kKeyStep<BFloat16Pair>); i += 2, pairs += shape.padded_dim) {
    const BFloat16* row = numbers + i * 2 * shape.padded_depth;
    for (int64_t c = 0; c < shape.padded_dim; c += kWidth<BFloat16Pair>) {
      Vec<BFloat16Pair> pair{};
      if (i < count) pair = load_bits(row + c);
      if (i + 1 < count) pair |= load_bits(row + 2 * shape.padded_depth + c) << 16;
      store(pairs + c, pair);
    }
  }
}
#endif

// Packs pairs of rows in place so that their last vectors share one (cpu/panels.h), if the shape says so. A pair is
// stored as the vectors of its first row without the last one, those of its second row, and one vector that interleaves
// both last ones. An odd last row is paired with zeros, so `rows` must have room for an even number of rows. For 24
// channels, as in HAT, this saves a quarter of the multiplications of the softmax weights and the values.
template <typename P>
SAVL_INLINE void share_last_vectors(P* rows, int64_t count, const AttentionShape<P>& shape) {
  if constexpr (kSharesVectors<P>) {
    if (!shape.shares_last_vectors) return;
    const int64_t whole = shape.padded_dim - kWidth<P>;
    P* to = rows;
    for (int64_t i = 0; i < count; i += 2, to += 2 * whole + kWidth<P>) {
      const P *first = rows + i * shape.padded_dim, *second = first + shape.padded_dim;
      const bool exists = i + 1 < count;
      const Vec<P> last = interleave<P>(load(first + whole), exists ? load(second + whole) : Vec<P>{});
      for (int64_t c = 0; c < whole; c += kWidth<P>) store(to + c, load(first + c));
      for (int64_t c = 0; c < whole; c += kWidth<P>) store(to + whole + c, exists ? load(second + c) : Vec<P>{});
      store(to + 2 * whole, last);
    }
  }
}

// The scale of the products in the units of the logits: they are multiples of ln 2, so that the softmax is a power of
// two.
constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;
SAVL_INLINE double query_scale(const AttentionArgs& args) { return kLog2E * args.scale; }

// The factors of the scale that queries and logits are multiplied by. As bfloat16, unscaled queries are exact.
template <typename P>
SAVL_INLINE double packed_query_scale(const AttentionArgs& args) {
  return kNumbers<P> == 1 ? query_scale(args) : 1.0;
}
template <typename P>
SAVL_INLINE double logit_scale(const AttentionArgs& args) {
  return kNumbers<P> == 1 ? 1.0 : query_scale(args);
}

// The packed inputs of a window, and the logits of a block of its query rows.
template <typename P>
struct AttentionBuffers {
  P *key_rows, *key_panels;
  P* value_rows;  // rows of operands: a number, or a pair of the numbers of two rows
  P* queries;
  Sum<P>* logits;    // a block of rows of padded_keys, and a vector more
  Sum<P>* products;  // of queries and keys, as large as the logits; for tiles only
  int64_t* offsets;  // of `Addend`

  AttentionBuffers(Scratch& scratch, const AttentionShape<P>& shape)
      : key_rows(scratch.take<P>(shape.padded_keys * shape.padded_depth)),
        key_panels(scratch.take<P>(shape.padded_keys * shape.depth)),
        value_rows(scratch.take<P>(operands_of<P>(shape.padded_keys) * shape.padded_dim)),
        queries(scratch.take<P>(shape.padded_queries * shape.padded_depth)),
        logits(scratch.take<Sum<P>>(kRowBlock * shape.padded_keys + kWidth<P>)),
        products(scratch.take<Sum<P>>(kTiles<P> ? kRowBlock * shape.padded_keys : 0)),
        offsets(scratch.take<int64_t>(shape.padded_keys)) {}

  // Packs keys, values and queries. Keys and queries are multiplied by their factors.
  template <typename S>
  SAVL_INLINE void load(const AttentionArgs& args, const Window& window, const AttentionShape<P>& shape) const {
    if constexpr (kNumbers<P> == 1) {
      pack_rows<S>(window, window.keys, args.v, {}, shape, 1.0, value_rows);
    } else {
      pack_rows<S>(window, window.keys, args.v, {}, shape, 1.0, key_rows);
      pair_rows(key_rows, window.keys.size(), shape, value_rows);
    }
    load_keys<S>(args, window, shape);
    load_queries<S>(window, args.q, args.q_factors, shape, packed_query_scale<P>(args), queries);
  }

  template <typename S>
  SAVL_INLINE void load_keys(const AttentionArgs& args, const Window& window, const AttentionShape<P>& shape) const {
    pack_rows<S>(window, window.keys, args.k, args.k_factors, shape, 1.0, key_rows);
    pack_panels(key_rows, window.keys.size(), shape, key_panels);
  }

  // Packs an image at the queries of a window, with zeros up to the next multiple of kRowStep.
  template <typename S>
  SAVL_INLINE static void load_queries(const Window& window, const Image& image, const RowFactors& factors,
                                       const AttentionShape<P>& shape, double scale, P* packed) {
    pack_rows<S>(window, window.queries, image, factors, shape, scale, packed);
    const int64_t count = window.queries.size();
    zero_rows(packed, count, round_up(count, kRowStep), shape.padded_depth);
  }
};

SAVL_END_KERNELS
