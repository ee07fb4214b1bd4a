// A (B, R, H, W) tensor as the kernels see it. This header does not need torch.
#pragma once

#include <cstdint>

namespace savl {

// Elements lie at batch * batch_stride + channel * channel_stride + pixel * pixel_stride.
struct Field {
  const void* data = nullptr;
  int64_t batch_stride = 0, channel_stride = 0, pixel_stride = 0;
};

}  // namespace savl
