// The operands of matrix products, and products of bfloat16 numbers whose sums are float32.
//
// Two macros, which a source file of kernels may define, select instructions for bfloat16:
//
//   SAVL_BFLOAT16_PAIRS   AVX512-BF16: vdpbf16ps multiplies pairs of numbers and adds both products to a sum
//   SAVL_BFLOAT16_TILES   in addition AMX: tdpbf16ps multiplies tiles of 16 rows of 16 pairs
//
// Without them, bfloat16 numbers are converted to float32 and multiplied as such. With SAVL_EMULATE_AVX512, functions
// with the results of the instructions take their place, except that the instructions treat subnormal numbers as 0.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

SAVL_BEGIN_KERNELS

// Two bfloat16 numbers that follow each other in the sum of a product, the first one in the low half.
using BFloat16Pair = uint32_t;

// P is the type of an operand of a product: a number of the arithmetic type, or a BFloat16Pair.
template <typename S>
struct OperandOf {
  using type = Arithmetic<S>;
};
template <typename P>
struct SumOf {
  using type = P;
};
template <>
struct SumOf<BFloat16Pair> {
  using type = float;
};
#if defined(SAVL_BFLOAT16_PAIRS)
template <>
struct OperandOf<BFloat16> {
  using type = BFloat16Pair;
};
#endif
template <typename S>
using Operand = typename OperandOf<S>::type;
template <typename P>
using Sum = typename SumOf<P>::type;  // the type of sums of products

template <typename P>
constexpr int kNumbers = 1;  // in an operand
template <>
constexpr int kNumbers<BFloat16Pair> = 2;

// The operands that hold `numbers` numbers.
template <typename P>
SAVL_INLINE int64_t operands_of(int64_t numbers) {
  return (numbers + kNumbers<P> - 1) / kNumbers<P>;
}

template <typename V>
SAVL_INLINE V multiply_add(V a, V b, V sum) {
  return a * b + sum;
}

// The power of two of the softmax whose weights are operands of this type: exp2_of_negative, or for pairs a function
// with a relative error of 3e-6, a six-hundredth of the rounding to bfloat16.
template <typename P>
SAVL_INLINE Vec<Sum<P>> softmax_power(Vec<Sum<P>> x) {
  return exp2_of_negative(x);
}

#if defined(SAVL_BFLOAT16_PAIRS)

// The float32 values of the first and of the second numbers of pairs.
SAVL_INLINE Vec<float> first_of(Vec<BFloat16Pair> pairs) { return bits_of<Vec<float>>(pairs << 16); }
SAVL_INLINE Vec<float> second_of(Vec<BFloat16Pair> pairs) { return bits_of<Vec<float>>(pairs & 0xffff0000); }

// `half` bfloat16 numbers, each in the low half of a lane.
SAVL_INLINE Vec<BFloat16Pair> load_bits(const BFloat16* from) {
  typedef uint16_t Half __attribute__((vector_size(SAVL_VECTOR_BYTES / 2)));
  Half half;
  __builtin_memcpy(&half, from, sizeof(half));
  return __builtin_convertvector(half, Vec<BFloat16Pair>);
}

#if defined(SAVL_EMULATE_AVX512)

SAVL_INLINE Vec<float> multiply_add(Vec<BFloat16Pair> a, Vec<BFloat16Pair> b, Vec<float> sum) {
  return first_of(a) * first_of(b) + (second_of(a) * second_of(b) + sum);
}

SAVL_INLINE Vec<BFloat16Pair> to_pairs(Vec<float> low, Vec<float> high) {
  BFloat16 numbers[2 * kWidth<float>];
  store_narrow(numbers, low);
  store_narrow(numbers + kWidth<float>, high);
  return bits_of<Vec<BFloat16Pair>>(numbers);
}

SAVL_INLINE Vec<BFloat16Pair> interleaved_pairs(Vec<float> first, Vec<float> second) {
  BFloat16 numbers[2 * kWidth<float>];
  store_narrow(numbers, first);
  store_narrow(numbers + kWidth<float>, second);
  return load_bits(numbers) | load_bits(numbers + kWidth<float>) << 16;
}

SAVL_INLINE Vec<BFloat16Pair> load_pairs(const BFloat16* from, int64_t count) {
  BFloat16 numbers[2 * kWidth<float>] = {};
  for (int64_t i = 0; i < smaller(count, 2 * kWidth<float>); ++i) numbers[i] = from[i];
  return bits_of<Vec<BFloat16Pair>>(numbers);
}

SAVL_INLINE void store_pairs(BFloat16* to, Vec<BFloat16Pair> pairs, int64_t count) {
  BFloat16 numbers[2 * kWidth<float>];
  __builtin_memcpy(numbers, &pairs, sizeof(pairs));
  for (int64_t i = 0; i < smaller(count, 2 * kWidth<float>); ++i) to[i] = numbers[i];
}

#else

SAVL_INLINE Vec<float> multiply_add(Vec<BFloat16Pair> a, Vec<BFloat16Pair> b, Vec<float> sum) {
  return _mm512_dpbf16_ps(sum, bits_of<__m512bh>(a), bits_of<__m512bh>(b));
}

// Two vectors rounded to bfloat16, one after the other.
SAVL_INLINE Vec<BFloat16Pair> to_pairs(Vec<float> low, Vec<float> high) {
  return bits_of<Vec<BFloat16Pair>>(_mm512_cvtne2ps_pbh(high, low));
}

// Pairs of the numbers of two vectors, rounded to bfloat16.
SAVL_INLINE Vec<BFloat16Pair> interleaved_pairs(Vec<float> first, Vec<float> second) {
  uint32_t order[kWidth<float>];
  for (uint32_t i = 0; i < kWidth<float>; ++i) order[i] = i | (i + kWidth<float>) << 16;
  const __m512i numbers = bits_of<__m512i>(to_pairs(first, second));
  return bits_of<Vec<BFloat16Pair>>(_mm512_permutexvar_epi16(bits_of<__m512i>(load(order)), numbers));
}

SAVL_INLINE __mmask32 first_numbers(int64_t count) { return count >= 32 ? 0xffffffff : (uint32_t{1} << count) - 1; }

// Loads and stores a vector of which only the first `count` numbers exist. The others of a loaded vector are 0.
SAVL_INLINE Vec<BFloat16Pair> load_pairs(const BFloat16* from, int64_t count) {
  return bits_of<Vec<BFloat16Pair>>(_mm512_maskz_loadu_epi16(first_numbers(count), from));
}
SAVL_INLINE void store_pairs(BFloat16* to, Vec<BFloat16Pair> pairs, int64_t count) {
  _mm512_mask_storeu_epi16(to, first_numbers(count), bits_of<__m512i>(pairs));
}

#endif

#if !defined(SAVL_EMULATE_AVX512)
template <>
SAVL_INLINE Vec<float> softmax_power<BFloat16Pair>(Vec<float> x) {
  const Vec<float> r = _mm512_maskz_reduce_ps(0xffff, x, _MM_FROUND_TO_NEG_INF);  // x - floor(x); 0 for minus infinity
  Vec<float> p = r * 1.342668584e-2f + 5.224247171e-2f;
  p = p * r + 2.412802059e-1f;
  p = p * r + 6.930448448e-1f;
  p = p * r + 1.0f;
  return _mm512_maskz_scalef_ps(0xffff, p, x);  // p * 2^floor(x)
}
#endif

// The numbers of pairs times a factor, rounded.
SAVL_INLINE Vec<BFloat16Pair> times(Vec<BFloat16Pair> pairs, float factor) {
  return interleaved_pairs(first_of(pairs) * factor, second_of(pairs) * factor);
}

#endif  // SAVL_BFLOAT16_PAIRS

// Whether products of operands of this type use tiles.
template <typename P>
constexpr bool kTiles = false;
// While an object of this class exists, its thread can use the tiles.
template <typename P>
struct TileRegisters {};

#if defined(SAVL_BFLOAT16_TILES)

constexpr int kTileRows = 16;                                    // and pairs, or sums, in a row
constexpr int64_t kTileRowBytes = kTileRows * sizeof(uint32_t);  // 64

template <>
constexpr bool kTiles<BFloat16Pair> = true;

#if defined(SAVL_EMULATE_AVX512)

struct EmulatedTile {
  Vec<BFloat16Pair> row[kTileRows];
};
inline thread_local EmulatedTile emulated_tiles[8];

template <int kTile>
SAVL_INLINE void zero_tile() {
  emulated_tiles[kTile] = {};
}
template <int kTile, typename Number>
SAVL_INLINE void load_tile(const Number* from, int64_t row_stride) {
  for (auto& row : emulated_tiles[kTile].row) {
    __builtin_memcpy(&row, from, sizeof(row));
    from += row_stride;
  }
}
template <int kTile, typename Number>
SAVL_INLINE void store_tile(Number* to, int64_t row_stride) {
  for (const auto& row : emulated_tiles[kTile].row) {
    __builtin_memcpy(to, &row, sizeof(row));
    to += row_stride;
  }
}
template <int kSum, int kRows, int kColumns>
SAVL_INLINE void multiply_tiles() {
  for (int i = 0; i < kTileRows; ++i) {
    Vec<float> sum = bits_of<Vec<float>>(emulated_tiles[kSum].row[i]);
    for (int k = 0; k < kTileRows; ++k) {
      sum = multiply_add(broadcast(emulated_tiles[kRows].row[i][k]), emulated_tiles[kColumns].row[k], sum);
    }
    emulated_tiles[kSum].row[i] = bits_of<Vec<BFloat16Pair>>(sum);
  }
}

#else

// Assembly, because compilers need no support for AMX then, and because GCC's intrinsics do not say that they access
// memory. Strides are in elements of 4 bytes.
template <int kTile>
SAVL_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile, typename Number>
SAVL_INLINE void load_tile(const Number* from, int64_t row_stride) {
  static_assert(sizeof(Number) == 4);
  asm volatile("tileloadd (%0,%1,4), %%tmm%c2" : : "r"(from), "r"(row_stride), "i"(kTile) : "memory");
}
template <int kTile, typename Number>
SAVL_INLINE void store_tile(Number* to, int64_t row_stride) {
  static_assert(sizeof(Number) == 4);
  asm volatile("tilestored %%tmm%c2, (%0,%1,4)" : : "r"(to), "r"(row_stride), "i"(kTile) : "memory");
}
// kSum += kRows times kColumns: row i of kRows holds pairs k, row k of kColumns those of column j.
template <int kSum, int kRows, int kColumns>
SAVL_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kRows), "i"(kColumns));
}

template <>
struct TileRegisters<BFloat16Pair> {
  struct alignas(64) Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Configuration) == 64);

  TileRegisters() {
    Configuration all{};
    all.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      all.row_bytes[tile] = kTileRowBytes;
      all.rows[tile] = kTileRows;
    }
    asm volatile("sttilecfg %0" : "=m"(before_));
    asm volatile("ldtilecfg %0" : : "m"(all));
  }
  // Other libraries may rely on the configuration that they left in this thread.
  ~TileRegisters() { asm volatile("ldtilecfg %0" : : "m"(before_)); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  Configuration before_;
};

#endif
#endif  // SAVL_BFLOAT16_TILES

SAVL_END_KERNELS
