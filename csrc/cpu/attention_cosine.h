// The factors that make the product of a query and a key their cosine, multiplied by a scale and by the severity.
#pragma once

#include <optional>

#include "cpu/tensors.h"

namespace savl::cpu {

// The tensors have dtype float or double, the dtype of the arithmetic.
struct Cosine {
  Tensor x;                        // (B, H, W, C) with contiguous channels: queries or keys
  std::optional<Tensor> scale;     // (heads,) contiguous; for queries only
  std::optional<Tensor> severity;  // (B, H, W) contiguous
  Tensor factors;                  // (heads, B, H, W): severity * scale / norm
};

// Computes the factors. A norm below 1e-12 counts as 1e-12, as in torch.nn.functional.normalize.
Cosine cosine_of(const Tensor& x, int64_t heads, const std::optional<Tensor>& scale,
                 const std::optional<Tensor>& severity);

// Adds the part of the gradient of x through the norm to grad_x (B, H, W, C), which has contiguous channels, given the
// gradient of the factors, double (heads, B, H, W). Adds the gradients of the scale, double (heads,), and of the
// severity, double (heads, B, H, W), where these tensors are not null.
void add_cosine_gradient(const Cosine& cosine, const Tensor& grad_factors, const Tensor& grad_x, double* grad_scale,
                         double* grad_severity);

}  // namespace savl::cpu
