// What the mathematics shared by the CPU and CUDA kernels needs to know about a type of numbers.
#pragma once

#include <cstring>

#include "compiler.h"

SAVL_BEGIN_TARGET
namespace savl {

// V is a vector of float32 (cpu/simd.h) or the float of one CUDA thread (cuda/elements.h). Each backend specialises
// this template for its V with three members:
//
//   Integers           the type of 32-bit integers with as many lanes as V
//   larger(V, V)       the first argument where it is larger, otherwise the second; a NaN in the second is kept
//   lesser(V, V)       the first argument where it is smaller, otherwise the second; a NaN in the second is kept
template <typename V>
struct ArithmeticTraits;

// The same bits as another type of the same size.
template <typename To, typename From>
SAVL_HOST_DEVICE To bits_of(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof(result));
  return result;
}

}  // namespace savl
SAVL_END_TARGET
