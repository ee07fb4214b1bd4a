// What a convolution computes after its products: bias, activation, gate, modulation and residual.
#pragma once

#include <cstdint>

#include "cpu/convolution_pack.h"
#include "cpu/simd.h"

SAVL_BEGIN_KERNELS

// GELU with the normal distribution function Phi of -|x|: x Phi(x) = max(x, 0) - |x| Phi(-|x|). In float32, Phi(-|x|)
// is exp(-x^2 / 2) times a polynomial, and the absolute error of the result is about 1e-7. For bfloat16 it is a
// polynomial alone for |x| < 4.2, with an absolute error of the result below 8e-5. Beyond, |x| Phi(-|x|) < 6e-5 is
// replaced by 0.
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
    Vec<float> p = a * 1.02667786e-06f + -2.42810576e-05f;
    p = p * a + 0.000256905504f;
    p = p * a + -0.00163078953f;
    p = p * a + 0.00708455044f;
    p = p * a + -0.0230062554f;
    p = p * a + 0.0599389857f;
    p = p * a + -0.131861993f;
    p = p * a + 0.24973835f;
    p = p * a + -0.39891832f;
    p = p * a + 0.5f;
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

SAVL_END_KERNELS
