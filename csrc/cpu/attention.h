// Window attention, forward. One task is one head of one window:
//
//   pack     scaled queries row-major, scaled keys in panels of up to three vectors of columns, values row-major
//   rows     for each block of query rows: queries times keys, plus the bias, read as runs of the reversed table;
//            softmax over the whole row; times values, written out
//
// For 16x16 windows of 24 channels a task reads 72 KB of the image and writes 24 KB, keeps 24 KB of keys, 24 KB of
// values and 16 KB of logits in cache, and does 2 * 256 * 256 * 24 multiplications and additions each.
//
// A shifted window that wraps around the image falls into two or four parts that do not see each other. They are
// attended one by one, without a mask. The masked computation differs from that only where infinities or NaN would pass
// the mask (0 * NaN is NaN): such windows are found beforehand and computed with it.
//
// Included once per instruction set, inside its namespace.

// 1. One window and head

template <typename T>
struct AttentionScratch {
  T *rows, *key_panels, *values, *queries, *logits, *out;
  int64_t* offsets;

  static int64_t bytes(const AttentionShape<T>& shape) {
    return Scratch::bytes(shape.most_keys * shape.padded_dim, sizeof(T)) * 2 +
           Scratch::bytes(shape.padded_keys * shape.head_dim, sizeof(T)) +
           Scratch::bytes(round_up(shape.most_queries, kRowTile) * shape.padded_dim, sizeof(T)) +
           Scratch::bytes(kRowBlock * shape.padded_keys + kWidth<T>, sizeof(T)) +
           Scratch::bytes(kRowBlock * shape.padded_dim, sizeof(T)) + Scratch::bytes(shape.padded_keys, sizeof(int64_t));
  }
  AttentionScratch(Scratch& scratch, const AttentionShape<T>& shape)
      : rows(scratch.take<T>(shape.most_keys * shape.padded_dim)),
        key_panels(scratch.take<T>(shape.padded_keys * shape.head_dim)),
        values(scratch.take<T>(shape.most_keys * shape.padded_dim)),
        queries(scratch.take<T>(round_up(shape.most_queries, kRowTile) * shape.padded_dim)),
        logits(scratch.take<T>(kRowBlock * shape.padded_keys + kWidth<T>)),
        out(scratch.take<T>(kRowBlock * shape.padded_dim)),
        offsets(scratch.take<int64_t>(shape.padded_keys)) {}
};

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// 1 / sqrt(d), in the units of `Logits`.
SAVL_INLINE double query_scale(const AttentionArgs& args) {
  return kLog2E / __builtin_sqrt(static_cast<double>(args.head_dim));
}

template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE void attend(const AttentionArgs& args, const Window& window, const AttentionShape<T>& shape,
                        const AttentionScratch<T>& scratch, BiasOfWholeWindows<T>& bias) {
  pack_rows<S>(args.k, window, window.key_rows, window.key_columns, shape, args, true, 1.0, scratch.rows);
  pack_panels(scratch.rows, window.keys(), shape, scratch.key_panels);
  pack_rows<S>(args.v, window, window.key_rows, window.key_columns, shape, args, false, 1.0, scratch.values);
  pack_rows<S>(args.q, window, window.query_rows, window.query_columns, shape, args, true, query_scale(args),
               scratch.queries);
  const int64_t queries = window.queries(), padded_keys = round_up(window.keys(), kKeyStep<T>);
  zero_rows(scratch.queries, queries, round_up(queries, kRowTile), shape.padded_dim);

  Logits<T> logits(args, window, shape, scratch.queries, scratch.key_panels, padded_keys, bias.of(window),
                   scratch.offsets, scratch.logits);
  for (int64_t first = 0; first < queries; first += kRowBlock) {
    const int64_t count = smaller(kRowBlock, queries - first);
    logits.compute(first, count);
    T inverse[kRowBlock];
    for (int64_t r = 0; r < count; ++r) inverse[r] = logits.softmax(r);
    zero_rows(scratch.out, 0, kRowBlock, shape.padded_dim);
    add_all_weighted(round_up(count, kRowTile), window.keys(), scratch.logits, padded_keys, scratch.values, shape,
                     scratch.out);
    Place query(window.query_columns, first);
    for (int64_t r = 0; r < count; ++r, query.next()) {
      const int64_t row = window.query_rows.position[query.row];
      const int64_t column = window.query_columns.position[query.column];
      S* to = const_cast<S*>(pixel_of<S>(args.out, window, row, column, shape.head_dim));
      write_channels(scratch.out + r * shape.padded_dim, shape.head_dim, inverse[r], to);
    }
  }
}

// 2. Which windows there are

// Largest magnitude of a head's channels over the window, severity included; NaN or infinity if any of them is.
template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE T largest_magnitude(const AttentionArgs& args, const Image& image, const Window& window, bool weigh) {
  const T* severity = weigh ? static_cast<const T*>(args.severity) : nullptr;
  Vec<T> largest{}, spoilt{};  // infinity and NaN times 0 are NaN, and stay
  for (int i = 0; i < window.query_rows.length; ++i) {
    for (int j = 0; j < window.query_columns.length; ++j) {
      const int64_t row = window.query_rows.position[i], column = window.query_columns.position[j];
      const S* pixel = pixel_of<S>(image, window, row, column, args.head_dim);
      if (i + 1 < window.query_rows.length) prefetch_row_below(image, pixel, args.head_dim);
      const T factor = severity == nullptr ? T(1) : severity[(window.batch * args.height + row) * args.width + column];
      for (int64_t c = 0; c < args.head_dim; c += kWidth<T>) {
        const Vec<T> value = load_some(pixel + c, smaller(kWidth<T>, args.head_dim - c)) * factor;
        largest = larger(larger(value, -value), largest);
        spoilt += value * T(0);
      }
    }
  }
  return largest_of<T>(largest) + sum_of<T>(spoilt);
}

// Whether nothing can pass the mask of a window that wraps around: all values finite and no product overflows.
template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE bool mask_is_tight(const AttentionArgs& args, const Window& window) {
  const double largest = sizeof(T) == 4 ? 1e37 : 1e300;
  const double q = largest_magnitude<S>(args, args.q, window, true);
  const double k = largest_magnitude<S>(args, args.k, window, true);
  const double v = largest_magnitude<S>(args, args.v, window, false);
  if (args.grad_out.data != nullptr) {
    const double g = largest_magnitude<S>(args, args.grad_out, window, false);
    if (!(g * v * args.head_dim <= largest)) return false;
  }
  return args.bias_is_finite && q * k * args.head_dim <= largest && v <= largest;
}

// Calls `attend_one(window)` for the independent parts of window number `index` of a batch, row-major.
template <typename S, typename Attend>
SAVL_INLINE void for_parts_of_window(const AttentionArgs& args, int64_t batch, int64_t index, int64_t head,
                                     int64_t* positions, const Attend& attend_one) {
  const int64_t row = index / args.window_columns(), column = index % args.window_columns();
  const int length = static_cast<int>(args.window), key_length = static_cast<int>(args.key_window);
  const int margin = (key_length - length) / 2;
  int64_t *query_rows = positions, *query_columns = query_rows + length;
  int64_t *key_rows = query_columns + length, *key_columns = key_rows + key_length;
  for (int i = 0; i < length; ++i) {
    query_rows[i] = (row * length + args.shift + i) % args.height;
    query_columns[i] = (column * length + args.shift + i) % args.width;
  }
  Window window{batch,
                head,
                {query_rows, length},
                {query_columns, length},
                {query_rows, length},
                {query_columns, length},
                length - 1,
                0,
                0};
  if (key_length != length) {
    for (int i = 0; i < key_length; ++i) {
      const int64_t y = row * length - margin + i, x = column * length - margin + i;
      key_rows[i] = y < 0 || y >= args.height ? -1 : y;
      key_columns[i] = x < 0 || x >= args.width ? -1 : x;
    }
    window.key_rows = {key_rows, key_length};
    window.key_columns = {key_columns, key_length};
    window.offset = (length + key_length) / 2 - 1 + margin;  // keys are counted from margin before the queries
  }
  if (args.shift != 0) {
    const int broken = length - static_cast<int>(args.shift);
    window.row_break = row + 1 == args.window_rows() ? broken : 0;
    window.column_break = column + 1 == args.window_columns() ? broken : 0;
  }
  if ((window.row_break == 0 && window.column_break == 0) || !mask_is_tight<S>(args, window)) {
    attend_one(window);
    return;
  }
  const int row_ends[3] = {0, window.row_break, length}, column_ends[3] = {0, window.column_break, length};
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      const Axis rows{query_rows + row_ends[i], row_ends[i + 1] - row_ends[i]};
      const Axis columns{query_columns + column_ends[j], column_ends[j + 1] - column_ends[j]};
      if (rows.length == 0 || columns.length == 0) continue;
      attend_one(Window{batch, head, rows, columns, rows, columns, length - 1, 0, 0});
    }
  }
}

// 0, n - 1, 1, n - 2, ...: the last windows of a shifted image are cut up and cheap, and threads share tasks by halves.
SAVL_INLINE int64_t from_both_ends(int64_t index, int64_t count) {
  return index % 2 == 0 ? index / 2 : count - 1 - index / 2;
}

template <typename S>
void attention_kernel(const AttentionArgs& args, int64_t begin, int64_t end) {
  using T = Arithmetic<S>;
  const AttentionShape<T> shape(args);
  const int64_t position_bytes = Scratch::bytes(2 * (args.window + args.key_window), sizeof(int64_t));
  Scratch memory(AttentionScratch<T>::bytes(shape) + BiasOfWholeWindows<T>::bytes(args, shape) + position_bytes);
  const AttentionScratch<T> scratch(memory, shape);
  BiasOfWholeWindows<T> bias(memory, args, shape);
  int64_t* positions = memory.take<int64_t>(2 * (args.window + args.key_window));
  const int64_t windows = args.window_rows() * args.window_columns();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task % args.heads;
    const int64_t index = from_both_ends(task / args.heads, args.batch * windows);
    for_parts_of_window<S>(args, index / windows, index % windows, head, positions,
                           [&](const Window& window) { attend<S>(args, window, shape, scratch, bias); });
  }
}
