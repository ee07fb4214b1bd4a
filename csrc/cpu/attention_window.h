// The arguments of the attention kernels, and the geometry of a window: which pixels attend to which.
#pragma once

#include <cstdint>

#include "cpu/kernel.h"
#include "cpu/simd.h"

namespace savl::cpu {

// A tensor (B, H, W, channels) with contiguous channels; strides in elements. The kernel knows the dtype.
struct Image {
  const void* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0, column_stride = 0;
};

// The sizes along one axis of the image, in pixels.
struct AxisSizes {
  int64_t pixels, key_pixels;  // of the image of the queries, and of the image of the keys and values
  int64_t window, key_window;
  int64_t shift, key_shift;

  int64_t windows() const { return pixels / window; }
  int64_t span() const { return window + key_window - 1; }  // the differences of a query and a key
};

// Numbers that the rows of q or k are multiplied by before their product, one for each head and pixel, or for each
// pixel: the severity, or the factors of the cosine (cpu/attention_cosine.h).
struct RowFactors {
  const void* values = nullptr;  // T; null for no factors
  int64_t head_stride = 0, batch_stride = 0, row_stride = 0;
  double* gradient = nullptr;  // (heads, B, H, W), zeros before the backward pass
  int64_t gradient_head_stride = 0;

  int64_t pixel(int64_t batch, int64_t row, int64_t column) const {
    return batch * batch_stride + row * row_stride + column;
  }
};

// The arguments of window_attention and overlapping_window_attention. For S and T see cpu/kernel.h. A
// forward task computes one head of one window, a backward task one head of one chunk of windows.
struct AttentionArgs {
  Image q, k, v;  // S; each begins at the first channel of the first head
  Image out;      // S; written by the forward pass
  RowFactors q_factors, k_factors;
  double scale;  // of the products of q and k, after the factors

  // The bias: T, divided by ln 2, because the softmax uses powers of 2, and followed by a SIMD vector of padding. A
  // table is (heads, rows.span(), columns.span()), each row in reverse order. A dense bias is (heads, queries, keys);
  // its strides are 0 where the values are the same.
  const void* bias;
  bool bias_is_table, bias_is_finite;  // finite: the whole bias
  int64_t bias_head_stride, bias_query_stride;
  double mask;  // added to logits between different sides of a shifted image, in units of ln 2

  int64_t batch, heads, head_dim;
  AxisSizes rows, columns;
  bool dilated;      // adjacent pixels of a window are windows() pixels apart along each axis
  bool overlapping;  // key windows lie around the windows; otherwise they partition their image as the windows do

  // Backward only. Gradients have dtype T. grad_q is overwritten. grad_k and grad_v are overwritten too, unless windows
  // overlap: then the gradients are added to them.
  Image grad_out;  // S
  Image grad_q, grad_k, grad_v;
  double* grad_bias;                    // (chunks, heads, bias_size()), zeros before the call, like bias; or null
  int64_t chunks;                       // the windows are divided among this many chunks
  int64_t colour_rows, colour_columns;  // windows that are this far apart share no key
  int64_t colour;                       // the one of colour_rows * colour_columns colours to work on

  int64_t queries() const { return rows.window * columns.window; }
  int64_t keys() const { return rows.key_window * columns.key_window; }
  int64_t bias_size() const { return bias_is_table ? rows.span() * columns.span() : queries() * keys(); }
  // From the bias of a key to that of the key below it.
  int64_t bias_row_step() const { return bias_is_table ? -columns.span() : columns.key_window; }
  int64_t windows() const { return rows.windows() * columns.windows(); }
  int64_t forward_tasks() const { return batch * windows() * heads; }
  int64_t backward_tasks() const { return chunks * heads; }
};

}  // namespace savl::cpu

SAVL_BEGIN_KERNELS

// The pixels of a window along one axis: image coordinates, -1 outside the image.
struct Axis {
  const int64_t* position;
  int length;
};

// The pixels of a window.
struct PixelGrid {
  Axis rows, columns;
  int size() const { return rows.length * columns.length; }
};

// The first pixel of a grid, counted in pixels of its window.
struct Origin {
  int row = 0, column = 0;
};

// Queries and keys that attend to each other. Along each axis, query i and key j are i - j + offset rows apart in the
// bias table. Where a break is set, pixels on different sides of it are masked.
struct Window {
  int64_t batch, head;
  PixelGrid queries, keys;
  int row_offset, column_offset;
  int row_break = 0, column_break = 0, key_row_break = 0, key_column_break = 0;
  Origin first_query{}, first_key{};
  bool is_masked() const { return row_break != 0 || column_break != 0; }
};

// One pixel of a grid. Pixels are counted row by row.
struct Place {
  int row, column, columns;
  Place(const PixelGrid& grid, int64_t index)
      : row(static_cast<int>(index) / grid.columns.length),
        column(static_cast<int>(index) % grid.columns.length),
        columns(grid.columns.length) {}
  SAVL_INLINE void next() {
    if (++column == columns) {
      column = 0;
      ++row;
    }
  }
};

template <typename S>
SAVL_INLINE const S* pixel_of(const Image& image, const Window& window, int64_t row, int64_t column, int64_t head_dim) {
  return static_cast<const S*>(image.data) + window.batch * image.batch_stride + row * image.row_stride +
         column * image.column_stride + window.head * head_dim;
}

// Prefetches the pixel in the next row of the image, which is too far away for the processor to prefetch by itself.
template <typename S>
SAVL_INLINE void prefetch_row_below(const Image& image, const S* pixel, int64_t head_dim) {
  prefetch_after(pixel, image.row_stride);
  prefetch_after(pixel, image.row_stride + head_dim - 1);
}

// Prefetches the same pixel for the next head of the window, which is the next task, into the second-level cache.
template <typename S>
SAVL_INLINE void prefetch_next_head(const S* pixel, int64_t head_dim) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(pixel) + 2 * head_dim * sizeof(S) - 1),
                     0, 2);
}

// Largest magnitude of the channels of a head over the pixels of a grid, each multiplied by the factor of its pixel.
// The result is NaN or infinity if any of these numbers is.
template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE T largest_magnitude(const AttentionArgs& args, const Image& image, const Window& window,
                                const PixelGrid& grid, const RowFactors& factors) {
  const T* values = static_cast<const T*>(factors.values);
  const auto& [rows, columns] = grid;
  Vec<T> largest{}, nonfinite{};  // 0 times infinity or NaN is NaN, and remains NaN
  for (int i = 0; i < rows.length; ++i) {
    for (int j = 0; j < columns.length; ++j) {
      const int64_t row = rows.position[i], column = columns.position[j];
      const S* pixel = pixel_of<S>(image, window, row, column, args.head_dim);
      if (i + 1 < rows.length) prefetch_row_below(image, pixel, args.head_dim);
      T factor = 1;
      if (values != nullptr) {
        factor = values[window.head * factors.head_stride + factors.pixel(window.batch, row, column)];
      }
      for (int64_t c = 0; c < args.head_dim; c += kWidth<T>) {
        const Vec<T> value = load_some(pixel + c, smaller(kWidth<T>, args.head_dim - c)) * factor;
        largest = larger(larger(value, -value), largest);
        nonfinite += value * T(0);
      }
    }
  }
  return largest_of<T>(largest) + sum_of<T>(nonfinite);
}

// Whether a masked pixel cannot influence the result of a window that wraps around: all values are finite and no
// product overflows.
template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE bool mask_is_tight(const AttentionArgs& args, const Window& window) {
  if (args.mask != -__builtin_inf()) return false;
  const double largest = sizeof(T) == 4 ? 1e37 : 1e300;
  const RowFactors none;
  const double q = largest_magnitude<S>(args, args.q, window, window.queries, args.q_factors);
  const double k = largest_magnitude<S>(args, args.k, window, window.keys, args.k_factors);
  const double v = largest_magnitude<S>(args, args.v, window, window.keys, none);
  if (args.grad_out.data != nullptr) {
    const double g = largest_magnitude<S>(args, args.grad_out, window, window.queries, none);
    if (!(g * v * args.head_dim <= largest)) return false;
  }
  return args.bias_is_finite && q * k * args.head_dim <= largest && v <= largest;
}

// The number of coordinates that `for_parts_of_window` needs memory for.
SAVL_INLINE int64_t position_count(const AttentionArgs& args) {
  return args.rows.window + args.rows.key_window + args.columns.window + args.columns.key_window;
}

// Writes the coordinates of the pixels of window number `index` along an axis.
SAVL_INLINE void place_pixels(int64_t index, int64_t windows, int64_t window, int64_t shift, int64_t pixels,
                              bool dilated, int64_t* positions) {
  for (int64_t i = 0; i < window; ++i) {
    const int64_t position = dilated ? i * windows + index : index * window + shift + i;
    positions[i] = position < pixels ? position : position - pixels;
  }
}

// Writes the coordinates of the keys of window number `index` along an axis: -1 outside the image.
SAVL_INLINE void place_keys(const AttentionArgs& args, const AxisSizes& axis, int64_t index, int64_t* positions) {
  if (!args.overlapping) {
    return place_pixels(index, axis.windows(), axis.key_window, axis.key_shift, axis.key_pixels, args.dilated,
                        positions);
  }
  const int64_t first = index * axis.window - (axis.key_window - axis.window) / 2;
  for (int64_t i = 0; i < axis.key_window; ++i) {
    positions[i] = first + i < 0 || first + i >= axis.key_pixels ? -1 : first + i;
  }
}

// Calls `attend_one(window)` for each part of window number `index` (row by row) of an image.
//
// A shifted window that wraps around the image consists of two or four parts that do not see each other. They are
// attended one by one, without a mask. The masked computation gives another result only where infinities or NaN would
// pass the mask (0 * NaN is NaN): such windows are found beforehand and computed with the mask. With a finite mask, the
// parts see each other, and all windows that wrap around are computed with it.
template <typename S, typename Attend>
SAVL_INLINE void for_parts_of_window(const AttentionArgs& args, int64_t batch, int64_t index, int64_t head,
                                     int64_t* positions, const Attend& attend_one) {
  const AxisSizes &rows = args.rows, &columns = args.columns;
  const int64_t row = index / columns.windows(), column = index % columns.windows();
  int64_t *query_rows = positions, *query_columns = query_rows + rows.window;
  int64_t *key_rows = query_columns + columns.window, *key_columns = key_rows + rows.key_window;
  place_pixels(row, rows.windows(), rows.window, rows.shift, rows.pixels, args.dilated, query_rows);
  place_pixels(column, columns.windows(), columns.window, columns.shift, columns.pixels, args.dilated, query_columns);
  place_keys(args, rows, row, key_rows);
  place_keys(args, columns, column, key_columns);
  const PixelGrid queries{{query_rows, static_cast<int>(rows.window)},
                          {query_columns, static_cast<int>(columns.window)}};
  const PixelGrid keys{{key_rows, static_cast<int>(rows.key_window)},
                       {key_columns, static_cast<int>(columns.key_window)}};
  // Query i and key j are i - j + (key window - window) / 2 pixels apart, which is (window + key window) / 2 - 1 more
  // in the table.
  const int row_offset = keys.rows.length - 1, column_offset = keys.columns.length - 1;
  Window window{batch, head, queries, keys, row_offset, column_offset};
  if (rows.shift != 0 && row + 1 == rows.windows()) {
    window.row_break = static_cast<int>(rows.window - rows.shift);
    window.key_row_break = static_cast<int>(rows.key_window - rows.key_shift);
  }
  if (columns.shift != 0 && column + 1 == columns.windows()) {
    window.column_break = static_cast<int>(columns.window - columns.shift);
    window.key_column_break = static_cast<int>(columns.key_window - columns.key_shift);
  }
  if (!window.is_masked() || !mask_is_tight<S>(args, window)) {
    attend_one(window);
    return;
  }
  const int row_ends[] = {0, window.row_break, queries.rows.length};
  const int column_ends[] = {0, window.column_break, queries.columns.length};
  const int key_row_ends[] = {0, window.key_row_break, keys.rows.length};
  const int key_column_ends[] = {0, window.key_column_break, keys.columns.length};
  const auto part = [](const Axis& axis, const int* ends, int i) {
    return Axis{axis.position + ends[i], ends[i + 1] - ends[i]};
  };
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      Window one{batch,
                 head,
                 {part(queries.rows, row_ends, i), part(queries.columns, column_ends, j)},
                 {part(keys.rows, key_row_ends, i), part(keys.columns, key_column_ends, j)},
                 row_offset,
                 column_offset};
      one.first_query = {row_ends[i], column_ends[j]};
      one.first_key = {key_row_ends[i], key_column_ends[j]};
      if (one.queries.size() > 0) attend_one(one);
    }
  }
}

SAVL_END_KERNELS
