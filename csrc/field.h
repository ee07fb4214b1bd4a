// A (B, R, H, W) tensor as kernels see it, without torch.
#pragma once

#include <cstdint>

namespace savl {

// Elements lie at batch * batch_stride + channel * channel_stride + pixel * pixel_stride.
struct Field {
  const void* data = nullptr;
  int64_t batch_stride = 0, channel_stride = 0, pixel_stride = 0;
};

}  // namespace savl
