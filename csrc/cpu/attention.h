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

// 1. Products in registers

// What is added to the products of a block of rows: for vector b of row r what lies at row[r] + offset[b]. Either a
// buffer, or the bias table itself, whose runs are vectors of keys.
template <typename T>
struct Addend {
  const T* row[kRowBlock];
  const int64_t* offset;
};

// out[r][:] = addend + sum_c rows[r][c] * panel[c][:] for kRowTile rows and `Vectors` vectors of columns.
template <typename T, int Vectors>
SAVL_INLINE void multiply_panel(int64_t depth, const T* rows, int64_t row_stride, const T* panel,
                                const T* const* addend, const int64_t* offset, T* out, int64_t out_stride,
                                Vec<T>* largest) {
  Vec<T> sums[kRowTile][Vectors] = {};
#pragma GCC unroll 4
  for (int64_t c = 0; c < depth; ++c) {
    Vec<T> columns[Vectors];
    for (int b = 0; b < Vectors; ++b) columns[b] = load(panel + (c * Vectors + b) * kWidth<T>);
    for (int r = 0; r < kRowTile; ++r) {
      const Vec<T> factor = broadcast(rows[r * row_stride + c]);
      for (int b = 0; b < Vectors; ++b) sums[r][b] = factor * columns[b] + sums[r][b];
    }
  }
  for (int r = 0; r < kRowTile; ++r) {
    Vec<T> row_largest = largest[r];
    for (int b = 0; b < Vectors; ++b) {
      const Vec<T> sum = sums[r][b] + load(addend[r] + offset[b]);
      store(out + r * out_stride + b * kWidth<T>, sum);
      row_largest = larger(sum, row_largest);
    }
    largest[r] = row_largest;
  }
}

// out[r][j] = addend + rows[r] . keys[j] for `count` rows (a multiple of kRowTile) and all keys of the panels;
// `largest` is raised to the largest of each row, lane by lane.
template <typename T>
SAVL_INLINE void multiply_panels(int64_t count, const T* rows, const AttentionShape<T>& shape, const T* panels,
                                 int64_t padded_keys, const Addend<T>& addend, T* out, Vec<T>* largest) {
  int64_t vectors = 0;
  for (int64_t first = 0; first < padded_keys; first += vectors * kWidth<T>) {
    vectors = panel_vectors((padded_keys - first) / kWidth<T>);
    const T* panel = panels + first * shape.head_dim;
    const int64_t* offset = addend.offset + first / kWidth<T>;
    for (int64_t r = 0; r < count; r += kRowTile) {
      const T* from = rows + r * shape.padded_dim;
      T* to = out + r * padded_keys + first;
      if (vectors == 3) {
        multiply_panel<T, 3>(shape.head_dim, from, shape.padded_dim, panel, addend.row + r, offset, to, padded_keys,
                             largest + r);
      } else if (vectors == 2) {
        multiply_panel<T, 2>(shape.head_dim, from, shape.padded_dim, panel, addend.row + r, offset, to, padded_keys,
                             largest + r);
      } else {
        multiply_panel<T, 1>(shape.head_dim, from, shape.padded_dim, panel, addend.row + r, offset, to, padded_keys,
                             largest + r);
      }
    }
  }
}

// out[r][:] += sum_j weights[r][j] * values[j][:] for kRowTile rows and `Vectors` vectors of channels. The sums begin
// at zero: short sums of short sums round less than one long one.
template <typename T, int Vectors>
SAVL_INLINE void add_weighted(int64_t count, const T* weights, int64_t weight_stride, const T* values,
                              int64_t value_stride, T* out, int64_t out_stride) {
  Vec<T> sums[kRowTile][Vectors] = {};
  for (int64_t j = 0; j < count; ++j, values += value_stride) {
    Vec<T> value[Vectors];
    for (int b = 0; b < Vectors; ++b) value[b] = load(values + b * kWidth<T>);
    for (int r = 0; r < kRowTile; ++r) {
      const Vec<T> weight = broadcast(weights[r * weight_stride + j]);
      for (int b = 0; b < Vectors; ++b) sums[r][b] = weight * value[b] + sums[r][b];
    }
  }
  for (int r = 0; r < kRowTile; ++r) {
    T* row = out + r * out_stride;
    for (int b = 0; b < Vectors; ++b) store(row + b * kWidth<T>, load(row + b * kWidth<T>) + sums[r][b]);
  }
}

// out[r][:] += sum_j weights[r][j] * values[j][:] for `rows` rows (a multiple of kRowTile) and `keys` values.
template <typename T>
SAVL_INLINE void add_all_weighted(int64_t rows, int64_t keys, const T* weights, int64_t weight_stride, const T* values,
                                  const AttentionShape<T>& shape, T* out) {
  const int64_t stride = shape.padded_dim;
  for (int64_t first = 0; first < keys; first += kKeyBlock) {
    const int64_t count = smaller(kKeyBlock, keys - first);
    for (int64_t r = 0; r < rows; r += kRowTile) {
      const T* weight = weights + r * weight_stride + first;
      int64_t vectors = 0;
      for (int64_t c = 0; c < stride; c += vectors * kWidth<T>) {
        const T* from = values + first * stride + c;
        T* to = out + r * stride + c;
        vectors = panel_vectors((stride - c) / kWidth<T>);
        if (vectors == 3) {
          add_weighted<T, 3>(count, weight, weight_stride, from, stride, to, stride);
        } else if (vectors == 2) {
          add_weighted<T, 2>(count, weight, weight_stride, from, stride, to, stride);
        } else {
          add_weighted<T, 1>(count, weight, weight_stride, from, stride, to, stride);
        }
      }
    }
  }
}

// 2. Bias and softmax

// The run of the bias table that query (i, j) has for the first row of keys. Columns of the table are stored in
// reverse: key l lies l further along; the next row of keys is one row of the table back.
template <typename T>
SAVL_INLINE const T* bias_run(const AttentionArgs& args, const Window& window, int i, int j) {
  const int64_t span = args.span();
  return static_cast<const T*>(args.bias) + (window.head * span + i + window.offset) * span +
         (span - 1 - window.offset) - j;
}

// Whether the keys of a row are whole vectors and none is masked: then the table can be read in place.
template <typename T>
SAVL_INLINE bool reads_bias_in_place(const Window& window, int64_t padded_keys) {
  return window.key_columns.length % kWidth<T> == 0 && window.keys() == padded_keys && window.row_break == 0 &&
         window.column_break == 0;
}

// The bias of query (i, j) against all keys, and minus infinity behind the last, copied run by run. Runs are copied in
// whole vectors, past their ends: `row` has room for one more than the keys, and so has the table.
template <typename T>
SAVL_NOINLINE void copy_bias_row(const AttentionArgs& args, const Window& window, int i, int j, int64_t padded_keys,
                                 T* row) {
  const T* run = bias_run<T>(args, window, i, j);
  const int columns = window.key_columns.length;
  const T masked = -__builtin_inf();
  T* to = row;
  for (int k = 0; k < window.key_rows.length; ++k, run -= args.span(), to += columns) {
    for (int l = 0; l < columns; l += kWidth<T>) store(to + l, load(run + l));
    const bool other_row = (i < window.row_break) != (k < window.row_break);
    if (!other_row && window.column_break == 0) continue;
    for (int l = 0; l < columns; ++l) {
      const bool other = other_row || (j < window.column_break) != (l < window.column_break);
      if (other) to[l] += masked;
    }
  }
  for (; to < row + padded_keys; ++to) *to = masked;
}

// The bias of all queries of whole windows against their keys, which is the same for all of them: copied once per head
// where runs are no whole vectors, unless that would crowd everything else out of the cache.
template <typename T>
class BiasOfWholeWindows {
 public:
  static int64_t bytes(const AttentionArgs& args, const AttentionShape<T>& shape) {
    return wanted(args, shape)
               ? Scratch::bytes(args.heads * per_head(shape), sizeof(T)) + Scratch::bytes(args.heads, sizeof(bool))
               : 0;
  }
  BiasOfWholeWindows(Scratch& scratch, const AttentionArgs& args, const AttentionShape<T>& shape)
      : args_(args), shape_(shape) {
    if (!wanted(args, shape)) return;
    rows_ = scratch.take<T>(args.heads * per_head(shape));
    copied_ = scratch.take<bool>(args.heads);
    for (int64_t head = 0; head < args.heads; ++head) copied_[head] = false;
  }

  // Rows of `padded_keys`, one for each query, or null for windows that are none of these.
  SAVL_INLINE const T* of(const Window& window) {
    if (rows_ == nullptr || window.row_break != 0 || window.column_break != 0 ||
        window.queries() != shape_.most_queries || window.keys() != shape_.most_keys) {
      return nullptr;
    }
    T* rows = rows_ + window.head * per_head(shape_);
    if (!copied_[window.head]) {
      copied_[window.head] = true;
      Place query(window.query_columns, 0);
      for (int64_t i = 0; i < shape_.most_queries; ++i, query.next()) {
        copy_bias_row(args_, window, query.row, query.column, shape_.padded_keys, rows + i * shape_.padded_keys);
      }
    }
    return rows;
  }

 private:
  static constexpr int64_t kMostBytes = 1 << 18;
  static bool wanted(const AttentionArgs& args, const AttentionShape<T>& shape) {
    return args.key_window % kWidth<T> != 0 &&
           args.heads * per_head(shape) * static_cast<int64_t>(sizeof(T)) <= kMostBytes;
  }
  static int64_t per_head(const AttentionShape<T>& shape) { return shape.most_queries * shape.padded_keys + kWidth<T>; }
  const AttentionArgs& args_;
  const AttentionShape<T>& shape_;
  T* rows_ = nullptr;
  bool* copied_ = nullptr;
};

// Logits of a window in units of ln 2, block by block of query rows: bias plus products, and the largest of each row.
// The units make the softmax a power of two; the bias table and the queries come in them.
template <typename T>
class Logits {
 public:
  Logits(const AttentionArgs& args, const Window& window, const AttentionShape<T>& shape, const T* queries,
         const T* key_panels, int64_t padded_keys, const T* bias_rows, int64_t* offsets, T* logits)
      : args_(args),
        window_(window),
        shape_(shape),
        queries_(queries),
        key_panels_(key_panels),
        padded_keys_(padded_keys),
        bias_rows_(bias_rows),
        in_place_(reads_bias_in_place<T>(window, padded_keys)),
        logits_(logits) {
    addend_.offset = offsets;
    for (int64_t key = 0; key < padded_keys; key += kWidth<T>) {
      const int64_t columns = window.key_columns.length;
      *offsets++ = in_place_ ? key % columns - key / columns * args.span() : key;
    }
  }

  // Rows [first, first + count). Rows up to the next multiple of kRowTile are computed along and mean nothing.
  SAVL_INLINE void compute(int64_t first, int64_t count) {
    const int64_t tiled = round_up(count, kRowTile);
    Place query(window_.query_columns, first);
    for (int64_t r = 0; r < tiled; ++r) {
      addend_.row[r] = bias_of(query, logits_ + r * padded_keys_);
      largest_[r] = broadcast(T(-__builtin_inf()));
      if (r + 1 < count) query.next();
    }
    multiply_panels(tiled, queries_ + first * shape_.padded_dim, shape_, key_panels_, padded_keys_, addend_, logits_,
                    largest_);
  }

  // Row r of the block to 2^(logit - largest), in place; returns one over their sum. A NaN makes all of them NaN.
  SAVL_INLINE T softmax(int64_t r) {
    T* row = logits_ + r * padded_keys_;
    const Vec<T> largest = broadcast(largest_of<T>(largest_[r]));
    Vec<T> sum{};
#pragma GCC unroll 4
    for (int64_t j = 0; j < padded_keys_; j += kWidth<T>) {
      const Vec<T> weight = exp2_of_negative(load(row + j) - largest);
      store(row + j, weight);
      sum += weight;
    }
    return T(1) / sum_of<T>(sum);
  }

 private:
  // In the table, among those of whole windows, or copied to `room`.
  SAVL_INLINE const T* bias_of(const Place& query, T* room) {
    if (in_place_) return bias_run<T>(args_, window_, query.row, query.column);
    if (bias_rows_ != nullptr) return bias_rows_ + (query.row * query.columns + query.column) * padded_keys_;
    copy_bias_row(args_, window_, query.row, query.column, padded_keys_, room);
    return room;
  }

  const AttentionArgs& args_;
  const Window& window_;
  const AttentionShape<T>& shape_;
  const T *queries_, *key_panels_;
  int64_t padded_keys_;
  const T* bias_rows_;
  bool in_place_;
  T* logits_;
  Addend<T> addend_;
  Vec<T> largest_[kRowBlock];
};

template <typename T>
SAVL_INLINE void zero_rows(T* rows, int64_t first, int64_t last, int64_t stride) {
  for (T* element = rows + first * stride; element < rows + last * stride; ++element) *element = 0;
}

// 3. One window and head

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

// 4. Which windows there are

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
