// The arguments of a convolution, and the packing of its weights and of a tile of pixels: see cpu/convolution.h.
#pragma once

#include <cstdint>

#include "cpu/kernel.h"
#include "cpu/panels.h"
#include "cpu/simd.h"

namespace savl::cpu {

// The values of `activation` in the op's schema.
enum class Activation : int64_t { kNone = 0, kGelu = 1, kLeakyRelu = 2 };

// Pixels have contiguous channels; `*_stride` is the distance between pixels, in elements. For S and T see
// cpu/kernel.h. Tasks: groups of output channels if `packing` is true, otherwise tiles of pixels.
struct ConvolutionArgs {
  static constexpr int64_t kGroup = 16;  // output channels; the number of lanes of the widest vector
  bool packing;
  const void* x;                     // S, or T where x_is_float
  bool x_is_float, output_is_float;  // x, or residual and out, are float32 although S is bfloat16
  int64_t x_stride;
  int64_t batch, height, width, channels, outputs;
  int64_t side, dilation;               // of the kernel; side is 1 or 3
  const void *norm_weight, *norm_bias;  // T (channels), or null for no layer norm
  double eps;
  const void* weight;  // T (outputs, channels, side, side)
  void* panels;        // packed_operands() operands; written by the first step
  const void* bias;    // T (outputs), or null
  Activation activation;
  double slope;                         // of the leaky ReLU
  const void *residual, *gamma, *beta;  // S, or null; residual T where output_is_float
  int64_t residual_stride, gamma_stride, beta_stride;
  const void* gate;                 // T (batch, gate_rows, gate_columns, outputs), or null
  int64_t gate_rows, gate_columns;  // they divide height and width
  void* out;                        // S, or T where output_is_float; contiguous, written
  void* kept;                       // S, contiguous, written: the sum before the activation; or null

  // Sizes of tiles. Adjacent tiles of a 3×3 kernel pack the pixels between them twice.
  int64_t tile_height() const { return side == 1 ? 1 : 8; }
  int64_t tile_width() const { return side == 1 ? 64 : 32; }
  int64_t tiles_down() const { return quotient(height, tile_height()); }
  int64_t tiles_across() const { return quotient(width, tile_width()); }
  int64_t tiles() const { return batch * tiles_down() * tiles_across(); }
  int64_t groups() const { return quotient(outputs, kGroup); }
  // An upper bound of the packed operands for all instruction sets, which may pad both sides of the weight.
  int64_t packed_operands() const { return side * side * quotient(channels, 32) * 32 * groups() * kGroup; }
  static int64_t quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }
};

}  // namespace savl::cpu

SAVL_BEGIN_KERNELS

// Pixels whose sums are in registers at the same time.
#if defined(SAVL_BFLOAT16_TILES)
constexpr int kPixels = kTileRows;
#elif SAVL_VECTOR_BYTES == 64
constexpr int kPixels = 8;
#else
constexpr int kPixels = 4;
#endif

// Between segments, and after kLongestSum operands of a segment, a sum of at least kLongSum operands is added to a
// second accumulator and begins again at 0, which reduces the rounding error. AMX does not do this.
constexpr int64_t kLongSum = 64, kLongestSum = 256;
static_assert(kLongestSum % 2 == 0);  // two of them may share a vector

// The sizes of tiles and buffers. P is the type of the operands.
template <typename P>
struct ConvolutionShape {
  using T = Sum<P>;
  int64_t depth;                        // operands of a pixel
  int64_t columns;                      // output channels, padded to whole vectors
  bool shared;                          // whether two operands share a vector of columns: cpu/panels.h
  int64_t halo;                         // pixels around a tile
  int64_t packed_width, packed_height;  // of a packed tile, in pixels
  int64_t segments, segment;            // contiguous parts of the sum, and operands of each
  int64_t offset[9];                    // of each segment from the packed pixel at the upper left of the kernel

  explicit ConvolutionShape(const ConvolutionArgs& args)
      : depth(round_up(operands_of<P>(args.channels), kDepthStep)),
        columns(round_up(args.outputs, kWidth<T>)),
        shared(kSharesVectors<P> && args.outputs <= kWidth<T> / 2 && depth % 2 == 0),
        halo(args.side / 2 * args.dilation),
        packed_width(round_up(smaller(args.tile_width(), args.width), kPixels) + 2 * halo),
        packed_height(smaller(args.tile_height(), args.height) + 2 * halo) {
    const bool together = args.dilation == 1;  // the taps of a row of the kernel
    segments = together ? args.side : args.side * args.side;
    segment = together ? args.side * depth : depth;
    for (int64_t i = 0; i < segments; ++i) {
      const int64_t row = together ? i : i / args.side, column = together ? 0 : i % args.side;
      offset[i] = (row * packed_width + column) * args.dilation * depth;
    }
  }
  // One vector more, because pixels are written in whole vectors.
  int64_t packed_operands() const { return packed_height * packed_width * depth + kWidth<P>; }
  int64_t operands() const { return segments * segment; }
};

// Packing the weights

// Writes a vector of output channels, from channel `first` on, to `to`, in a panel of `stride` columns.
template <typename P, typename T = Sum<P>>
SAVL_NOINLINE void pack_weight_column(const ConvolutionArgs& args, const ConvolutionShape<P>& shape, int64_t first,
                                      int64_t stride, P* to, T* lines) {
  constexpr int64_t kLanes = kWidth<T>;
  const int64_t taps = args.side * args.side, length = args.channels * taps;
  const T* weight = static_cast<const T*>(args.weight) + first * length;
  const auto transpose_block = [&](int64_t k, const auto& load_row) SAVL_ALWAYS_INLINE {
    Vec<T> block[kLanes];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) block[i] = load_row(i);
    transpose<T>(block);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) store(lines + (k + i) * kLanes, block[i]);
  };
  for (int64_t k = 0; k < length; k += kLanes) {  // lines[k]: weight k of every output channel
    if (k + kLanes <= length && first + kLanes <= args.outputs) {
      transpose_block(k, [&](int64_t i) SAVL_ALWAYS_INLINE { return load(weight + i * length + k); });
    } else {
      transpose_block(k, [&](int64_t i) SAVL_ALWAYS_INLINE {
        return first + i < args.outputs ? load_some(weight + i * length + k, smaller(kLanes, length - k)) : Vec<T>{};
      });
    }
  }
  for (int64_t tap = 0; tap < taps; ++tap) {
    const auto line = [&](int64_t channel) SAVL_ALWAYS_INLINE {
      return channel < args.channels ? load(lines + (channel * taps + tap) * kLanes) : Vec<T>{};
    };
    const auto operands = [&](int64_t p) SAVL_ALWAYS_INLINE {
      if constexpr (kNumbers<P> == 1) {
        return line(p);
      } else {
        return interleaved_pairs(line(2 * p), line(2 * p + 1));
      }
    };
    if constexpr (kSharesVectors<P>) {
      for (int64_t p = 0; shape.shared && p < shape.depth; p += 2, to += kWidth<P>) {
        store(to, interleave<P>(operands(p), operands(p + 1)));
      }
    }
    for (int64_t p = 0; !shape.shared && p < shape.depth; ++p, to += stride) store(to, operands(p));
  }
}

template <typename P, typename T = Sum<P>>
void pack_weights(const ConvolutionArgs& args, const ConvolutionShape<P>& shape, int64_t begin, int64_t end) {
  Scratch scratch(Scratch::bytes<T>((args.channels * args.side * args.side + kWidth<T>)*kWidth<T>));
  T* lines = scratch.take<T>((args.channels * args.side * args.side + kWidth<T>)*kWidth<T>);
  for_panels<T>(shape.columns, [&]<int kVectors>(int64_t first) {
    for (int b = 0; b < kVectors; ++b) {
      const int64_t column = first + b * kWidth<T>;
      if (column < begin * args.kGroup || column >= end * args.kGroup) continue;
      P* panel = static_cast<P*>(args.panels) + first * shape.operands();
      pack_weight_column<P>(args, shape, column, kVectors * kWidth<T>, panel + b * kWidth<T>, lines);
    }
  });
}

// Packing the pixels of a tile

// The parameters of the layer norm, padded with zeros to whole vectors of pairs.
template <typename T>
struct ConvolutionLines {
  T *weight, *bias, *present;

  static int64_t padded(const ConvolutionArgs& args) { return round_up(args.channels, 2 * kWidth<T>); }
  static int64_t bytes(const ConvolutionArgs& args) {
    return 2 * Scratch::bytes<T>(padded(args)) + Scratch::bytes<T>(kWidth<T>);
  }
  ConvolutionLines(const ConvolutionArgs& args, Scratch& scratch)
      : weight(scratch.take<T>(padded(args))),
        bias(scratch.take<T>(padded(args))),
        present(scratch.take<T>(kWidth<T>)) {
    if (args.norm_weight == nullptr) return;
    for (int64_t c = 0; c < padded(args); ++c) {
      const bool exists = c < args.channels;
      weight[c] = exists ? static_cast<const T*>(args.norm_weight)[c] : 0;
      bias[c] = exists ? static_cast<const T*>(args.norm_bias)[c] : 0;
    }
    // 1 for the channels that exist in the last vector if that is not whole.
    for (int64_t c = 0; c < kWidth<T>; ++c) present[c] = c < args.channels % kWidth<T> ? 1 : 0;
  }
};

// Stores the vectors of channels `value(c)`, for c from 0 on in steps of a vector, as operands.
template <typename P, typename Value, typename T = Sum<P>>
SAVL_INLINE void store_operands(int64_t channels, P* to, const Value& value) {
  if constexpr (kNumbers<P> == 1) {
    for (int64_t c = 0; c < channels; c += kWidth<T>) store(to + c, value(c));
  } else {
    for (int64_t c = 0; c < channels; c += 2 * kWidth<T>) store(to + c / 2, to_pairs(value(c), value(c + kWidth<T>)));
  }
}

// The sums of the lanes of kWidth<T> vectors.
template <typename T>
SAVL_INLINE Vec<T> sums_of(Vec<T>* vectors) {
  transpose<T>(vectors);
#pragma GCC unroll 16
  for (int step = kWidth<T> / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) vectors[i] += vectors[i + step];
  }
  return vectors[0];
}

SAVL_INLINE Vec<double> inverse_root(Vec<double> x) {
  return lane_by_lane(x, [](double lane) SAVL_ALWAYS_INLINE { return 1 / __builtin_sqrt(lane); });
}
SAVL_INLINE Vec<float> inverse_root(Vec<float> x) {
  float lanes[kWidth<float>];
  store(lanes, x);
  for (float& lane : lanes) lane = 1 / __builtin_sqrtf(lane);
  return load(lanes);
}

// Packs `count` <= kWidth<T> adjacent pixels, layer-normalised. The pixels are normalised together, so that sums over
// lanes, square roots and divisions are computed once for all of them.
template <typename X, typename P, typename T = Sum<P>>
SAVL_INLINE void pack_normed(const ConvolutionArgs& args, const ConvolutionLines<T>& lines, int64_t count, const X* x,
                             int64_t depth, P* to) {
  const int64_t whole = args.channels / kWidth<T> * kWidth<T>, rest = args.channels - whole;
  const T channels = static_cast<T>(args.channels);
  Vec<T> partial[kWidth<T>] = {};
  for (int64_t i = 0; i < count; ++i) {
    const X* pixel = x + i * args.x_stride;
    for (int64_t c = 0; c < whole; c += kWidth<T>) partial[i] += load_wide(pixel + c);
    if (rest > 0) partial[i] += load_some(pixel + whole, rest);
  }
  T means[kWidth<T>], inverses[kWidth<T>];
  store(means, sums_of<T>(partial) / channels);
  for (int64_t i = 0; i < kWidth<T>; ++i) partial[i] = Vec<T>{};
  for (int64_t i = 0; i < count; ++i) {
    const X* pixel = x + i * args.x_stride;
    for (int64_t c = 0; c < whole; c += kWidth<T>) {
      const Vec<T> centred = load_wide(pixel + c) - means[i];
      partial[i] += centred * centred;
    }
    if (rest > 0) {
      Vec<T> centred = load_some(pixel + whole, rest) - means[i];
      centred *= load(lines.present);  // the other lanes add nothing
      partial[i] += centred * centred;
    }
  }
  store(inverses, inverse_root(sums_of<T>(partial) / channels + static_cast<T>(args.eps)));
  for (int64_t i = 0; i < count; ++i, to += depth) {
    const X* pixel = x + i * args.x_stride;
    const Vec<T> mean = broadcast(means[i]), inverse = broadcast(inverses[i]);
    store_operands<P>(args.channels, to, [&](int64_t c) SAVL_ALWAYS_INLINE {
      const Vec<T> value = c < whole ? load_wide(pixel + c) : c < args.channels ? load_some(pixel + c, rest) : Vec<T>{};
      return (value - mean) * inverse * load(lines.weight + c) + load(lines.bias + c);
    });
  }
}

template <typename X, typename P, typename T = Sum<P>>
SAVL_INLINE void pack_pixel(const ConvolutionArgs& args, const X* x, P* to) {
  if constexpr (kNumbers<P> == 1) {
    for_vectors<T>(args.channels,
                   [&](int64_t c, int64_t lanes) SAVL_ALWAYS_INLINE { store(to + c, load_some(x + c, lanes)); });
  } else if constexpr (sizeof(X) == 2) {
    for (int64_t c = 0; c < args.channels; c += 2 * kWidth<T>) store(to + c / 2, load_pairs(x + c, args.channels - c));
  } else {
    store_operands<P>(args.channels, to, [&](int64_t c) SAVL_ALWAYS_INLINE {
      return c < args.channels ? load_some(x + c, smaller(kWidth<T>, args.channels - c)) : Vec<T>{};
    });
  }
}

// Packs the tile at row y and column x of an image, with the pixels around it. Pixels outside the image are zeros.
template <typename X, typename P, typename T = Sum<P>>
SAVL_NOINLINE void pack_tile(const ConvolutionArgs& args, const ConvolutionShape<P>& shape,
                             const ConvolutionLines<T>& lines, int64_t image, int64_t y, int64_t x, P* packed) {
  const int64_t last = smaller(y + args.tile_height(), args.height) + shape.halo;
  for (int64_t row = y - shape.halo; row < last; ++row) {
    const bool row_inside = row >= 0 && row < args.height;
    const X* pixels = static_cast<const X*>(args.x) + (image * args.height + row) * args.width * args.x_stride;
    const int64_t begin = x - shape.halo, end = begin + shape.packed_width;
    const int64_t first = row_inside ? smaller(begin < 0 ? 0 : begin, end) : end;  // of the pixels inside the image
    const int64_t after = row_inside ? smaller(end, args.width) : end;
    const auto zeros = [&](int64_t count) SAVL_ALWAYS_INLINE {
      for (int64_t p = 0; p < count * shape.depth; p += kWidth<P>) store(packed + p, Vec<P>{});
      packed += count * shape.depth;
    };
    zeros(first - begin);
    if (args.norm_weight != nullptr) {
      for (int64_t column = first; column < after; column += kWidth<T>) {
        const int64_t count = smaller(kWidth<T>, after - column);
        pack_normed(args, lines, count, pixels + column * args.x_stride, shape.depth, packed);
        packed += count * shape.depth;
      }
    } else {
      for (int64_t column = first; column < after; ++column, packed += shape.depth) {
        pack_pixel(args, pixels + column * args.x_stride, packed);
      }
    }
    zeros(end - after);
  }
}

SAVL_END_KERNELS
