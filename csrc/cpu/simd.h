// Vectors of SAVL_VECTOR_BYTES in the compiler's own vector extension, which GCC and Clang lower to whatever the target
// has: the same source is SSE2, AVX2, AVX-512 and NEON. Included once per instruction set, inside its namespace.

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(SAVL_VECTOR_BYTES)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;

template <typename T>
constexpr int kWidth = SAVL_VECTOR_BYTES / static_cast<int>(sizeof(T));

#define SAVL_ALWAYS_INLINE __attribute__((always_inline))
#define SAVL_INLINE inline SAVL_ALWAYS_INLINE
// For large functions with several callers, which take long to compile with sanitizers.
#define SAVL_NOINLINE __attribute__((noinline))

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

template <typename To, typename From>
SAVL_INLINE To bits_of(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  __builtin_memcpy(&result, &value, sizeof(result));
  return result;
}

// The first operand where it is larger (smaller), else the second: NaN in the first is dropped, in the second kept.
// Spelt out for float on x86, where compilers miss that it is one instruction.
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
// The form with a mask, all of it set: the plain one makes GCC warn of an uninitialised operand in its own header.
SAVL_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return _mm512_maskz_max_ps(0xffff, a, b); }
SAVL_INLINE Vec<float> lesser(Vec<float> a, Vec<float> b) { return _mm512_maskz_min_ps(0xffff, a, b); }
#endif

template <typename T, int kLanes>
struct Halves {
  typedef T Half __attribute__((vector_size(sizeof(T) * kLanes / 2)));
  Half low, high;
};

// Half and half, in registers: the order of the sum is that of a tree.
template <typename T, int kLanes, typename V>
SAVL_INLINE T sum_of_lanes(V value) {
  if constexpr (kLanes == 1) {
    return value[0];
  } else {
    const auto halves = bits_of<Halves<T, kLanes>>(value);
    return sum_of_lanes<T, kLanes / 2>(halves.low + halves.high);
  }
}

template <typename T>
SAVL_INLINE T sum_of(Vec<T> value) {
  return sum_of_lanes<T, kWidth<T>>(value);
}

// Likewise; of two NaN or a NaN and a number either may be taken.
template <typename T, int kLanes, typename V>
SAVL_INLINE T largest_of_lanes(V value) {
  if constexpr (kLanes == 1) {
    return value[0];
  } else {
    const auto halves = bits_of<Halves<T, kLanes>>(value);
    return largest_of_lanes<T, kLanes / 2>(halves.low > halves.high ? halves.low : halves.high);
  }
}

template <typename T>
SAVL_INLINE T largest_of(Vec<T> value) {
  return largest_of_lanes<T, kWidth<T>>(value);
}

// The lanes of two vectors in turn: of their first halves, or of their second ones.
template <typename T, int... kLane>
SAVL_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, bool second, std::integer_sequence<int, kLane...>) {
  constexpr int kHalf = kWidth<T> / 2;
  if (second) {
    return Vec<T>{(kLane % 2 == 0 ? a[kHalf + kLane / 2] : b[kHalf + kLane / 2])...};
  }
  return Vec<T>{(kLane % 2 == 0 ? a[kLane / 2] : b[kLane / 2])...};
}

// Lane j of row i to lane i of row j, in registers: every round moves the highest bit of i behind the lowest one of j.
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

// Storage types: bfloat16 is kept as its bits.
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
template <>
SAVL_INLINE BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = bits_of<uint32_t>(value);
  if (value != value) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}

// A vector of arithmetic from storage and back.
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
  typedef uint16_t Half __attribute__((vector_size(SAVL_VECTOR_BYTES / 2)));
  const Vec<uint32_t> bits = bits_of<Vec<uint32_t>>(value);
  Vec<uint32_t> rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  rounded = value != value ? Vec<uint32_t>{} + 0x7fc0 : rounded;
  const Half half = __builtin_convertvector(rounded, Half);
  __builtin_memcpy(to, &half, sizeof(half));
}

// a * factor, rounded once.
SAVL_INLINE Vec<double> times(Vec<double> a, double factor) { return a * factor; }
SAVL_INLINE Vec<float> times(Vec<float> a, double factor) {
  // Half by half: of a vector of twice the width GCC makes a detour through memory.
  typedef float Half __attribute__((vector_size(SAVL_VECTOR_BYTES / 2)));
  Half halves[2];
  __builtin_memcpy(halves, &a, sizeof(a));
  for (Half& half : halves) half = __builtin_convertvector(__builtin_convertvector(half, Vec<double>) * factor, Half);
  return bits_of<Vec<float>>(halves);
}

// Of one width, for the bits of floats.
template <typename V>
struct IntegersOf;
template <>
struct IntegersOf<Vec<float>> {
  using type = Vec<int32_t>;
};

// 2^x for x <= 0, 0 from 2^-126.5 down, and NaN for NaN.
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

// float64 is there to judge by, not to be fast.
SAVL_INLINE Vec<double> exponential(Vec<double> x) {
  double lanes[kWidth<double>];
  store(lanes, x);
  for (double& lane : lanes) lane = __builtin_exp(lane);
  return load(lanes);
}
SAVL_INLINE Vec<double> exp2_of_negative(Vec<double> x) {
  double lanes[kWidth<double>];
  store(lanes, x);
  for (double& lane : lanes) lane = __builtin_exp2(lane);
  return load(lanes);
}

// A vector of which only the first `lanes` exist.
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

// Calls `work(i, lanes)` for the vectors of a line of `count` elements, the last of which may be cut short.
template <typename T, typename Work>
SAVL_INLINE void for_vectors(int64_t count, const Work& work) {
  int64_t i = 0;
  for (; i + kWidth<T> <= count; i += kWidth<T>) work(i, kWidth<T>);
  if (i < count) work(i, count - i);
}

// Asks for what lies `step` elements further. Addresses outside are harmless.
template <typename S>
SAVL_INLINE void prefetch_after(const S* from, int64_t step) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + step * sizeof(S)));
}

// Aligned scratch of one thread, cut into arrays by `take`.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(::operator new(bytes, std::align_val_t{64})), next_((char*)memory_) {}
  ~Scratch() { ::operator delete(memory_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  static int64_t bytes(int64_t count, int64_t size) { return round_up(count * size, 64); }
  template <typename T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(next_);
    next_ += bytes(count, sizeof(T));
    return result;
  }

 private:
  void* memory_;
  char* next_;
};
