// Window attention, backward. The logits are computed again, block of rows by block of rows; with P the softmax, G the
// gradient of the output, and q and k scaled by severity as in the forward pass:
//
//   dP = G v^T      dS = P * (dP - sum_j P dP)      dq = dS k      dk = dS^T q      dv = P^T G      dbias[i - j] = sum
//   dS
//
// and from dq and dk by the product rule the gradients of what was scaled, q, k and the severity.
//
// One task is one head of a chunk of windows, done in order, so that each chunk has a bias gradient of its own that
// nobody else writes to. Overlapping windows add to the same keys: they come in colours, and a call does one colour,
// whose windows share no key.
//
// Included once per instruction set, inside its namespace.

template <typename T>
struct BackwardScratch {
  T *key_rows, *key_panels, *value_rows, *value_panels, *queries, *grad_out;  // packed inputs
  T *logits, *grad_logits;                                                    // of a block of rows
  T *grad_queries, *grad_keys, *grad_values;                                  // accumulated
  int64_t* offsets;

  static int64_t rows_bytes(const AttentionShape<T>& shape, int64_t rows) {
    return Scratch::bytes(rows * shape.padded_dim, sizeof(T));
  }
  static int64_t bytes(const AttentionShape<T>& shape) {
    return 4 * rows_bytes(shape, shape.most_keys + kRowTile) + 2 * rows_bytes(shape, shape.padded_keys) +
           2 * rows_bytes(shape, round_up(shape.most_queries, kRowTile)) + rows_bytes(shape, kRowBlock) +
           Scratch::bytes(kRowBlock * shape.padded_keys + kWidth<T>, sizeof(T)) +
           Scratch::bytes(kRowBlock * shape.padded_keys, sizeof(T)) +
           Scratch::bytes(2 * shape.padded_keys, sizeof(int64_t));
  }
  BackwardScratch(Scratch& scratch, const AttentionShape<T>& shape)
      : key_rows(scratch.take<T>((shape.most_keys + kRowTile) * shape.padded_dim)),
        key_panels(scratch.take<T>(shape.padded_keys * shape.padded_dim)),
        value_rows(scratch.take<T>((shape.most_keys + kRowTile) * shape.padded_dim)),
        value_panels(scratch.take<T>(shape.padded_keys * shape.padded_dim)),
        queries(scratch.take<T>(round_up(shape.most_queries, kRowTile) * shape.padded_dim)),
        grad_out(scratch.take<T>(round_up(shape.most_queries, kRowTile) * shape.padded_dim)),
        logits(scratch.take<T>(kRowBlock * shape.padded_keys + kWidth<T>)),
        grad_logits(scratch.take<T>(kRowBlock * shape.padded_keys)),
        grad_queries(scratch.take<T>(kRowBlock * shape.padded_dim)),
        grad_keys(scratch.take<T>((shape.most_keys + kRowTile) * shape.padded_dim)),
        grad_values(scratch.take<T>((shape.most_keys + kRowTile) * shape.padded_dim)),
        offsets(scratch.take<int64_t>(2 * shape.padded_keys)) {}
};

// out[j][:] += sum_r weights[r][j] * rows[r][:] for kRowTile keys j and `Vectors` vectors of channels.
template <typename T, int Vectors>
SAVL_INLINE void add_transposed(int64_t count, const T* weights, int64_t weight_stride, const T* rows, int64_t stride,
                                T* out) {
  Vec<T> sums[kRowTile][Vectors] = {};
  for (int64_t r = 0; r < count; ++r) {
    Vec<T> row[Vectors];
    for (int b = 0; b < Vectors; ++b) row[b] = load(rows + r * stride + b * kWidth<T>);
    for (int j = 0; j < kRowTile; ++j) {
      const Vec<T> weight = broadcast(weights[r * weight_stride + j]);
      for (int b = 0; b < Vectors; ++b) sums[j][b] = weight * row[b] + sums[j][b];
    }
  }
  for (int j = 0; j < kRowTile; ++j) {
    T* row = out + j * stride;
    for (int b = 0; b < Vectors; ++b) store(row + b * kWidth<T>, load(row + b * kWidth<T>) + sums[j][b]);
  }
}

// The same for all keys; `out` and the weights have room for keys up to the next multiple of kRowTile.
template <typename T>
SAVL_INLINE void add_all_transposed(int64_t count, int64_t keys, const T* weights, int64_t weight_stride, const T* rows,
                                    const AttentionShape<T>& shape, T* out) {
  const int64_t stride = shape.padded_dim;
  int64_t vectors = 0;
  for (int64_t c = 0; c < stride; c += vectors * kWidth<T>) {
    vectors = panel_vectors((stride - c) / kWidth<T>);
    for (int64_t j = 0; j < keys; j += kRowTile) {
      T* to = out + j * stride + c;
      if (vectors == 3) {
        add_transposed<T, 3>(count, weights + j, weight_stride, rows + c, stride, to);
      } else if (vectors == 2) {
        add_transposed<T, 2>(count, weights + j, weight_stride, rows + c, stride, to);
      } else {
        add_transposed<T, 1>(count, weights + j, weight_stride, rows + c, stride, to);
      }
    }
  }
}

// P and dP to dS, in the place of dP; `inverse` is one over the sum of the row of unnormalised weights, which become P.
template <typename T>
SAVL_INLINE void softmax_row_backward(int64_t padded_keys, T inverse, T* weights, T* grad) {
  Vec<T> dot{};
  for (int64_t j = 0; j < padded_keys; j += kWidth<T>) {
    const Vec<T> weight = load(weights + j) * inverse;
    store(weights + j, weight);
    dot += weight * load(grad + j);
  }
  const T total = sum_of<T>(dot);
  for (int64_t j = 0; j < padded_keys; j += kWidth<T>) store(grad + j, load(weights + j) * (load(grad + j) - total));
}

// Adds the gradient of the logits of query (i, j) to that of the bias, in the runs that the bias was read from. In
// double: an entry of the table is a sum over all windows.
template <typename T>
SAVL_INLINE void add_bias_gradient(const AttentionArgs& args, const Window& window, int i, int j, const T* row,
                                   double* table) {
  const int64_t span = args.span();
  const int columns = window.key_columns.length;
  for (int k = 0; k < window.key_rows.length; ++k, row += columns) {
    double* run = table + (i - k + window.offset) * span + (span - 1 - window.offset) - j;
    for (int l = 0; l < columns; ++l) run[l] += row[l];
  }
}

// Which lanes of the last vector of `for_overlapping_vectors` the one before did not have.
template <typename T>
SAVL_INLINE auto new_lanes(int64_t channels) {
  T lane[kWidth<T>];
  for (int i = 0; i < kWidth<T>; ++i) lane[i] = static_cast<T>(i);
  return load(lane) >= static_cast<T>(kWidth<T> - channels % kWidth<T>);
}

// Sum of the products of two rows of channels, in double.
template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE double dot_of(const S* a, const T* b, int64_t channels) {
  typedef double Wide __attribute__((vector_size(sizeof(double) * kWidth<T>)));
  Wide sum{};
  const bool done = for_overlapping_vectors<T>(channels, [&](int64_t c) SAVL_ALWAYS_INLINE {
    Vec<T> left = load_wide(a + c), right = load(b + c);
    if (c % kWidth<T> != 0) {
      const auto more = new_lanes<T>(channels);
      left = more ? left : Vec<T>{};
      right = more ? right : Vec<T>{};
    }
    sum += __builtin_convertvector(left, Wide) * __builtin_convertvector(right, Wide);
  });
  double rest = 0;
  for (int64_t c = done ? channels : 0; c < channels; ++c) rest += static_cast<double>(widen(a[c])) * b[c];
  return sum_of_lanes<double, kWidth<T>>(sum) + rest;
}

// Gradients of scaled rows to those of the image and of the severity. `unscaled` is what was scaled.
template <typename S, typename T>
SAVL_INLINE void spread_gradient(const AttentionArgs& args, const Window& window, const Image& unscaled,
                                 const Image& target, int64_t row, int64_t column, const T* gradient, T scale,
                                 bool weighed, bool add) {
  T* to = const_cast<T*>(pixel_of<T>(target, window, row, column, args.head_dim));
  T factor = scale;
  if (weighed && args.severity != nullptr) {
    const int64_t pixel = (window.batch * args.height + row) * args.width + column;
    const S* from = pixel_of<S>(unscaled, window, row, column, args.head_dim);
    args.grad_severity[window.head * args.batch * args.height * args.width + pixel] +=
        dot_of(from, gradient, args.head_dim) * scale;
    factor *= static_cast<const T*>(args.severity)[pixel];
  }
  if (!add) return write_channels(gradient, args.head_dim, factor, to);
  const bool done = for_overlapping_vectors<T>(args.head_dim, [&](int64_t c) SAVL_ALWAYS_INLINE {
    const Vec<T> before = load(to + c), sum = before + load(gradient + c) * factor;
    store(to + c, c % kWidth<T> == 0 ? sum : new_lanes<T>(args.head_dim) ? sum : before);
  });
  for (int64_t c = done ? args.head_dim : 0; c < args.head_dim; ++c) to[c] += gradient[c] * factor;
}

template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE void attend_backward(const AttentionArgs& args, const Window& window, const AttentionShape<T>& shape,
                                 const BackwardScratch<T>& scratch, BiasOfWholeWindows<T>& bias, double* grad_bias) {
  const double scale = query_scale(args);
  const int64_t queries = window.queries(), keys = window.keys(), padded_keys = round_up(keys, kKeyStep<T>);
  pack_rows<S>(args.k, window, window.key_rows, window.key_columns, shape, args, true, 1.0, scratch.key_rows);
  pack_panels(scratch.key_rows, window.keys(), shape, scratch.key_panels);
  pack_rows<S>(args.v, window, window.key_rows, window.key_columns, shape, args, false, 1.0, scratch.value_rows);
  pack_panels(scratch.value_rows, window.keys(), shape, scratch.value_panels);
  pack_rows<S>(args.q, window, window.query_rows, window.query_columns, shape, args, true, scale, scratch.queries);
  pack_rows<S>(args.grad_out, window, window.query_rows, window.query_columns, shape, args, false, 1.0,
               scratch.grad_out);
  zero_rows(scratch.queries, queries, round_up(queries, kRowTile), shape.padded_dim);
  zero_rows(scratch.grad_out, queries, round_up(queries, kRowTile), shape.padded_dim);
  zero_rows(scratch.grad_keys, 0, round_up(keys, kRowTile), shape.padded_dim);
  zero_rows(scratch.grad_values, 0, round_up(keys, kRowTile), shape.padded_dim);
  const bool overlaps = args.key_window != args.window;

  Logits<T> logits(args, window, shape, scratch.queries, scratch.key_panels, padded_keys, bias.of(window),
                   scratch.offsets, scratch.logits);
  Addend<T> zero;  // every vector of every row at one and the same place
  const T nothing[kWidth<T>] = {};
  for (const T*& row : zero.row) row = nothing;
  int64_t* nowhere = scratch.offsets + shape.padded_keys;
  for (int64_t vector = 0; vector < padded_keys / kWidth<T>; ++vector) nowhere[vector] = 0;
  zero.offset = nowhere;
  Vec<T> unused[kRowBlock] = {};
  for (int64_t first = 0; first < queries; first += kRowBlock) {
    const int64_t count = smaller(kRowBlock, queries - first), tiled = round_up(count, kRowTile);
    logits.compute(first, count);
    multiply_panels(tiled, scratch.grad_out + first * shape.padded_dim, shape, scratch.value_panels, padded_keys, zero,
                    scratch.grad_logits, unused);
    const Place first_query(window.query_columns, first);
    Place query = first_query;
    for (int64_t r = 0; r < count; ++r, query.next()) {
      T* grad = scratch.grad_logits + r * padded_keys;
      softmax_row_backward(padded_keys, logits.softmax(r), scratch.logits + r * padded_keys, grad);
      add_bias_gradient(args, window, query.row, query.column, grad, grad_bias);
    }
    zero_rows(scratch.grad_queries, 0, kRowBlock, shape.padded_dim);
    add_all_weighted(tiled, keys, scratch.grad_logits, padded_keys, scratch.key_rows, shape, scratch.grad_queries);
    add_all_transposed(count, keys, scratch.grad_logits, padded_keys, scratch.queries + first * shape.padded_dim, shape,
                       scratch.grad_keys);
    add_all_transposed(count, keys, scratch.logits, padded_keys, scratch.grad_out + first * shape.padded_dim, shape,
                       scratch.grad_values);
    query = first_query;
    for (int64_t r = 0; r < count; ++r, query.next()) {
      spread_gradient<S>(args, window, args.q, args.grad_q, window.query_rows.position[query.row],
                         window.query_columns.position[query.column], scratch.grad_queries + r * shape.padded_dim,
                         static_cast<T>(scale * kLn2), true, false);
    }
  }
  Place place(window.key_columns, 0);
  for (int64_t key = 0; key < keys; ++key, place.next()) {
    const int64_t row = window.key_rows.position[place.row], column = window.key_columns.position[place.column];
    if (row < 0 || column < 0) continue;
    // The packed queries are in units of ln 2.
    spread_gradient<S>(args, window, args.k, args.grad_k, row, column, scratch.grad_keys + key * shape.padded_dim,
                       T(kLn2), true, overlaps);
    spread_gradient<S>(args, window, args.v, args.grad_v, row, column, scratch.grad_values + key * shape.padded_dim,
                       T(1), false, overlaps);
  }
}

template <typename S>
void attention_backward_kernel(const AttentionArgs& args, int64_t begin, int64_t end) {
  using T = Arithmetic<S>;
  const AttentionShape<T> shape(args);
  const int64_t position_bytes = Scratch::bytes(2 * (args.window + args.key_window), sizeof(int64_t));
  Scratch memory(BackwardScratch<T>::bytes(shape) + BiasOfWholeWindows<T>::bytes(args, shape) + position_bytes);
  const BackwardScratch<T> scratch(memory, shape);
  BiasOfWholeWindows<T> bias(memory, args, shape);
  int64_t* positions = memory.take<int64_t>(2 * (args.window + args.key_window));
  const int64_t table = args.span() * args.span();
  const int64_t first_row = args.colour / args.colour_columns, first_column = args.colour % args.colour_columns;
  const int64_t rows = (args.window_rows() - first_row + args.colour_rows - 1) / args.colour_rows;
  const int64_t columns = (args.window_columns() - first_column + args.colour_columns - 1) / args.colour_columns;
  const int64_t windows = args.batch * rows * columns;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task % args.heads, chunk = task / args.heads;
    double* grad_bias = args.grad_bias + (chunk * args.heads + head) * table;
    const int64_t last = windows * (chunk + 1) / args.chunks;
    for (int64_t window = windows * chunk / args.chunks; window < last; ++window) {
      const int64_t batch = window / (rows * columns), place = window % (rows * columns);
      const int64_t row = first_row + place / columns * args.colour_rows;
      const int64_t column = first_column + place % columns * args.colour_columns;
      for_parts_of_window<S>(
          args, batch, row * args.window_columns() + column, head, positions,
          [&](const Window& part) { attend_backward<S>(args, part, shape, scratch, bias, grad_bias); });
    }
  }
}
