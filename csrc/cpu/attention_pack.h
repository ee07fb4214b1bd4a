// Packs the channels of a window's pixels for the attention kernels, and writes results back to pixels.
#pragma once

#include <cstdint>

#include "cpu/attention_window.h"
#include "cpu/simd.h"

SAVL_BEGIN_KERNELS

constexpr int kRowTile = 4;  // query rows that share loads of keys and values in registers
constexpr int kPanel = 3;    // vectors of columns in registers: there are kRowTile * kPanel accumulators
// benchmarks/cpu_blocks.py builds and compares other sizes; these are the fastest.
#ifndef SAVL_ROW_BLOCK
#define SAVL_ROW_BLOCK 16
#endif
#ifndef SAVL_KEY_BLOCK
#define SAVL_KEY_BLOCK 64
#endif
constexpr int kRowBlock = SAVL_ROW_BLOCK;  // query rows whose logits are in the cache at the same time
constexpr int kKeyBlock = SAVL_KEY_BLOCK;  // values in the first-level cache at the same time

// Keys are padded to whole vectors, and to whole tiles where those are wider.
template <typename T>
constexpr int kKeyStep = kWidth<T> < kRowTile ? kRowTile : kWidth<T>;

// The sizes of the buffers of a window, which depend on shape alone.
template <typename T>
struct AttentionShape {
  int64_t head_dim, padded_dim;  // channels of a head, and the same rounded up to whole vectors
  int64_t most_queries, most_keys, padded_queries, padded_keys;

  explicit AttentionShape(const AttentionArgs& args)
      : head_dim(args.head_dim),
        padded_dim(round_up(args.head_dim, kWidth<T>)),
        most_queries(args.window * args.window),
        most_keys(args.key_window * args.key_window),
        padded_queries(round_up(most_queries, kRowTile)),
        padded_keys(round_up(most_keys, kKeyStep<T>)) {}
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

// Multiplies the channels of a pixel by a factor, in double: see `pack_rows`.
template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE void scale_channels(const S* pixel, int64_t channels, double factor, T* scaled) {
  const bool done = for_overlapping_vectors<T>(channels, [&](int64_t c) SAVL_ALWAYS_INLINE {
    store(scaled + c, factor == 1.0 ? load_wide(pixel + c) : times(load_wide(pixel + c), factor));
  });
  for (int64_t c = done ? channels : 0; c < channels; ++c) scaled[c] = static_cast<T>(widen(pixel[c]) * factor);
}

// Multiplies channels by a factor and writes them to a pixel.
template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE void write_channels(const T* channels, int64_t count, T factor, S* pixel) {
  const bool done = for_overlapping_vectors<T>(
      count, [&](int64_t c) SAVL_ALWAYS_INLINE { store_narrow(pixel + c, load(channels + c) * factor); });
  for (int64_t c = done ? count : 0; c < count; ++c) pixel[c] = narrow<S>(channels[c] * factor);
}

template <typename T>
SAVL_INLINE void zero_rows(T* rows, int64_t first, int64_t last, int64_t stride) {
  for (T* element = rows + first * stride; element < rows + last * stride; ++element) *element = 0;
}

// Packs the pixels of a grid into rows of `padded_dim` numbers, with zeros after the channels and for pixels outside
// the image. Each row is multiplied by `scale` and, if `weigh` is true, by the severity of its pixel.
//
// The factors are double and the product is rounded once: the rounding error of a float factor would be the same for a
// whole row, and would add up in its logits instead of averaging out.
template <typename S, typename T>
SAVL_NOINLINE void pack_rows(const AttentionArgs& args, const Window& window, const PixelGrid& grid, const Image& image,
                             const AttentionShape<T>& shape, bool weigh, double scale, T* packed) {
  const T* severity = weigh ? static_cast<const T*>(args.severity) : nullptr;
  const int64_t last = shape.padded_dim - kWidth<T>;
  for (int i = 0; i < grid.rows.length; ++i) {
    const bool row_inside = grid.rows.position[i] >= 0;
    const int64_t row = row_inside ? grid.rows.position[i] : 0;
    const S* first = pixel_of<S>(image, window, row, 0, shape.head_dim);
    const T* factors = severity == nullptr ? nullptr : severity + (window.batch * args.height + row) * args.width;
    for (int j = 0; j < grid.columns.length; ++j, packed += shape.padded_dim) {
      const int64_t column = grid.columns.position[j];
      const bool inside = row_inside && column >= 0;
      for (int64_t c = inside ? last : 0; c <= last; c += kWidth<T>) store(packed + c, Vec<T>{});
      if (inside) {
        const S* pixel = first + column * image.column_stride;
        prefetch_row_below(image, pixel, shape.head_dim);
        scale_channels(pixel, shape.head_dim, factors == nullptr ? scale : scale * factors[column], packed);
      }
    }
  }
}

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

// Packs rows into panels of columns. A panel holds, channel by channel, its vectors of keys.
template <typename T>
SAVL_NOINLINE void pack_panels(const T* rows, int keys, const AttentionShape<T>& shape, T* panels) {
  for_panels<T>(round_up(keys, kKeyStep<T>), [&]<int kVectors>(int64_t first) {
    constexpr int64_t kColumns = kVectors * kWidth<T>;
    T* panel = panels + first * shape.head_dim;
    for (int64_t j = 0; j < kColumns; j += kWidth<T>) {
      for (int64_t c = 0; c < shape.head_dim; c += kWidth<T>) {
        Vec<T> block[kWidth<T>];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kWidth<T>; ++i) {
          const int64_t key = first + j + i;
          block[i] = key < keys ? load(rows + key * shape.padded_dim + c) : Vec<T>{};
        }
        transpose<T>(block);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kWidth<T>; ++i) {
          if (c + i < shape.head_dim) store(panel + (c + i) * kColumns + j, block[i]);
        }
      }
    }
  });
}

// 1 / sqrt(head_dim) in the units of the logits: they are multiples of ln 2, so that the softmax is a power of two.
constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;
SAVL_INLINE double query_scale(const AttentionArgs& args) {
  return kLog2E / __builtin_sqrt(static_cast<double>(args.head_dim));
}

// The packed inputs of a window, and the logits of a block of its query rows.
template <typename T>
struct AttentionBuffers {
  T *key_rows, *key_panels, *value_rows, *queries;
  T* logits;         // a block of rows of padded_keys, and a vector more
  int64_t* offsets;  // of `Addend`

  AttentionBuffers(Scratch& scratch, const AttentionShape<T>& shape)
      : key_rows(scratch.take<T>(shape.most_keys * shape.padded_dim)),
        key_panels(scratch.take<T>(shape.padded_keys * shape.head_dim)),
        value_rows(scratch.take<T>(shape.most_keys * shape.padded_dim)),
        queries(scratch.take<T>(shape.padded_queries * shape.padded_dim)),
        logits(scratch.take<T>(kRowBlock * shape.padded_keys + kWidth<T>)),
        offsets(scratch.take<int64_t>(shape.padded_keys)) {}

  // Packs keys, values and queries. Keys and queries are multiplied by the severity of their pixel.
  template <typename S>
  SAVL_INLINE void load(const AttentionArgs& args, const Window& window, const AttentionShape<T>& shape) const {
    pack_rows<S>(args, window, window.keys, args.k, shape, true, 1.0, key_rows);
    pack_panels(key_rows, window.keys.size(), shape, key_panels);
    pack_rows<S>(args, window, window.keys, args.v, shape, false, 1.0, value_rows);
    load_queries<S>(args, window, args.q, shape, true, query_scale(args), queries);
  }

  // Packs an image at the queries of a window, with zeros up to the next multiple of kRowTile.
  template <typename S>
  SAVL_INLINE static void load_queries(const AttentionArgs& args, const Window& window, const Image& image,
                                       const AttentionShape<T>& shape, bool weigh, double scale, T* packed) {
    pack_rows<S>(args, window, window.queries, image, shape, weigh, scale, packed);
    const int64_t count = window.queries.size();
    zero_rows(packed, count, round_up(count, kRowTile), shape.padded_dim);
  }
};

SAVL_END_KERNELS
