// The gate of HAT's channel attention:
//
//   gate = scale * sigmoid(excite(relu(squeeze(average of a 3×3 convolution of x))))
//
// The average is taken over windows, or over neighbourhoods of windows. Convolution is linear: the average of its
// output equals its weight times the averages of the nine shifted inputs, plus the bias. The convolution itself is not
// computed.
#pragma once

#include <cstdint>

#include "cpu/kernel.h"
#include "cpu/simd.h"

namespace savl::cpu {

// For S and T see cpu/kernel.h. The kernel is called three times, once for each step. Each step reads what the previous
// one wrote, and divides its work into different tasks.
struct ChannelGateArgs {
  enum Step { kRowSums, kAverages, kGates } step;  // tasks: rows of pixels; windows; windows
  const void* x;                                   // S, pixels of contiguous channels
  int64_t x_stride, batch, height, width, channels;
  int64_t rows, columns;  // of windows; they divide height and width
  int64_t neighbourhood;  // side in windows, odd; windows beyond the border are left out of its average
  double scale;
  const void *weight, *bias;                  // T (outputs, channels, 3, 3) and (outputs)
  const void *squeeze_weight, *squeeze_bias;  // T (squeezed, outputs) and (squeezed)
  const void *excite_weight, *excite_bias;    // T (outputs, squeezed) and (outputs)
  int64_t outputs, squeezed;
  double* row_sums;  // (batch, height, columns, 3, channels): of the pixels of a window, shifted by -1, 0 and 1
  void* averages;    // T (batch, rows, columns, channels, 3, 3)
  void* gate;        // S (batch, rows, columns, outputs)
};

}  // namespace savl::cpu

SAVL_BEGIN_KERNELS

template <typename S>
void sum_row(const ChannelGateArgs& args, int64_t row) {
  const S* pixels = static_cast<const S*>(args.x) + row * args.width * args.x_stride;
  const int64_t length = args.width / args.columns;
  double* sums = args.row_sums + row * args.columns * 3 * args.channels;
  for (int64_t window = 0; window < args.columns; ++window) {
    for (int64_t shift = -1; shift <= 1; ++shift, sums += args.channels) {
      for (int64_t c = 0; c < args.channels; ++c) sums[c] = 0;
      const int64_t first = window * length + shift, last = smaller(first + length, args.width);
      for (int64_t column = first < 0 ? 0 : first; column < last; ++column) {
        const S* pixel = pixels + column * args.x_stride;
        for (int64_t c = 0; c < args.channels; ++c) sums[c] += widen(pixel[c]);
      }
    }
  }
}

template <typename T>
void average_window(const ChannelGateArgs& args, int64_t window, double* sums) {
  const int64_t length = args.height / args.rows, line = args.columns * 3 * args.channels, count = 3 * args.channels;
  const int64_t image = window / (args.rows * args.columns), column = window % args.columns;
  const double* lines = args.row_sums + image * args.height * line + column * count;
  const int64_t top = window / args.columns % args.rows * length;
  const double pixels = static_cast<double>(length * (args.width / args.columns));
  T* averages = static_cast<T*>(args.averages) + window * 3 * count;
  for (int64_t shift = 0; shift < 3; ++shift) {
    for (int64_t i = 0; i < count; ++i) sums[i] = 0;
    const int64_t first = top + shift - 1, last = smaller(first + length, args.height);
    for (int64_t row = first < 0 ? 0 : first; row < last; ++row) {
      for (int64_t i = 0; i < count; ++i) sums[i] += lines[row * line + i];
    }
    for (int64_t i = 0; i < count; ++i) {
      averages[i % args.channels * 9 + shift * 3 + i / args.channels] = static_cast<T>(sums[i] / pixels);
    }
  }
}

// out[i] = weight[i] . x + bias[i] for `outputs` rows of the weight.
template <typename T>
SAVL_INLINE void multiply_vector(int64_t outputs, int64_t inputs, const T* weight, const T* bias, const T* x, T* out) {
  for (int64_t i = 0; i < outputs; ++i, weight += inputs) {
    Vec<T> sum{};
    for_vectors<T>(inputs, [&](int64_t k, int64_t lanes)
                               SAVL_ALWAYS_INLINE { sum += load_some(weight + k, lanes) * load_some(x + k, lanes); });
    out[i] = sum_of<T>(sum) + bias[i];
  }
}

SAVL_INLINE float sigmoid(float x) { return 1 / (1 + __builtin_expf(-x)); }
SAVL_INLINE double sigmoid(double x) { return 1 / (1 + __builtin_exp(-x)); }

template <typename S, typename T = Arithmetic<S>>
void gate_window(const ChannelGateArgs& args, int64_t window, double* sums, T* average, T* pooled, T* squeezed) {
  const int64_t inputs = 9 * args.channels, around = args.neighbourhood / 2;
  const int64_t image = window / (args.rows * args.columns), row = window / args.columns % args.rows;
  const int64_t column = window % args.columns;
  const T* averages = static_cast<const T*>(args.averages) + image * args.rows * args.columns * inputs;
  for (int64_t k = 0; k < inputs; ++k) sums[k] = 0;
  int64_t count = 0;
  for (int64_t r = row < around ? 0 : row - around; r <= row + around && r < args.rows; ++r) {
    for (int64_t c = column < around ? 0 : column - around; c <= column + around && c < args.columns; ++c, ++count) {
      const T* other = averages + (r * args.columns + c) * inputs;
      for (int64_t k = 0; k < inputs; ++k) sums[k] += other[k];
    }
  }
  for (int64_t k = 0; k < inputs; ++k) average[k] = static_cast<T>(sums[k] / static_cast<double>(count));
  const auto numbers = [](const void* data) SAVL_ALWAYS_INLINE { return static_cast<const T*>(data); };
  multiply_vector(args.outputs, inputs, numbers(args.weight), numbers(args.bias), average, pooled);
  multiply_vector(args.squeezed, args.outputs, numbers(args.squeeze_weight), numbers(args.squeeze_bias), pooled,
                  squeezed);
  for (int64_t i = 0; i < args.squeezed; ++i) squeezed[i] = squeezed[i] < 0 ? 0 : squeezed[i];
  multiply_vector(args.outputs, args.squeezed, numbers(args.excite_weight), numbers(args.excite_bias), squeezed,
                  pooled);
  S* gate = static_cast<S*>(args.gate) + window * args.outputs;
  for (int64_t i = 0; i < args.outputs; ++i) gate[i] = narrow<S>(static_cast<T>(args.scale) * sigmoid(pooled[i]));
}

template <typename S>
void channel_gate_kernel(const ChannelGateArgs& args, int64_t begin, int64_t end) {
  using T = Arithmetic<S>;
  const int64_t inputs = 9 * args.channels;
  Scratch scratch(Scratch::bytes<double>(inputs) + Scratch::bytes<T>(inputs) + Scratch::bytes<T>(args.outputs) +
                  Scratch::bytes<T>(args.squeezed));
  double* sums = scratch.take<double>(inputs);
  T *average = scratch.take<T>(inputs), *pooled = scratch.take<T>(args.outputs);
  T* squeezed = scratch.take<T>(args.squeezed);
  for (int64_t task = begin; task < end; ++task) {
    if (args.step == ChannelGateArgs::kRowSums) {
      sum_row<S>(args, task);
    } else if (args.step == ChannelGateArgs::kAverages) {
      average_window<T>(args, task, sums);
    } else {
      gate_window<S>(args, task, sums, average, pooled, squeezed);
    }
  }
}

SAVL_END_KERNELS
