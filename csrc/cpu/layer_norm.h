// Layer normalisation of rows of channels. A row is read from memory once, in its own dtype, into a line of the
// arithmetic dtype, which is padded to whole vectors and stays in the first-level cache. The backward pass also adds up
// the gradients of weight and bias over the rows of a chunk.
#pragma once

#include <cstdint>

#include "cpu/kernel.h"
#include "cpu/simd.h"

namespace savl::cpu {

// Rows of `channels` contiguous elements; `*_stride` is the distance between rows, in elements. For S and T see
// cpu/kernel.h. Tasks: rows forward, chunks of rows backward.
struct LayerNormArgs {
  const void* x;  // S
  int64_t x_stride;
  const void *weight, *bias;  // T (channels)
  double eps;
  void* out;             // contiguous, written; S, or float32 where output_is_float
  void *mean, *inverse;  // T (rows): written by the forward pass, read by the backward pass
  int64_t rows, channels;
  bool output_is_float;  // out and grad_out are float32 although x is bfloat16

  // Backward only
  const void* grad_out;
  int64_t grad_out_stride;
  void* grad_x;  // S, contiguous, written
  int64_t chunk_rows;
  double* sums;  // (chunks, 2, channels), zeros before the call: gradients of weight and bias
};

}  // namespace savl::cpu

SAVL_BEGIN_KERNELS

SAVL_INLINE float square_root(float value) { return __builtin_sqrtf(value); }
SAVL_INLINE double square_root(double value) { return __builtin_sqrt(value); }

// The buffers of a task: lines of `padded` numbers.
template <typename T>
struct LayerNormLines {
  int64_t padded;
  Scratch scratch;
  T *weight, *bias, *row, *weighted, *grad_weight, *grad_bias;

  explicit LayerNormLines(const LayerNormArgs& args)
      : padded(round_up(args.channels, kWidth<T>)), scratch(6 * Scratch::bytes<T>(padded)) {
    for (T** line : {&weight, &bias, &row, &weighted, &grad_weight, &grad_bias}) *line = scratch.take<T>(padded);
    copy(args, static_cast<const T*>(args.weight), weight);
    copy(args, static_cast<const T*>(args.bias), bias);
  }

  template <typename S>
  SAVL_INLINE void copy(const LayerNormArgs& args, const S* from, T* to) const {
    for_vectors<T>(args.channels,
                   [&](int64_t c, int64_t lanes) SAVL_ALWAYS_INLINE { store(to + c, load_some(from + c, lanes)); });
  }

  template <typename Work>
  SAVL_INLINE void for_all(const Work& work) const {
    for (int64_t c = 0; c < padded; c += kWidth<T>) work(c);
  }
};

// R is the storage type of the output: S or float.
template <typename S, typename R, typename T>
SAVL_INLINE void layer_norm_row(const LayerNormArgs& args, const LayerNormLines<T>& lines, int64_t row) {
  const S* x = static_cast<const S*>(args.x) + row * args.x_stride;
  R* out = static_cast<R*>(args.out) + row * args.channels;
  const T channels = static_cast<T>(args.channels);
  Vec<T> sum{}, squares{};
  for_vectors<T>(args.channels, [&](int64_t c, int64_t lanes) SAVL_ALWAYS_INLINE {
    const Vec<T> numbers = load_some(x + c, lanes);
    store(lines.row + c, numbers);
    sum += numbers;
  });
  const T mean = sum_of<T>(sum) / channels;
  for (int64_t c = args.channels; c < lines.padded; ++c) lines.row[c] = mean;  // the padding adds no squares
  lines.for_all([&](int64_t c) SAVL_ALWAYS_INLINE {
    const Vec<T> centred = load(lines.row + c) - mean;
    store(lines.row + c, centred);
    squares += centred * centred;
  });
  const T inverse = 1 / square_root(sum_of<T>(squares) / channels + static_cast<T>(args.eps));
  for_vectors<T>(args.channels, [&](int64_t c, int64_t lanes) SAVL_ALWAYS_INLINE {
    const Vec<T> normed = load(lines.row + c) * inverse;
    store_some(out + c, normed * load(lines.weight + c) + load(lines.bias + c), lanes);
  });
  static_cast<T*>(args.mean)[row] = mean;
  static_cast<T*>(args.inverse)[row] = inverse;
}

// Adds to `lines.grad_weight` and `lines.grad_bias`.
template <typename S, typename R, typename T>
SAVL_INLINE void layer_norm_row_backward(const LayerNormArgs& args, const LayerNormLines<T>& lines, int64_t row) {
  const S* x = static_cast<const S*>(args.x) + row * args.x_stride;
  const R* grad_out = static_cast<const R*>(args.grad_out) + row * args.grad_out_stride;
  S* grad_x = static_cast<S*>(args.grad_x) + row * args.channels;
  const T channels = static_cast<T>(args.channels);
  const T mean = static_cast<const T*>(args.mean)[row], inverse = static_cast<const T*>(args.inverse)[row];
  Vec<T> sum{}, along{};
  for_vectors<T>(args.channels, [&](int64_t c, int64_t lanes) SAVL_ALWAYS_INLINE {
    const Vec<T> given = load_some(grad_out + c, lanes);  // 0 in the padding
    const Vec<T> normed = (load_some(x + c, lanes) - mean) * inverse;
    const Vec<T> weighted = given * load(lines.weight + c);
    sum += weighted;
    along += weighted * normed;
    store(lines.grad_weight + c, load(lines.grad_weight + c) + given * normed);
    store(lines.grad_bias + c, load(lines.grad_bias + c) + given);
    store(lines.row + c, normed);
    store(lines.weighted + c, weighted);
  });
  const T mean_sum = sum_of<T>(sum) / channels, mean_along = sum_of<T>(along) / channels;
  for_vectors<T>(args.channels, [&](int64_t c, int64_t lanes) SAVL_ALWAYS_INLINE {
    const Vec<T> change = load(lines.weighted + c) - mean_sum - load(lines.row + c) * mean_along;
    store_some(grad_x + c, change * inverse, lanes);
  });
}

template <typename S>
void layer_norm_kernel(const LayerNormArgs& args, int64_t begin, int64_t end) {
  const LayerNormLines<Arithmetic<S>> lines(args);
  with_output_type<S>(args.output_is_float, [&]<typename R>() SAVL_ALWAYS_INLINE {
    for (int64_t row = begin; row < end; ++row) layer_norm_row<S, R>(args, lines, row);
  });
}

// Tasks are chunks of rows. The sums of a few rows at a time are added to those of the chunk in double, which keeps
// rounding errors small.
template <typename S>
void layer_norm_backward_kernel(const LayerNormArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t kFewRows = 16;
  const LayerNormLines<Arithmetic<S>> lines(args);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t last = smaller((chunk + 1) * args.chunk_rows, args.rows);
    double* sums = args.sums + chunk * 2 * args.channels;
    for (int64_t first = chunk * args.chunk_rows; first < last; first += kFewRows) {
      for (int64_t c = 0; c < lines.padded; ++c) lines.grad_weight[c] = lines.grad_bias[c] = 0;
      with_output_type<S>(args.output_is_float, [&]<typename R>() SAVL_ALWAYS_INLINE {
        for (int64_t row = first; row < smaller(first + kFewRows, last); ++row) {
          layer_norm_row_backward<S, R>(args, lines, row);
        }
      });
      for (int64_t c = 0; c < args.channels; ++c) {
        sums[c] += lines.grad_weight[c];
        sums[args.channels + c] += lines.grad_bias[c];
      }
    }
  }
}

SAVL_END_KERNELS
