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

// The arguments of window_attention and overlapping_window_attention. For S and T see cpu/kernel.h. Tasks: a head of a
// window forward, a head of a chunk of windows backward.
struct AttentionArgs {
  Image q, k, v;         // S; each begins at the first channel of the first head
  Image out;             // S; written by the forward pass
  const void* severity;  // T (B, H, W) contiguous, or null
  const void* bias;      // T (heads, span, span) in units of ln 2, each row in reverse order, with a vector of padding
  bool bias_is_finite;   // the whole table
  int64_t batch, height, width, heads, head_dim;
  int64_t window, key_window, shift;

  // Backward only. Gradients have dtype T. grad_q is written; grad_k and grad_v are written for plain windows and
  // added to where windows overlap.
  Image grad_out;  // S
  Image grad_q, grad_k, grad_v;
  double* grad_severity;                // (heads, B, H, W), zeros before the call; null where severity is null
  double* grad_bias;                    // (chunks, heads, span, span), zeros before the call, reversed like bias
  int64_t chunks;                       // the windows are divided among this many chunks
  int64_t colour_rows, colour_columns;  // windows that are this far apart share no key
  int64_t colour;                       // the one of colour_rows * colour_columns colours to work on

  int64_t span() const { return window + key_window - 1; }
  int64_t window_rows() const { return height / window; }
  int64_t window_columns() const { return width / window; }
  int64_t forward_tasks() const { return batch * window_rows() * window_columns() * heads; }
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

// Queries and keys that attend to each other. Along each axis, query i and key j are i - j + offset rows apart in the
// bias table. Where a break is set, pixels on different sides of it are masked.
struct Window {
  int64_t batch, head;
  PixelGrid queries, keys;
  int offset;
  int row_break, column_break;
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

// Largest magnitude of the channels of a head over the queries of a window, each multiplied by the severity of its
// pixel if `weigh` is true. The result is NaN or infinity if any of these numbers is.
template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE T largest_magnitude(const AttentionArgs& args, const Image& image, const Window& window, bool weigh) {
  const T* severity = weigh ? static_cast<const T*>(args.severity) : nullptr;
  const auto& [rows, columns] = window.queries;
  Vec<T> largest{}, nonfinite{};  // 0 times infinity or NaN is NaN, and remains NaN
  for (int i = 0; i < rows.length; ++i) {
    for (int j = 0; j < columns.length; ++j) {
      const int64_t row = rows.position[i], column = columns.position[j];
      const S* pixel = pixel_of<S>(image, window, row, column, args.head_dim);
      if (i + 1 < rows.length) prefetch_row_below(image, pixel, args.head_dim);
      const T factor = severity == nullptr ? T(1) : severity[(window.batch * args.height + row) * args.width + column];
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
  const double largest = sizeof(T) == 4 ? 1e37 : 1e300;
  const double q = largest_magnitude<S>(args, args.q, window, true);
  const double k = largest_magnitude<S>(args, args.k, window, true);
  const double v = largest_magnitude<S>(args, args.v, window, false);
  if (args.grad_out.data != nullptr) {
    const double g = largest_magnitude<S>(args, args.grad_out, window, false);
    if (!(g * v * args.head_dim <= largest)) return false;
  }
  return args.bias_is_finite && q * k * args.head_dim <= largest && v <= largest;
}

// The number of coordinates that `for_parts_of_window` needs memory for.
SAVL_INLINE int64_t position_count(const AttentionArgs& args) { return 2 * (args.window + args.key_window); }

// Calls `attend_one(window)` for each part of window number `index` (row by row) of an image.
//
// A shifted window that wraps around the image consists of two or four parts that do not see each other. They are
// attended one by one, without a mask. The masked computation gives another result only where infinities or NaN would
// pass the mask (0 * NaN is NaN): such windows are found beforehand and computed with the mask.
template <typename S, typename Attend>
SAVL_INLINE void for_parts_of_window(const AttentionArgs& args, int64_t batch, int64_t index, int64_t head,
                                     int64_t* positions, const Attend& attend_one) {
  const int64_t row = index / args.window_columns(), column = index % args.window_columns();
  const int length = static_cast<int>(args.window), key_length = static_cast<int>(args.key_window);
  const int margin = (key_length - length) / 2;
  int64_t *query_rows = positions, *query_columns = query_rows + length;
  int64_t *key_rows = query_columns + length, *key_columns = key_rows + key_length;
  for (int i = 0; i < length; ++i) {
    query_rows[i] = (row * length + args.shift + i) % args.height;
    query_columns[i] = (column * length + args.shift + i) % args.width;
  }
  const PixelGrid queries{{query_rows, length}, {query_columns, length}};
  Window window{batch, head, queries, queries, length - 1, 0, 0};
  if (key_length != length) {
    for (int i = 0; i < key_length; ++i) {
      const int64_t y = row * length - margin + i, x = column * length - margin + i;
      key_rows[i] = y < 0 || y >= args.height ? -1 : y;
      key_columns[i] = x < 0 || x >= args.width ? -1 : x;
    }
    window.keys = {{key_rows, key_length}, {key_columns, key_length}};
    window.offset = (length + key_length) / 2 - 1 + margin;  // keys are counted from margin before the queries
  }
  if (args.shift != 0) {
    const int broken = length - static_cast<int>(args.shift);
    window.row_break = row + 1 == args.window_rows() ? broken : 0;
    window.column_break = column + 1 == args.window_columns() ? broken : 0;
  }
  if (!window.is_masked() || !mask_is_tight<S>(args, window)) {
    attend_one(window);
    return;
  }
  const int row_ends[3] = {0, window.row_break, length}, column_ends[3] = {0, window.column_break, length};
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      const PixelGrid part{{query_rows + row_ends[i], row_ends[i + 1] - row_ends[i]},
                           {query_columns + column_ends[j], column_ends[j + 1] - column_ends[j]}};
      if (part.size() > 0) attend_one(Window{batch, head, part, part, length - 1, 0, 0});
    }
  }
}

SAVL_END_KERNELS
