// The Gaussian posterior: one pass over mu and logvar (and eps) for the sample, the divergence and the variance of a block
// of pixels, whose sums stay in the first-level cache while the channels go by. Per element it reads 8 bytes (12 with
// eps), writes 4 where there is noise, and takes one exponential: with h = logvar / 2 and a = e^h - 1, the variance is
// 1 + (2 a + a^2), and the divergence's e^logvar - 1 - logvar is a^2 + 2 (a - h), which does not cancel near the prior.
//
// Included once per instruction set, inside its namespace.

template <typename T>
struct PosteriorTerms {
  Vec<T> deviation, variance;  // e^h, e^logvar
  Vec<T> variance_less_one;    // e^logvar - 1
  Vec<T> divergence;           // e^logvar - 1 - logvar
};

SAVL_INLINE PosteriorTerms<float> posterior_terms(Vec<float> logvar) {
  const Vec<float> h = logvar * 0.5f;
  const ExponentParts<float> parts = exponent_parts(h);
  const Vec<float> a = parts.r + parts.excess;                  // e^r - 1; r is h itself near the prior
  const Vec<float> square_excess = a * a + parts.excess * 2.0f;  // e^2r - 1 - 2r
  const Vec<float> square_less_one = parts.r * 2.0f + square_excess;
  const Vec<float> deviation = (a + 1.0f) * parts.low * parts.high;
  const Vec<float> variance = (square_less_one + 1.0f) * parts.low * parts.low * parts.high * parts.high;
  const Vec<float> far = variance - 1.0f;
  const auto near = parts.r == h;
  return {deviation, variance, near ? square_less_one : far, near ? square_excess : far - logvar};
}

SAVL_INLINE PosteriorTerms<double> posterior_terms(Vec<double> logvar) {
  double lanes[kWidth<double>];
  store(lanes, logvar);
  for (double& lane : lanes) lane = __builtin_expm1(lane);
  const Vec<double> less_one = load(lanes);
  return {exponential(logvar * 0.5), exponential(logvar), less_one, less_one - logvar};
}

template <typename S>
SAVL_INLINE const S* element(const Field& field, int64_t batch, int64_t channel, int64_t pixel) {
  return static_cast<const S*>(field.data) + batch * field.batch_stride + channel * field.channel_stride +
         pixel * field.pixel_stride;
}

template <typename S>
SAVL_INLINE S* writable(const Field& field, int64_t batch, int64_t channel, int64_t pixel) {
  return const_cast<S*>(element<S>(field, batch, channel, pixel));
}

// Rounded to the dtype of the field, as the eager path rounds its noise.
template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE Vec<T> rounded(Vec<T> value) {
  S lanes[kWidth<T>];
  store_narrow(lanes, value);
  return load_wide(lanes);
}

// Noise of `count` consecutive elements, the first of them number `first` in row-major order.
template <typename T>
SAVL_INLINE void seeded_noise(const PosteriorArgs& args, int64_t first, int64_t count, T* noise) {
  float four[4];
  uint64_t drawn = ~uint64_t{0};
  for (int64_t n = first; n < first + count; ++n) {
    const uint64_t block = static_cast<uint64_t>(n) / 4;
    if (block != drawn) standard_normals(args.offset + block, args.seed, four);
    drawn = block;
    noise[n - first] = static_cast<T>(four[n % 4]);
  }
}

// Where a block's noise comes from: eps, seeded, or nowhere. Seeded noise of a block is drawn channel by channel, which is
// the order of the stream, and read back in whatever order the layout asks for.
template <typename S, typename T = Arithmetic<S>>
class Noise {
 public:
  Noise(const PosteriorArgs& args, T* drawn) : args_(args), drawn_(drawn) {}

  void begin_block(int64_t batch, int64_t first_pixel, int64_t count) {
    batch_ = batch;
    first_pixel_ = first_pixel;
    if (!args_.seeded) return;
    for (int64_t c = 0; c < args_.channels; ++c) {
      seeded_noise(args_, (batch * args_.channels + c) * args_.pixels + first_pixel, count,
                   drawn_ + c * PosteriorArgs::kBlock);
    }
  }
  bool exists() const { return args_.seeded || args_.eps.data != nullptr; }
  // Along pixels if planar, else along channels.
  Vec<T> load_at(int64_t channel, int64_t pixel, int64_t lanes) const {
    if (!args_.seeded) return load_some(element<S>(args_.eps, batch_, channel, pixel), lanes);
    const T* from = drawn_ + channel * PosteriorArgs::kBlock + pixel - first_pixel_;
    const int64_t step = args_.planar ? 1 : PosteriorArgs::kBlock;
    T values[kWidth<T>] = {};
    for (int64_t lane = 0; lane < lanes; ++lane) values[lane] = from[lane * step];
    return rounded<S>(load(values));
  }

 private:
  const PosteriorArgs& args_;
  T* drawn_;
  int64_t batch_ = 0, first_pixel_ = 0;
};

constexpr int kChannelGroup = 8;  // channels added up before they join the sum, which keeps rounding errors small

// The terms of one vector of elements, mu^2 in the divergence; writes their sample where there is noise.
template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE PosteriorTerms<T> posterior_at(const PosteriorArgs& args, const Noise<S>& noise, int64_t batch,
                                           int64_t channel, int64_t pixel, int64_t lanes) {
  const Vec<T> mu = load_some(element<S>(args.mu, batch, channel, pixel), lanes);
  const Vec<T> logvar = load_some(element<S>(args.logvar, batch, channel, pixel), lanes);
  PosteriorTerms<T> terms = posterior_terms(logvar);
  terms.divergence += mu * mu;
  if (noise.exists()) {
    const Vec<T> sample = mu + terms.deviation * noise.load_at(channel, pixel, lanes);
    store_some(writable<S>(args.sample, batch, channel, pixel), sample, lanes);
  }
  return terms;
}

template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE void posterior_block_planar(const PosteriorArgs& args, const Noise<S>& noise, int64_t batch, int64_t first,
                                        int64_t count) {
  constexpr int64_t kBlock = PosteriorArgs::kBlock;
  T kl[kBlock] = {}, variance[kBlock] = {};
  for (int64_t group = 0; group < args.channels; group += kChannelGroup) {
    const int64_t last = smaller(group + kChannelGroup, args.channels);
    for (int64_t p = 0; p < count; p += kWidth<T>) {
      const int64_t lanes = smaller(kWidth<T>, count - p);
      Vec<T> divergence_sum{}, variance_sum{};
      for (int64_t c = group; c < last; ++c) {
        const PosteriorTerms<T> terms = posterior_at(args, noise, batch, c, first + p, lanes);
        divergence_sum += terms.divergence;
        variance_sum += terms.variance;
      }
      store(kl + p, load(kl + p) + divergence_sum);
      store(variance + p, load(variance + p) + variance_sum);
    }
  }
  const T channels = static_cast<T>(args.channels);
  T* kl_out = static_cast<T*>(args.kl) + batch * args.pixels + first;
  T* variance_out = static_cast<T*>(args.variance) + batch * args.pixels + first;
  for (int64_t p = 0; p < count; ++p) {
    kl_out[p] = kl[p] * T(0.5);
    variance_out[p] = variance[p] / channels;
  }
}

template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE void posterior_block_interleaved(const PosteriorArgs& args, const Noise<S>& noise, int64_t batch,
                                             int64_t first, int64_t count) {
  const T channels = static_cast<T>(args.channels);
  for (int64_t pixel = first; pixel < first + count; ++pixel) {
    Vec<T> divergence_sum{}, variance_sum{};
    T divergence_rest = 0, variance_rest = 0;
    for (int64_t c = 0; c < args.channels; c += kWidth<T>) {
      const int64_t lanes = smaller(kWidth<T>, args.channels - c);
      const PosteriorTerms<T> terms = posterior_at(args, noise, batch, c, pixel, lanes);
      if (lanes == kWidth<T>) {
        divergence_sum += terms.divergence;
        variance_sum += terms.variance;
      } else {
        for (int64_t lane = 0; lane < lanes; ++lane) {
          divergence_rest += terms.divergence[lane];
          variance_rest += terms.variance[lane];
        }
      }
    }
    const int64_t at = batch * args.pixels + pixel;
    static_cast<T*>(args.kl)[at] = (sum_of<T>(divergence_sum) + divergence_rest) * T(0.5);
    static_cast<T*>(args.variance)[at] = (sum_of<T>(variance_sum) + variance_rest) / channels;
  }
}

template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE void posterior_block_backward(const PosteriorArgs& args, const Noise<S>& noise, int64_t batch,
                                          int64_t first, int64_t count) {
  const T* grad_kl = static_cast<const T*>(args.grad_kl);
  const T* grad_variance = static_cast<const T*>(args.grad_variance);
  const T channels = static_cast<T>(args.channels);
  const int64_t outer = args.planar ? args.channels : count, inner = args.planar ? count : args.channels;
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t i = 0; i < inner; i += kWidth<T>) {
      const int64_t lanes = smaller(kWidth<T>, inner - i);
      const int64_t channel = args.planar ? o : i, pixel = first + (args.planar ? i : o);
      const Vec<T> mu = load_some(element<S>(args.mu, batch, channel, pixel), lanes);
      const Vec<T> logvar = load_some(element<S>(args.logvar, batch, channel, pixel), lanes);
      const PosteriorTerms<T> terms = posterior_terms(logvar);
      const T* pixel_kl = grad_kl + batch * args.pixels + pixel;
      const T* pixel_variance = grad_variance + batch * args.pixels + pixel;
      Vec<T> grad_mu{}, grad_logvar{};
      if (args.grad_kl != nullptr) {
        const Vec<T> g = args.planar ? load_some(pixel_kl, lanes) : broadcast(*pixel_kl);
        grad_mu += g * mu;
        grad_logvar += g * T(0.5) * terms.variance_less_one;
      }
      if (args.grad_variance != nullptr) {
        const Vec<T> g = args.planar ? load_some(pixel_variance, lanes) : broadcast(*pixel_variance);
        grad_logvar += g / channels * terms.variance;
      }
      if (args.grad_sample.data != nullptr) {
        const Vec<T> g = load_some(element<S>(args.grad_sample, batch, channel, pixel), lanes);
        grad_mu += g;
        grad_logvar += g * noise.load_at(channel, pixel, lanes) * terms.deviation * T(0.5);
        if (args.grad_eps.data != nullptr) {
          store_some(writable<S>(args.grad_eps, batch, channel, pixel), g * terms.deviation, lanes);
        }
      }
      if (args.grad_mu.data != nullptr) store_some(writable<S>(args.grad_mu, batch, channel, pixel), grad_mu, lanes);
      if (args.grad_logvar.data != nullptr) {
        store_some(writable<S>(args.grad_logvar, batch, channel, pixel), grad_logvar, lanes);
      }
    }
  }
}

// Calls `block(noise, batch, first pixel, pixels)` for tasks [begin, end).
template <typename S, typename Block>
SAVL_INLINE void for_posterior_blocks(const PosteriorArgs& args, int64_t begin, int64_t end, const Block& block) {
  using T = Arithmetic<S>;
  Scratch memory(args.seeded ? Scratch::bytes(args.channels * PosteriorArgs::kBlock, sizeof(T)) : 64);
  Noise<S> noise(args, memory.take<T>(0));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch = task / args.blocks(), first = task % args.blocks() * PosteriorArgs::kBlock;
    const int64_t count = smaller(PosteriorArgs::kBlock, args.pixels - first);
    noise.begin_block(batch, first, count);
    block(noise, batch, first, count);
  }
}

template <typename S>
void posterior_kernel(const PosteriorArgs& args, int64_t begin, int64_t end) {
  for_posterior_blocks<S>(args, begin, end, [&](const Noise<S>& noise, int64_t batch, int64_t first, int64_t count) {
    if (args.planar) {
      posterior_block_planar(args, noise, batch, first, count);
    } else {
      posterior_block_interleaved(args, noise, batch, first, count);
    }
  });
}

template <typename S>
void posterior_backward_kernel(const PosteriorArgs& args, int64_t begin, int64_t end) {
  for_posterior_blocks<S>(args, begin, end, [&](const Noise<S>& noise, int64_t batch, int64_t first, int64_t count) {
    posterior_block_backward(args, noise, batch, first, count);
  });
}
