// Convolutions with 1×1 and 3×3 kernels over channels-last features, with the pixelwise operations around them:
//
//   out = residual + (1 + gamma) * gate * activation(convolution(layer_norm(x)) + bias) + beta
//
// The kernel runs in two steps. In the first, a task packs the weights of a group of output channels into panels
// (cpu/panels.h). In the second, a task packs a tile of pixels, with a border for a 3×3 kernel, and normalises it. It
// multiplies the tile with every panel, and applies the other operations to the sums before it writes them. The
// channels of adjacent pixels are contiguous in a packed tile, so that a row of a 3×3 kernel is one sum if the dilation
// is 1. An operand is a number, or a pair of bfloat16 numbers (cpu/bfloat16_products.h).
#pragma once

#include <cstdint>

#include "cpu/kernel.h"
#include "cpu/layer_norm.h"
#include "cpu/panels.h"
#include "cpu/simd.h"
#if defined(SAVL_BFLOAT16_TILES)
#include "cpu/attention_tiles.h"
#endif

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
  void *out,
      *kept;  // S, contiguous, written; `out` T where output_is_float; `kept` is the sum before the activation, or null

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

// Between segments, a sum of at least so many operands is closed and added to a second accumulator, which reduces the
// rounding error. AMX does not do this.
constexpr int64_t kLongSum = 64;

// The sizes of tiles and buffers. P is the type of the operands.
template <typename P>
struct ConvolutionShape {
  using T = Sum<P>;
  int64_t depth;                        // operands of a pixel
  int64_t columns;                      // output channels, padded to whole vectors
  int64_t halo;                         // pixels around a tile
  int64_t packed_width, packed_height;  // of a packed tile, in pixels
  int64_t segments, segment;            // contiguous parts of the sum, and operands of each
  int64_t offset[9];                    // of each segment from the packed pixel at the upper left of the kernel

  explicit ConvolutionShape(const ConvolutionArgs& args)
      : depth(round_up(operands_of<P>(args.channels), kDepthStep)),
        columns(round_up(args.outputs, kWidth<T>)),
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

// Writes W output channels, from channel `first` on, to column `column` of a panel of `stride` columns.
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
    for (int64_t p = 0; p < shape.depth; ++p, to += stride) {
      const auto line = [&](int64_t channel) SAVL_ALWAYS_INLINE {
        return channel < args.channels ? load(lines + (channel * taps + tap) * kLanes) : Vec<T>{};
      };
      if constexpr (kNumbers<P> == 1) {
        store(to, line(p));
      } else {
        store(to, interleaved_pairs(line(2 * p), line(2 * p + 1)));
      }
    }
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

// Multiplying

// sums[i] = the sums of the products of a panel and pixel i, for kPixels packed pixels and kVectors vectors of output
// channels.
template <int kVectors, typename P, typename T = Sum<P>>
SAVL_INLINE void multiply_pixels(const ConvolutionShape<P>& shape, const P* pixels, const P* panel,
                                 Vec<T> (&sums)[kPixels][kVectors]) {
#if defined(SAVL_BFLOAT16_TILES)
  for_tiles<kVectors>([&]<int kTile>() SAVL_ALWAYS_INLINE { zero_tile<kTile>(); });
  for (int64_t s = 0; s < shape.segments; ++s) {
    const P* rows = pixels + shape.offset[s];
    for (int64_t p = 0; p < shape.segment; p += kTileRows, panel += kVectors * kTileRows * kTileRows) {
      load_tile<kRowsTile>(rows + p, shape.depth);
      for_tiles<kVectors>([&]<int kTile>() SAVL_ALWAYS_INLINE {
        load_tile<kColumnTile + kTile>(panel + kTile * kTileRows, kVectors * kTileRows);
        multiply_tiles<kTile, kRowsTile, kColumnTile + kTile>();
      });
    }
  }
  float products[kPixels][kVectors][kTileRows];
  for_tiles<kVectors>([&]<int kTile>()
                          SAVL_ALWAYS_INLINE { store_tile<kTile>(products[0][kTile], kVectors * kTileRows); });
  __builtin_memcpy(sums, products, sizeof(products));
#else
  Vec<T> total[kPixels][kVectors] = {}, before[kPixels][kVectors] = {};
  for (int64_t s = 0, operands = 0; s < shape.segments; ++s) {
    const P* rows = pixels + shape.offset[s];
    if (operands >= kLongSum) {
      for (int i = 0; i < kPixels; ++i) {
        for (int b = 0; b < kVectors; ++b) before[i][b] += total[i][b], total[i][b] = Vec<T>{};
      }
      operands = 0;
    }
    operands += shape.segment;
    for (int64_t p = 0; p < shape.segment; ++p, panel += kVectors * kWidth<P>) {
      Vec<P> columns[kVectors];
      for (int b = 0; b < kVectors; ++b) columns[b] = load(panel + b * kWidth<P>);
      for (int i = 0; i < kPixels; ++i) {
        const Vec<P> factor = broadcast(rows[i * shape.depth + p]);
        for (int b = 0; b < kVectors; ++b) total[i][b] = multiply_add(factor, columns[b], total[i][b]);
      }
    }
  }
  for (int i = 0; i < kPixels; ++i) {
    for (int b = 0; b < kVectors; ++b) sums[i][b] = total[i][b] + before[i][b];
  }
#endif
}

// GELU with the normal distribution function Phi of -|x|: x Phi(x) = max(x, 0) - |x| Phi(-|x|). In float32, Phi(-|x|)
// is exp(-x^2 / 2) times a polynomial, and the error of the result 1e-7. For bfloat16 it is a polynomial alone for
// |x| < 4.2, with an absolute error of the result below 8e-5. Beyond, |x| Phi(-|x|) < 6e-5 is replaced by 0.
template <typename S>
SAVL_INLINE Vec<float> gelu(Vec<float> x) {
  const Vec<float> positive = larger(Vec<float>{}, x), magnitude = lesser(broadcast(1e4f), larger(-x, x));
  if constexpr (sizeof(S) == 2) {
    const Vec<float> a = lesser(broadcast(4.2f), magnitude);
    Vec<float> p = a * -1.52088933e-05f + 0.000353910407f;
    p = p * a + -0.00340819242f;
    p = p * a + 0.0170594323f;
    p = p * a + -0.0440164655f;
    p = p * a + 0.0401975363f;
    p = p * a + 0.0387072191f;
    p = p * a + 0.0102964966f;
    p = p * a + -0.400573432f;
    p = p * a + 0.500046968f;
    return positive - (magnitude > 4.2f ? Vec<float>{} : a * p);
  } else {
    constexpr float kHalfLog2E = 0.72134752044448170f;
    const Vec<float> a = lesser(broadcast(5.5f), magnitude);
    Vec<float> p = a * 9.07950209e-07f + -2.18752812e-05f;
    p = p * a + 0.000236165914f;
    p = p * a + -0.00153121015f;
    p = p * a + 0.00679177092f;
    p = p * a + -0.0224604085f;
    p = p * a + 0.0592929944f;
    p = p * a + -0.13139008f;
    p = p * a + 0.249538973f;
    p = p * a + -0.398875684f;
    p = p * a + 0.499996662f;
    return positive - magnitude * (p * exp2_of_negative(magnitude * magnitude * -kHalfLog2E));
  }
}
template <typename S>
SAVL_INLINE Vec<double> gelu(Vec<double> x) {
  return lane_by_lane(x, [](double lane) SAVL_ALWAYS_INLINE {
    return 0.5 * lane * (1 + __builtin_erf(lane * 0.70710678118654752440));
  });
}

// Applies what follows the products to a vector of output channels, from channel c on, of adjacent pixels. If kWhole is
// true, there are kPixels pixels, and all lanes of the vector exist.
template <typename S, bool kWhole, typename T = Arithmetic<S>>
SAVL_INLINE void finish_vector(const ConvolutionArgs& args, Vec<T> (&values)[kPixels], int64_t first_pixel,
                               const T* gates, int64_t x, int64_t count, int64_t c) {
  const int64_t lanes = kWhole ? kWidth<T> : smaller(kWidth<T>, args.outputs - c), pixels = kWhole ? kPixels : count;
  const auto for_pixels = [&](const auto& work) SAVL_ALWAYS_INLINE {
#pragma GCC unroll 16
    for (int64_t i = 0; i < pixels; ++i) work(values[i], i);
  };
  const auto other = [&](const void* from, int64_t from_stride, int64_t i) SAVL_ALWAYS_INLINE {
    return load_some(static_cast<const S*>(from) + (first_pixel + i) * from_stride + c, lanes);
  };
  const Vec<T> bias = args.bias == nullptr ? Vec<T>{} : load_some(static_cast<const T*>(args.bias) + c, lanes);
  for_pixels([&](Vec<T>& value, int64_t) SAVL_ALWAYS_INLINE { value += bias; });
  if (args.kept != nullptr) {
    for_pixels([&](Vec<T>& value, int64_t i) SAVL_ALWAYS_INLINE {
      store_some(static_cast<S*>(args.kept) + (first_pixel + i) * args.outputs + c, value, lanes);
    });
  }
  if (args.activation == Activation::kGelu) {
    for_pixels([&](Vec<T>& value, int64_t) SAVL_ALWAYS_INLINE { value = gelu<S>(value); });
  } else if (args.activation == Activation::kLeakyRelu) {
    const Vec<T> slope = broadcast(static_cast<T>(args.slope));
    for_pixels([&](Vec<T>& value, int64_t) SAVL_ALWAYS_INLINE { value = value > 0 ? value : value * slope; });
  }
  if (gates != nullptr) {
    const int64_t width = args.width / args.gate_columns;
    for_pixels([&](Vec<T>& value, int64_t i)
                   SAVL_ALWAYS_INLINE { value *= load_some(gates + (x + i) / width * args.outputs + c, lanes); });
  }
  if (args.gamma != nullptr) {
    for_pixels([&](Vec<T>& value, int64_t i)
                   SAVL_ALWAYS_INLINE { value += value * other(args.gamma, args.gamma_stride, i); });
  }
  if (args.beta != nullptr) {
    for_pixels([&](Vec<T>& value, int64_t i) SAVL_ALWAYS_INLINE { value += other(args.beta, args.beta_stride, i); });
  }
  with_output_type<S>(args.output_is_float, [&]<typename R>() SAVL_ALWAYS_INLINE {
    if (args.residual != nullptr) {
      for_pixels([&](Vec<T>& value, int64_t i) SAVL_ALWAYS_INLINE {
        const R* residual = static_cast<const R*>(args.residual) + (first_pixel + i) * args.residual_stride;
        value += load_some(residual + c, lanes);
      });
    }
    for_pixels([&](Vec<T>& value, int64_t i) SAVL_ALWAYS_INLINE {
      store_some(static_cast<R*>(args.out) + (first_pixel + i) * args.outputs + c, value, lanes);
    });
  });
}

// The same for kVectors vectors of output channels, from channel `first` on, of the `count` pixels from row y and
// column x of an image on.
template <typename S, int kVectors, typename T = Arithmetic<S>>
SAVL_INLINE void finish_pixels(const ConvolutionArgs& args, const Vec<T> (&sums)[kPixels][kVectors], int64_t image,
                               int64_t y, int64_t x, int64_t count, int64_t first) {
  const int64_t first_pixel = (image * args.height + y) * args.width + x;
  const T* gates = nullptr;
  if (args.gate != nullptr) {
    const int64_t row = image * args.gate_rows + y / (args.height / args.gate_rows);
    gates = static_cast<const T*>(args.gate) + row * args.gate_columns * args.outputs;
  }
#pragma GCC unroll 3
  for (int b = 0; b < kVectors; ++b) {
    const int64_t c = first + b * kWidth<T>;
    Vec<T> values[kPixels];
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) values[i] = sums[i][b];
    if (count == kPixels && c + kWidth<T> <= args.outputs) {
      finish_vector<S, true>(args, values, first_pixel, gates, x, count, c);
    } else {
      Vec<T> some[kPixels];  // a copy, because it is indexed by variables, which keeps it out of registers
#pragma GCC unroll 16
      for (int i = 0; i < kPixels; ++i) some[i] = values[i];
      finish_vector<S, false>(args, some, first_pixel, gates, x, count, c);
    }
  }
}

// Prefetches what `finish_pixels` reads and writes, which lies in short pieces far apart.
template <typename S>
SAVL_INLINE void prefetch_pixels(const ConvolutionArgs& args, int64_t first_pixel, int64_t count, int64_t first,
                                 int64_t columns) {
  const int64_t last = smaller(first + columns, args.outputs);
  const auto prefetch = [&]<typename R>(const void* rows, int64_t stride, int write) SAVL_ALWAYS_INLINE {
    if (rows == nullptr) return;
    for (int64_t pixel = first_pixel; pixel < first_pixel + count; ++pixel) {
      for (int64_t c = first; c < last; c += 64 / static_cast<int64_t>(sizeof(R))) {
        const R* element = static_cast<const R*>(rows) + pixel * stride + c;
        write != 0 ? __builtin_prefetch(element, 1) : __builtin_prefetch(element);
      }
    }
  };
  with_output_type<S>(args.output_is_float, [&]<typename R>() SAVL_ALWAYS_INLINE {
    prefetch.template operator()<R>(args.out, args.outputs, 1);
    prefetch.template operator()<R>(args.residual, args.residual_stride, 0);
  });
  prefetch.template operator()<S>(args.gamma, args.gamma_stride, 0);
  prefetch.template operator()<S>(args.beta, args.beta_stride, 0);
}

template <typename S>
void convolution_kernel(const ConvolutionArgs& args, int64_t begin, int64_t end) {
  using P = Operand<S>;
  using T = Arithmetic<S>;
  const ConvolutionShape<P> shape(args);
  if (args.packing) return pack_weights<P>(args, shape, begin, end);
  Scratch scratch(ConvolutionLines<T>::bytes(args) + Scratch::bytes<P>(shape.packed_operands()));
  const ConvolutionLines<T> lines(args, scratch);
  P* packed = scratch.take<P>(shape.packed_operands());
  [[maybe_unused]] const TileRegisters<P> registers;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / (args.tiles_down() * args.tiles_across());
    const int64_t y = task / args.tiles_across() % args.tiles_down() * args.tile_height();
    const int64_t x = task % args.tiles_across() * args.tile_width();
    with_output_type<S>(args.x_is_float, [&]<typename X>() SAVL_ALWAYS_INLINE {
      pack_tile<X>(args, shape, lines, image, y, x, packed);
    });
    const int64_t rows = smaller(args.tile_height(), args.height - y);
    const int64_t across = smaller(args.tile_width(), args.width - x);
    for_panels<T>(shape.columns, [&]<int kVectors>(int64_t first) SAVL_ALWAYS_INLINE {
      const P* panel = static_cast<const P*>(args.panels) + first * shape.operands();
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t column = 0; column < across; column += kPixels) {
          const P* pixels = packed + (row * shape.packed_width + column) * shape.depth;
          const int64_t count = smaller(kPixels, across - column);
          prefetch_pixels<S>(args, (image * args.height + y + row) * args.width + x + column, count, first,
                             kVectors * kWidth<T>);
          Vec<T> sums[kPixels][kVectors];
          multiply_pixels<kVectors>(shape, pixels, panel, sums);
          finish_pixels<S, kVectors>(args, sums, image, y + row, x + column, count, first);
        }
      }
    });
  }
}

SAVL_END_KERNELS
