// Vectors of SAVL_VECTOR_BYTES in the vector extension of GCC and Clang, which they compile to what the processor has:
// the same source serves SSE2, AVX2, AVX-512 and NEON.
//
// A header of kernels includes this one and stands between SAVL_BEGIN_KERNELS and SAVL_END_KERNELS, after all of its
// #include lines. These macros open the namespace of the instruction set that the source file is compiled for
// (cpu/instruction_set.inl), and compile what follows for its processor features (compiler.h). A source file that names
// no instruction set, such as those that include torch, sees the kernels of "portable".
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <new>
#include <utility>

#include "arithmetic.h"
#include "compiler.h"
#include "cpu/kernel.h"

#if !defined(SAVL_INSTRUCTION_SET)
#define SAVL_INSTRUCTION_SET portable
#define SAVL_VECTOR_BYTES 16
#endif

#define SAVL_BEGIN_KERNELS                    \
  SAVL_BEGIN_TARGET                           \
  namespace savl::cpu::SAVL_INSTRUCTION_SET { \
  namespace {
#define SAVL_END_KERNELS \
  }                      \
  }                      \
  SAVL_END_TARGET

#define SAVL_ALWAYS_INLINE __attribute__((always_inline))
#define SAVL_INLINE inline SAVL_ALWAYS_INLINE
// For large functions with several callers. With sanitizers, each inlined copy takes long to compile.
#define SAVL_NOINLINE __attribute__((noinline))

SAVL_BEGIN_KERNELS

static_assert(SAVL_VECTOR_BYTES <= kWidestVector);

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(SAVL_VECTOR_BYTES)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;

template <typename T>
constexpr int kWidth = SAVL_VECTOR_BYTES / static_cast<int>(sizeof(T));

SAVL_INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
SAVL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
SAVL_INLINE Vec<T> load(const T* from) {
  Vec<T> result;
  __builtin_memcpy(&result, from, sizeof(result));
  return result;
}

template <typename T>
SAVL_INLINE void store(T* to, Vec<T> value) {
  __builtin_memcpy(to, &value, sizeof(value));
}

template <typename T>
SAVL_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // minus, not plus: -0 stays -0
}

// The first operand where it is larger (smaller), otherwise the second: a NaN in the first is dropped, a NaN in the
// second is kept. float has overloads on x86, where compilers do not see that this is one instruction.
template <typename V>
SAVL_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}
template <typename V>
SAVL_INLINE V lesser(V a, V b) {
  return a < b ? a : b;
}
#if defined(__x86_64__) && SAVL_VECTOR_BYTES == 16
SAVL_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return _mm_max_ps(a, b); }
SAVL_INLINE Vec<float> lesser(Vec<float> a, Vec<float> b) { return _mm_min_ps(a, b); }
#elif defined(__x86_64__) && SAVL_VECTOR_BYTES == 32
SAVL_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a, b); }
SAVL_INLINE Vec<float> lesser(Vec<float> a, Vec<float> b) { return _mm256_min_ps(a, b); }
#elif defined(__x86_64__) && !defined(SAVL_EMULATE_AVX512)
// The form with a full mask: for the plain form, GCC warns of an uninitialised operand in its own header.
SAVL_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return _mm512_maskz_max_ps(0xffff, a, b); }
SAVL_INLINE Vec<float> lesser(Vec<float> a, Vec<float> b) { return _mm512_maskz_min_ps(0xffff, a, b); }
#endif

template <typename T, int kLanes>
struct Halves {
  typedef T Half __attribute__((vector_size(sizeof(T) * kLanes / 2)));
  Half low, high;
};

// Combines the upper half of the lanes with the lower half until one number is left, all in registers. A sum therefore
// has the order of a tree.
template <typename T, int kLanes, typename V, typename Combine>
SAVL_INLINE T fold_lanes(V value, const Combine& combine) {
  if constexpr (kLanes == 1) {
    return value[0];
  } else {
    const auto halves = bits_of<Halves<T, kLanes>>(value);
    return fold_lanes<T, kLanes / 2>(combine(halves.low, halves.high), combine);
  }
}

template <typename T, int kLanes, typename V>
SAVL_INLINE T sum_of_lanes(V value) {
  return fold_lanes<T, kLanes>(value, [](auto low, auto high) SAVL_ALWAYS_INLINE { return low + high; });
}

template <typename T>
SAVL_INLINE T sum_of(Vec<T> value) {
  return sum_of_lanes<T, kWidth<T>>(value);
}

// The largest lane. Where lanes are NaN, the result is any of the lanes.
template <typename T>
SAVL_INLINE T largest_of(Vec<T> value) {
  return fold_lanes<T, kWidth<T>>(value,
                                  [](auto low, auto high) SAVL_ALWAYS_INLINE { return low > high ? low : high; });
}

// The lanes of two vectors alternately: those of their first halves, or those of their second halves.
template <typename T, int... kLane>
SAVL_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, bool second, std::integer_sequence<int, kLane...>) {
  constexpr int kHalf = kWidth<T> / 2;
  if (second) {
    return Vec<T>{(kLane % 2 == 0 ? a[kHalf + kLane / 2] : b[kHalf + kLane / 2])...};
  }
  return Vec<T>{(kLane % 2 == 0 ? a[kLane / 2] : b[kLane / 2])...};
}

// Moves lane j of row i to lane i of row j, in registers. Each round moves the highest bit of i below the lowest bit of
// j.
template <typename T>
SAVL_INLINE void transpose(Vec<T>* rows) {
  constexpr int kHalf = kWidth<T> / 2;
  using Lanes = std::make_integer_sequence<int, kWidth<T>>;
#pragma GCC unroll 8
  for (int rotated = 1; rotated < kWidth<T>; rotated *= 2) {
    Vec<T> before[kWidth<T>];
    __builtin_memcpy(before, rows, sizeof(before));
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      rows[2 * i] = interleave<T>(before[i], before[i + kHalf], false, Lanes{});
      rows[2 * i + 1] = interleave<T>(before[i], before[i + kHalf], true, Lanes{});
    }
  }
}

// Storage types. A bfloat16 is stored as its bits.
struct BFloat16 {
  uint16_t bits;
};

template <typename S>
struct ArithmeticOf {
  using type = S;
};
template <>
struct ArithmeticOf<BFloat16> {
  using type = float;
};
template <typename S>
using Arithmetic = typename ArithmeticOf<S>::type;

SAVL_INLINE float widen(float value) { return value; }
SAVL_INLINE double widen(double value) { return value; }
SAVL_INLINE float widen(BFloat16 value) { return bits_of<float>(static_cast<uint32_t>(value.bits) << 16); }

template <typename S>
SAVL_INLINE S narrow(Arithmetic<S> value) {
  return value;
}
// The bits of a float, in a 32-bit integer or a vector of them, rounded to the nearest bfloat16, ties to even.
template <typename Bits>
SAVL_INLINE Bits rounded_to_bfloat16(Bits bits) {
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <>
SAVL_INLINE BFloat16 narrow<BFloat16>(float value) {
  if (value != value) return {0x7fc0};
  return {static_cast<uint16_t>(rounded_to_bfloat16(bits_of<uint32_t>(value)))};
}

// Loads a vector from storage as numbers of the arithmetic type, and stores it back.
template <typename S>
SAVL_INLINE Vec<Arithmetic<S>> load_wide(const S* from) {
  return load(from);
}
template <>
SAVL_INLINE Vec<float> load_wide<BFloat16>(const BFloat16* from) {
  typedef uint16_t Half __attribute__((vector_size(SAVL_VECTOR_BYTES / 2)));
  Half half;
  __builtin_memcpy(&half, from, sizeof(half));
  return bits_of<Vec<float>>(__builtin_convertvector(half, Vec<uint32_t>) << 16);
}

template <typename S>
SAVL_INLINE void store_narrow(S* to, Vec<Arithmetic<S>> value) {
  store(to, value);
}
template <>
SAVL_INLINE void store_narrow<BFloat16>(BFloat16* to, Vec<float> value) {
#if defined(SAVL_BFLOAT16_PAIRS) && !defined(SAVL_EMULATE_AVX512)
  const auto half = _mm512_cvtneps_pbh(value);
#else
  typedef uint16_t Half __attribute__((vector_size(SAVL_VECTOR_BYTES / 2)));
  Vec<uint32_t> rounded = rounded_to_bfloat16(bits_of<Vec<uint32_t>>(value));
  rounded = value != value ? Vec<uint32_t>{} + 0x7fc0 : rounded;
  const Half half = __builtin_convertvector(rounded, Half);
#endif
  __builtin_memcpy(to, &half, sizeof(half));
}

// a * b + c, rounded once if the processor can. Compilers may fuse another product of an expression than the one that
// is meant, so the instruction is named where it matters.
template <typename V>
SAVL_INLINE V fused_multiply_add(V a, V b, V c) {
  return a * b + c;
}
#if defined(__x86_64__) && SAVL_VECTOR_BYTES == 64 && !defined(SAVL_EMULATE_AVX512)
SAVL_INLINE Vec<float> fused_multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__x86_64__) && SAVL_VECTOR_BYTES == 32
SAVL_INLINE Vec<float> fused_multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a, b, c); }
#endif

// A double factor of vectors, stored as the sum of two numbers of type T. The product is that with the double factor,
// rounded once, except for a relative error of about 2^-48.
template <typename T>
class Factor {
 public:
  explicit Factor(double factor) : factor_(factor), high_(broadcast(static_cast<T>(factor))) {
    const double rest = factor - static_cast<double>(static_cast<T>(factor));
    low_ = broadcast(__builtin_fabs(rest) < kLargest ? static_cast<T>(rest) : T(0));
  }
  SAVL_INLINE Vec<T> operator*(Vec<T> x) const {
    if (SAVL_VECTOR_BYTES == 16) {  // the processor may have no fused multiply-add, and the sum below would round twice
      T lanes[kWidth<T>];
      store(lanes, x);
      for (T& lane : lanes) lane = static_cast<T>(lane * factor_);
      return load(lanes);
    }
    // Infinity times `low_` could be the other infinity, and the sum NaN.
    const Vec<T> finite = lesser(broadcast(kLargest), larger(broadcast(-kLargest), x));
    return fused_multiply_add(x, high_, finite * low_);
  }

 private:
  static constexpr T kLargest = static_cast<T>(sizeof(T) == 4 ? __FLT_MAX__ : __DBL_MAX__);
  double factor_;
  Vec<T> high_, low_;
};

// Returns 2^x for x <= 0. The result is 0 where it is below 2^-126.5, and NaN where x is NaN.
SAVL_INLINE Vec<float> exp2_of_negative(Vec<float> x) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: the low bits of the sum are the nearest integer
  x = larger(broadcast(-127.0f), x);
  const Vec<float> shifted = x + kRounder;
  const Vec<float> r = x - (shifted - kRounder);
  // (2^r - 1) / r for |r| <= 1/2, minimax (Cephes).
  Vec<float> p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  // 2^n, which is 0 for n = -127; the shift drops all of `shifted` but n.
  return p * bits_of<Vec<float>>((bits_of<Vec<int32_t>>(shifted) << 23) + (127 << 23));
}

// The kernels for float64 serve as a reference and need not be fast: they compute functions lane by lane.
template <typename Function>
SAVL_INLINE Vec<double> lane_by_lane(Vec<double> x, const Function& function) {
  double lanes[kWidth<double>];
  store(lanes, x);
  for (double& lane : lanes) lane = function(lane);
  return load(lanes);
}
SAVL_INLINE Vec<double> exponential(Vec<double> x) {
  return lane_by_lane(x, [](double lane) SAVL_ALWAYS_INLINE { return __builtin_exp(lane); });
}
SAVL_INLINE Vec<double> exponential_minus_one(Vec<double> x) {
  return lane_by_lane(x, [](double lane) SAVL_ALWAYS_INLINE { return __builtin_expm1(lane); });
}
SAVL_INLINE Vec<double> exp2_of_negative(Vec<double> x) {
  return lane_by_lane(x, [](double lane) SAVL_ALWAYS_INLINE { return __builtin_exp2(lane); });
}

// Loads and stores a vector of which only the first `lanes` exist. The other lanes of a loaded vector are 0.
template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE Vec<T> load_some(const S* from, int64_t lanes) {
  if (lanes == kWidth<T>) return load_wide(from);
  T values[kWidth<T>] = {};
  for (int lane = 0; lane < kWidth<T> && lane < lanes; ++lane) values[lane] = widen(from[lane]);
  return load(values);
}

template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE void store_some(S* to, Vec<T> value, int64_t lanes) {
  if (lanes == kWidth<T>) return store_narrow(to, value);
  T values[kWidth<T>];
  store(values, value);
  for (int lane = 0; lane < kWidth<T> && lane < lanes; ++lane) to[lane] = narrow<S>(values[lane]);
}

#if defined(__x86_64__) && SAVL_VECTOR_BYTES == 64 && !defined(SAVL_EMULATE_AVX512)
SAVL_INLINE __mmask16 first_lanes(int64_t lanes) { return lanes >= 16 ? 0xffff : (1u << lanes) - 1; }
template <>
SAVL_INLINE Vec<float> load_some<float>(const float* from, int64_t lanes) {
  return _mm512_maskz_loadu_ps(first_lanes(lanes), from);
}
template <>
SAVL_INLINE Vec<float> load_some<BFloat16>(const BFloat16* from, int64_t lanes) {
  typedef uint16_t Half __attribute__((vector_size(SAVL_VECTOR_BYTES / 2)));
  const Half half = bits_of<Half>(_mm256_maskz_loadu_epi16(first_lanes(lanes), from));
  return bits_of<Vec<float>>(__builtin_convertvector(half, Vec<uint32_t>) << 16);
}
template <>
SAVL_INLINE void store_some<float>(float* to, Vec<float> value, int64_t lanes) {
  _mm512_mask_storeu_ps(to, first_lanes(lanes), value);
}
template <>
SAVL_INLINE void store_some<BFloat16>(BFloat16* to, Vec<float> value, int64_t lanes) {
  BFloat16 numbers[kWidth<float>];
  store_narrow(numbers, value);
  _mm256_mask_storeu_epi16(to, first_lanes(lanes), bits_of<__m256i>(numbers));
}
#endif

// Calls `work(i, lanes)` for each vector of a line of `count` elements. The last vector may have fewer lanes.
template <typename T, typename Work>
SAVL_INLINE void for_vectors(int64_t count, const Work& work) {
  int64_t i = 0;
  for (; i + kWidth<T> <= count; i += kWidth<T>) work(i, kWidth<T>);
  if (i < count) work(i, count - i);
}

// Calls `work.operator()<R>()` with the storage type R of a kernel's output: float32 if `output_is_float` is true
// and S is bfloat16, otherwise S.
template <typename S, typename Work>
SAVL_INLINE void with_output_type(bool output_is_float, const Work& work) {
  if (sizeof(S) == 2 && output_is_float) {
    work.template operator()<Arithmetic<S>>();
  } else {
    work.template operator()<S>();
  }
}

// Prefetches the element `step` elements further on. An address outside the tensor is harmless.
template <typename S>
SAVL_INLINE void prefetch_after(const S* from, int64_t step) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + step * sizeof(S)));
}

// Aligned memory of one thread, from which `take` cuts arrays. A Scratch of 0 bytes has no memory: `take` returns null,
// and `taken` tells how many bytes are needed.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : memory_(bytes == 0 ? nullptr : static_cast<char*>(::operator new(bytes, std::align_val_t{kAlignment}))) {}
  ~Scratch() {
    if (memory_ != nullptr) ::operator delete(memory_, std::align_val_t{kAlignment});
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The bytes that an array takes.
  template <typename T>
  static int64_t bytes(int64_t count) {
    return round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
  }
  template <typename T>
  T* take(int64_t count) {
    T* result = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + taken_);
    taken_ += bytes<T>(count);
    return result;
  }
  int64_t taken() const { return taken_; }

 private:
  static constexpr int64_t kAlignment = 64;
  char* memory_;
  int64_t taken_ = 0;
};

SAVL_END_KERNELS

SAVL_BEGIN_TARGET
namespace savl {

template <>
struct ArithmeticTraits<cpu::SAVL_INSTRUCTION_SET::Vec<float>> {
  using V = cpu::SAVL_INSTRUCTION_SET::Vec<float>;
  using Integers = cpu::SAVL_INSTRUCTION_SET::Vec<int32_t>;
  SAVL_INLINE static V larger(V a, V b) { return cpu::SAVL_INSTRUCTION_SET::larger(a, b); }
  SAVL_INLINE static V lesser(V a, V b) { return cpu::SAVL_INSTRUCTION_SET::lesser(a, b); }
};

}  // namespace savl
SAVL_END_TARGET
