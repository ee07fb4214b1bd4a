// savl::gaussian_posterior on the CPU; the op is defined in savl/ops/gaussian_posterior.py.
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/tensors.h"
#include "gaussian_posterior_math.h"

namespace savl::cpu {
namespace {

const char* const kOp = "savl::gaussian_posterior";

Tensor new_field(const Tensor& like, bool planar) {
  return new_tensor({like.size(0), like.size(1), like.size(2), like.size(3)}, like.scalar_type(), format_of(planar));
}

void check_like_mu(const Tensor& tensor, const Tensor& mu) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 4 && tensor.scalar_type() == mu.scalar_type(), kOp,
                  ": tensors must be on the CPU with 4 dimensions and the dtype of mu");
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(tensor.size(dim) == mu.size(dim), kOp, ": tensors must have the same shape");
  }
}

// The arguments that both directions have, and the tensors that they point into.
struct GaussianPosterior {
  GaussianPosteriorArgs args{};
  Storage storage;
  Tensor mu, logvar;
  std::optional<Tensor> eps;

  GaussianPosterior(const Tensor& mu_in, const Tensor& logvar_in, const std::optional<Tensor>& eps_in,
                    std::optional<int64_t> seed, int64_t offset)
      : storage(storage_of(kOp, mu_in)), mu(mu_in), logvar(logvar_in), eps(eps_in) {
    STD_TORCH_CHECK(mu.is_cpu() && mu.dim() == 4, kOp, ": mu must be (B, R, H, W) on the CPU");
    STD_TORCH_CHECK(mu.size(1) > 0 && mu.size(2) > 0 && mu.size(3) > 0, kOp, ": no channel or no pixel");
    check_like_mu(logvar, mu);
    args.planar = !is_interleaved(mu);
    mu = in_layout(mu, args.planar);
    logvar = in_layout(logvar, args.planar);
    args.mu = field_of(mu, args.planar);
    args.logvar = field_of(logvar, args.planar);
    if (eps.has_value()) {
      check_like_mu(*eps, mu);
      eps = in_layout(*eps, args.planar);
      args.eps = field_of(*eps, args.planar);
    }
    args.seeded = seed.has_value();
    args.seed = static_cast<uint64_t>(seed.value_or(0));
    args.offset = static_cast<uint64_t>(offset);
    args.batch = mu.size(0);
    args.channels = mu.size(1);
    args.pixels = mu.size(2) * mu.size(3);
  }
};

// A sum is made of blocks of a fixed size, whose results are added in order: it has the same bits on any number of
// threads.
constexpr int64_t kStatisticsBlock = 4096;

template <typename Term>
double blockwise_sum(int64_t count, const Term& term) {
  const int64_t blocks = (count + kStatisticsBlock - 1) / kStatisticsBlock;
  std::vector<double> partial(blocks);
  torch::stable::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      constexpr int kLanes = 8;
      double sums[kLanes] = {};
      const int64_t first = block * kStatisticsBlock;
      const int64_t last = first + kStatisticsBlock < count ? first + kStatisticsBlock : count;
      int64_t i = first;
      for (; i + kLanes <= last; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) sums[lane] += term(i + lane);
      }
      for (; i < last; ++i) sums[0] += term(i);
      for (const double sum : sums) partial[block] += sum;
    }
  });
  double result = 0;
  for (const double sum : partial) result += sum;
  return result;
}

// Computes the mean and the biased variance of the per-pixel variance of each image, and from them the severity map.
template <typename T>
void normalise(const GaussianPosteriorArgs& args, double severity_eps, double severity_max, const Tensor& mean,
               const Tensor& var, const Tensor& severity) {
  for (int64_t batch = 0; batch < args.batch; ++batch) {
    const T* v = static_cast<const T*>(args.variance) + batch * args.pixels;
    T* s = severity.mutable_data_ptr<T>() + batch * args.pixels;
    const double centre =
        blockwise_sum(args.pixels, [&](int64_t i) { return static_cast<double>(v[i]); }) / args.pixels;
    const double spread = blockwise_sum(args.pixels, [&](int64_t i) { return (v[i] - centre) * (v[i] - centre); });
    const T mean_value = mean.mutable_data_ptr<T>()[batch] = static_cast<T>(centre);
    const T var_value = var.mutable_data_ptr<T>()[batch] = static_cast<T>(spread / args.pixels);
    const T scale = var_value + static_cast<T>(severity_eps), most = static_cast<T>(severity_max);
    torch::stable::parallel_for(0, args.pixels, 4 * kStatisticsBlock, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) s[i] = severity_of(v[i], mean_value, scale, most);
    });
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gaussian_posterior(const Tensor& mu, const Tensor& logvar,
                                                                              const std::optional<Tensor>& eps,
                                                                              std::optional<int64_t> seed,
                                                                              int64_t offset, double severity_eps,
                                                                              double severity_max) {
  GaussianPosterior posterior(mu, logvar, eps, seed, offset);
  GaussianPosteriorArgs& args = posterior.args;
  const ScalarType wide = arithmetic_of(mu);
  const bool noisy = eps.has_value() || seed.has_value();
  const Tensor sample = noisy ? new_field(mu, args.planar) : new_tensor({0}, mu.scalar_type());
  if (noisy) args.sample = field_of(sample, args.planar);
  const int64_t batch = mu.size(0), height = mu.size(2), width = mu.size(3);
  const Tensor kl = new_tensor({batch, height, width}, wide), severity = new_tensor({batch, height, width}, wide);
  const Tensor variance = new_tensor({batch, height, width}, wide);
  const Tensor mean = new_tensor({batch}, wide), var = new_tensor({batch}, wide);
  args.kl = kl.mutable_data_ptr();
  args.variance = variance.mutable_data_ptr();
  run(kernels().gaussian_posterior.forward, posterior.storage, args, args.tasks());
  if (wide == ScalarType::Double) {
    normalise<double>(args, severity_eps, severity_max, mean, var, severity);
  } else {
    normalise<float>(args, severity_eps, severity_max, mean, var, severity);
  }
  return {sample, kl, severity, variance, mean, var};
}

// `grad_variance` is the whole gradient of the per-pixel variance, including the contributions of severity and
// statistics.
std::tuple<Tensor, Tensor, Tensor> gaussian_posterior_backward(
    const std::optional<Tensor>& grad_sample, const std::optional<Tensor>& grad_kl,
    const std::optional<Tensor>& grad_variance, const Tensor& mu, const Tensor& logvar,
    const std::optional<Tensor>& eps, std::optional<int64_t> seed, int64_t offset, bool wants_grad_eps) {
  GaussianPosterior posterior(mu, logvar, eps, seed, offset);
  GaussianPosteriorArgs& args = posterior.args;
  const ScalarType wide = arithmetic_of(mu);
  std::optional<Tensor> sample_rows, kl_map, variance_map;
  if (grad_sample.has_value()) {
    check_like_mu(*grad_sample, mu);
    STD_TORCH_CHECK(eps.has_value() || seed.has_value(), kOp, ": a gradient of the sample, but no noise");
    sample_rows = in_layout(*grad_sample, args.planar);
    args.grad_sample = field_of(*sample_rows, args.planar);
  }
  for (auto [given, kept, target] :
       {std::tuple{&grad_kl, &kl_map, &args.grad_kl}, std::tuple{&grad_variance, &variance_map, &args.grad_variance}}) {
    if (!given->has_value()) continue;
    STD_TORCH_CHECK((*given)->is_cpu() && (*given)->numel() == args.batch * args.pixels, kOp,
                    ": a gradient must be (B, H, W)");
    *kept = contiguous_as(**given, wide);
    *target = (*kept)->const_data_ptr();
  }
  const Tensor grad_mu = new_field(mu, args.planar), grad_logvar = new_field(mu, args.planar);
  Tensor grad_eps = new_tensor({0}, mu.scalar_type());
  args.grad_mu = field_of(grad_mu, args.planar);
  args.grad_logvar = field_of(grad_logvar, args.planar);
  if (wants_grad_eps && grad_sample.has_value()) {
    grad_eps = new_field(mu, args.planar);
    args.grad_eps = field_of(grad_eps, args.planar);
  }
  run(kernels().gaussian_posterior.backward, posterior.storage, args, args.tasks());
  return {grad_mu, grad_logvar, grad_eps};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(savl, CPU, library) {
  library.impl("gaussian_posterior", TORCH_BOX(&gaussian_posterior));
  library.impl("gaussian_posterior_backward", TORCH_BOX(&gaussian_posterior_backward));
}

}  // namespace savl::cpu
