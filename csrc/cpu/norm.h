// Layer normalisation of rows of channels. A row is read once from memory, in its own dtype, into a line of the
// arithmetic dtype that is padded to whole vectors and stays in the first-level cache. The backward pass also adds up,
// over the rows of a chunk, what weight and bias get.
//
// Included once per instruction set, inside its namespace.

SAVL_INLINE float square_root(float value) { return __builtin_sqrtf(value); }
SAVL_INLINE double square_root(double value) { return __builtin_sqrt(value); }

// What a task keeps beside the rows: lines of `padded` numbers.
template <typename T>
struct NormLines {
  int64_t padded;
  Scratch memory;
  T *weight, *bias, *row, *weighted, *of_weight, *of_bias;

  explicit NormLines(const NormArgs& args)
      : padded(round_up(args.channels, kWidth<T>)), memory(6 * Scratch::bytes(padded, sizeof(T))) {
    for (T** line : {&weight, &bias, &row, &weighted, &of_weight, &of_bias}) *line = memory.take<T>(padded);
    copy(args, static_cast<const T*>(args.weight), weight);
    copy(args, static_cast<const T*>(args.bias), bias);
  }

  template <typename S>
  SAVL_INLINE void copy(const NormArgs& args, const S* from, T* to) const {
    for_vectors<T>(args.channels,
                   [&](int64_t c, int64_t lanes) SAVL_ALWAYS_INLINE { store(to + c, load_some(from + c, lanes)); });
  }

  template <typename Work>
  SAVL_INLINE void for_all(const Work& work) const {
    for (int64_t c = 0; c < padded; c += kWidth<T>) work(c);
  }
};

// R: of the result, S or float.
template <typename S, typename R, typename T>
SAVL_INLINE void norm_row(const NormArgs& args, const NormLines<T>& lines, int64_t row) {
  const S* x = static_cast<const S*>(args.x) + row * args.x_stride;
  R* out = static_cast<R*>(args.out) + row * args.channels;
  const T channels = static_cast<T>(args.channels);
  Vec<T> sum{}, squares{};
  for_vectors<T>(args.channels, [&](int64_t c, int64_t lanes) SAVL_ALWAYS_INLINE {
    const Vec<T> numbers = load_some(x + c, lanes);
    store(lines.row + c, numbers);
    sum += numbers;
  });
  const T mean = sum_of<T>(sum) / channels;
  for (int64_t c = args.channels; c < lines.padded; ++c) lines.row[c] = mean;  // no distance from it
  lines.for_all([&](int64_t c) SAVL_ALWAYS_INLINE {
    const Vec<T> centred = load(lines.row + c) - mean;
    store(lines.row + c, centred);
    squares += centred * centred;
  });
  const T inverse = 1 / square_root(sum_of<T>(squares) / channels + static_cast<T>(args.eps));
  for_vectors<T>(args.channels, [&](int64_t c, int64_t lanes) SAVL_ALWAYS_INLINE {
    const Vec<T> normed = load(lines.row + c) * inverse;
    store_some(out + c, normed * load(lines.weight + c) + load(lines.bias + c), lanes);
  });
  static_cast<T*>(args.mean)[row] = mean;
  static_cast<T*>(args.inverse)[row] = inverse;
}

// `lines.of_weight` and `lines.of_bias` are added to.
template <typename S, typename R, typename T>
SAVL_INLINE void norm_row_backward(const NormArgs& args, const NormLines<T>& lines, int64_t row) {
  const S* x = static_cast<const S*>(args.x) + row * args.x_stride;
  const R* grad_out = static_cast<const R*>(args.grad_out) + row * args.grad_out_stride;
  S* grad_x = static_cast<S*>(args.grad_x) + row * args.channels;
  const T channels = static_cast<T>(args.channels);
  const T mean = static_cast<const T*>(args.mean)[row], inverse = static_cast<const T*>(args.inverse)[row];
  Vec<T> sum{}, along{};
  for_vectors<T>(args.channels, [&](int64_t c, int64_t lanes) SAVL_ALWAYS_INLINE {
    const Vec<T> given = load_some(grad_out + c, lanes);  // 0 past the channels
    const Vec<T> normed = (load_some(x + c, lanes) - mean) * inverse;
    const Vec<T> weighted = given * load(lines.weight + c);
    sum += weighted;
    along += weighted * normed;
    store(lines.of_weight + c, load(lines.of_weight + c) + given * normed);
    store(lines.of_bias + c, load(lines.of_bias + c) + given);
    store(lines.row + c, normed);
    store(lines.weighted + c, weighted);
  });
  const T mean_sum = sum_of<T>(sum) / channels, mean_along = sum_of<T>(along) / channels;
  for_vectors<T>(args.channels, [&](int64_t c, int64_t lanes) SAVL_ALWAYS_INLINE {
    const Vec<T> change = load(lines.weighted + c) - mean_sum - load(lines.row + c) * mean_along;
    store_some(grad_x + c, change * inverse, lanes);
  });
}

template <typename S>
void norm_kernel(const NormArgs& args, int64_t begin, int64_t end) {
  using T = Arithmetic<S>;
  const NormLines<T> lines(args);
  for (int64_t row = begin; row < end; ++row) {
    if (sizeof(S) == 2 && args.wide) {
      norm_row<S, T>(args, lines, row);
    } else {
      norm_row<S, S>(args, lines, row);
    }
  }
}

// Tasks are chunks of rows. Sums over a few rows join those of the chunk in double, which keeps rounding errors small.
template <typename S>
void norm_backward_kernel(const NormArgs& args, int64_t begin, int64_t end) {
  using T = Arithmetic<S>;
  constexpr int64_t kFewRows = 16;
  const NormLines<T> lines(args);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t last = smaller((chunk + 1) * args.chunk_rows, args.rows);
    double* sums = args.sums + chunk * 2 * args.channels;
    for (int64_t first = chunk * args.chunk_rows; first < last; first += kFewRows) {
      for (int64_t c = 0; c < lines.padded; ++c) lines.of_weight[c] = lines.of_bias[c] = 0;
      for (int64_t row = first; row < smaller(first + kFewRows, last); ++row) {
        if (sizeof(S) == 2 && args.wide) {
          norm_row_backward<S, T>(args, lines, row);
        } else {
          norm_row_backward<S, S>(args, lines, row);
        }
      }
      for (int64_t c = 0; c < args.channels; ++c) {
        sums[c] += lines.of_weight[c];
        sums[args.channels + c] += lines.of_bias[c];
      }
    }
  }
}
