// The severity of one pixel, for every backend.
#pragma once

#include "host_device.h"

namespace savl {

// From the variance of the pixel and the statistics of the image; `scale` is their variance plus epsilon.
template <typename T>
SAVL_HOST_DEVICE T severity_of(T variance, T mean, T scale, T most) {
  T value = 1 - (variance - mean) / scale;
  value = value < 0 ? 0 : value;  // comparisons that NaN passes
  return value > most ? most : value;
}

}  // namespace savl
