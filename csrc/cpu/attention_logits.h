// The logits of blocks of query rows: where their bias lies or is copied to, and the softmax over them.
//
// Included once per instruction set, inside its namespace.

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
