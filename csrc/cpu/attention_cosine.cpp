#include "cpu/attention_cosine.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace savl::cpu {
namespace {

constexpr double kLeastNorm = 1e-12;

// Calls `work(head, pixel, channels)` for each head of each pixel of `x`; `channels` is the offset of its first
// channel. Heads are divided among the threads.
template <typename Work>
void for_each_head(const Tensor& x, int64_t heads, const Work& work) {
  const int64_t batch = x.size(0), height = x.size(1), width = x.size(2), head_dim = x.size(3) / heads;
  torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      for (int64_t pixel = 0; pixel < batch * height * width; ++pixel) {
        const int64_t column = pixel % width, row = pixel / width % height, image = pixel / (width * height);
        work(head, pixel, image * x.stride(0) + row * x.stride(1) + column * x.stride(2) + head * head_dim);
      }
    }
  });
}

template <typename T>
double norm_of(const T* channels, int64_t count) {
  double sum = 0;
  for (int64_t c = 0; c < count; ++c) sum += static_cast<double>(channels[c]) * channels[c];
  return std::sqrt(sum);
}

template <typename T>
void compute_factors(const Cosine& cosine) {
  const int64_t heads = cosine.factors.size(0), head_dim = cosine.x.size(3) / heads;
  const int64_t pixels = cosine.factors.numel() / heads;
  const T* x = cosine.x.const_data_ptr<T>();
  const T* scale = cosine.scale.has_value() ? cosine.scale->const_data_ptr<T>() : nullptr;
  const T* severity = cosine.severity.has_value() ? cosine.severity->const_data_ptr<T>() : nullptr;
  T* factors = cosine.factors.mutable_data_ptr<T>();
  for_each_head(cosine.x, heads, [&](int64_t head, int64_t pixel, int64_t channels) {
    double factor = 1 / std::max(norm_of(x + channels, head_dim), kLeastNorm);
    if (scale != nullptr) factor *= scale[head];
    if (severity != nullptr) factor *= severity[pixel];
    factors[head * pixels + pixel] = static_cast<T>(factor);
  });
}

template <typename T>
void add_gradient(const Cosine& cosine, const Tensor& grad_factors, const Tensor& grad_x, double* grad_scale,
                  double* grad_severity) {
  const int64_t heads = cosine.factors.size(0), head_dim = cosine.x.size(3) / heads;
  const int64_t pixels = cosine.factors.numel() / heads;
  const T* x = cosine.x.const_data_ptr<T>();
  const T* scale = cosine.scale.has_value() ? cosine.scale->const_data_ptr<T>() : nullptr;
  const T* severity = cosine.severity.has_value() ? cosine.severity->const_data_ptr<T>() : nullptr;
  const double* grad = grad_factors.const_data_ptr<double>();
  T* to = grad_x.mutable_data_ptr<T>();
  const int64_t width = grad_x.size(2), height = grad_x.size(1);
  for_each_head(cosine.x, heads, [&](int64_t head, int64_t pixel, int64_t channels) {
    const double of_factor = grad[head * pixels + pixel];
    const double norm = norm_of(x + channels, head_dim);
    const double of_scale = scale == nullptr ? 1.0 : scale[head];
    const double of_severity = severity == nullptr ? 1.0 : severity[pixel];
    const double inverse = 1 / std::max(norm, kLeastNorm);
    if (grad_scale != nullptr) grad_scale[head] += of_factor * of_severity * inverse;
    if (grad_severity != nullptr) grad_severity[head * pixels + pixel] += of_factor * of_scale * inverse;
    if (norm <= kLeastNorm) return;  // the factor is constant
    const double step = -of_factor * of_scale * of_severity * inverse * inverse * inverse;
    T* target = to + pixel / (width * height) * grad_x.stride(0) + pixel / width % height * grad_x.stride(1) +
                pixel % width * grad_x.stride(2) + head * head_dim;
    for (int64_t c = 0; c < head_dim; ++c) target[c] += static_cast<T>(step * x[channels + c]);
  });
}

}  // namespace

Cosine cosine_of(const Tensor& x, int64_t heads, const std::optional<Tensor>& scale,
                 const std::optional<Tensor>& severity) {
  const ScalarType dtype = x.scalar_type();
  Cosine cosine{x, scale, severity, new_tensor({heads, x.size(0), x.size(1), x.size(2)}, dtype)};
  dtype == ScalarType::Double ? compute_factors<double>(cosine) : compute_factors<float>(cosine);
  return cosine;
}

void add_cosine_gradient(const Cosine& cosine, const Tensor& grad_factors, const Tensor& grad_x, double* grad_scale,
                         double* grad_severity) {
  if (cosine.x.scalar_type() == ScalarType::Double) {
    add_gradient<double>(cosine, grad_factors, grad_x, grad_scale, grad_severity);
  } else {
    add_gradient<float>(cosine, grad_factors, grad_x, grad_scale, grad_severity);
  }
}

}  // namespace savl::cpu
