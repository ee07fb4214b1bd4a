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

#include "cpu/convolution_epilogue.h"
#include "cpu/convolution_pack.h"
#include "cpu/panels.h"
#include "cpu/simd.h"
#if defined(SAVL_BFLOAT16_TILES)
#include "cpu/attention_tiles.h"
#endif

SAVL_BEGIN_KERNELS

// sums[i] = the sums of the products of a panel and pixel i, for kPixels packed pixels and kVectors vectors of output
// channels. If kShared is true, two operands share a vector.
template <int kVectors, bool kShared, typename P, typename T = Sum<P>>
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
    for (int64_t p = 0; p < shape.segment;) {
      const int64_t end = smaller(p + kLongestSum, shape.segment);
      if (operands >= kLongSum) {
        for (int i = 0; i < kPixels; ++i) {
          for (int b = 0; b < kVectors; ++b) before[i][b] += total[i][b], total[i][b] = Vec<T>{};
        }
        operands = 0;
      }
      operands += end - p;
      for (; p < end; p += kShared ? 2 : 1, panel += kVectors * kWidth<P>) {
        Vec<P> columns[kVectors];
        for (int b = 0; b < kVectors; ++b) columns[b] = load(panel + b * kWidth<P>);
        for (int i = 0; i < kPixels; ++i) {
          const P* operand = rows + i * shape.depth + p;
          const Vec<P> factor = kShared ? broadcast_two(operand) : broadcast(*operand);
          for (int b = 0; b < kVectors; ++b) total[i][b] = multiply_add(factor, columns[b], total[i][b]);
        }
      }
    }
  }
  for (int i = 0; i < kPixels; ++i) {
    for (int b = 0; b < kVectors; ++b) {
      sums[i][b] = total[i][b] + before[i][b];
      if (kShared) sums[i][b] = sums_of_two<T>(sums[i][b]);
    }
  }
#endif
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
          if (kVectors == 1 && shape.shared) {
            multiply_pixels<kVectors, kVectors == 1 && kSharesVectors<P>>(shape, pixels, panel, sums);
          } else {
            multiply_pixels<kVectors, false>(shape, pixels, panel, sums);
          }
          finish_pixels<S, kVectors>(args, sums, image, y + row, x + column, count, first);
        }
      }
    });
  }
}

SAVL_END_KERNELS
