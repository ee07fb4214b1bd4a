// The logits of a block of query rows: where their bias is, and the softmax of each row.
#pragma once

#include <cstdint>

#include "cpu/attention_pack.h"
#include "cpu/attention_products.h"
#include "cpu/attention_tiles.h"
#include "cpu/attention_window.h"
#include "cpu/simd.h"

SAVL_BEGIN_KERNELS

// Where in the bias of a head the run for query (i, j) and the first row of keys begins: element l of the run belongs
// to key l of the row, because the columns of a table are stored in reverse order. The runs of further rows of keys
// follow at steps of `args.bias_row_step()`.
SAVL_INLINE int64_t bias_run(const AttentionArgs& args, const Window& window, int i, int j, int64_t query_stride) {
  if (args.bias_is_table) {
    const int64_t span = args.columns.span();
    return (i + window.row_offset) * span + (span - 1 - window.column_offset) - j;
  }
  const int64_t query = (window.first_query.row + i) * args.columns.window + window.first_query.column + j;
  return query * query_stride + window.first_key.row * args.columns.key_window + window.first_key.column;
}

template <typename T>
SAVL_INLINE const T* bias_of_query(const AttentionArgs& args, const Window& window, int i, int j) {
  return static_cast<const T*>(args.bias) + window.head * args.bias_head_stride +
         bias_run(args, window, i, j, args.bias_query_stride);
}

// Whether the bias can be read in place: the runs are whole vectors, or follow each other.
template <typename T>
SAVL_INLINE bool reads_bias_in_place(const AttentionArgs& args, int64_t key_columns, int64_t keys,
                                     int64_t padded_keys) {
  const bool contiguous = !args.bias_is_table && key_columns == args.columns.key_window;
  return keys == padded_keys && (contiguous || key_columns % kWidth<T> == 0);
}

// Copies the bias of query (i, j) and all keys, run by run, plus the mask between different sides of the image,
// followed by minus infinity for the padding. Whole vectors are copied, past the end of a run: `row` and the bias have
// room for one vector more.
template <typename T>
SAVL_NOINLINE void copy_bias_row(const AttentionArgs& args, const Window& window, int i, int j, int64_t padded_keys,
                                 T* row) {
  const T* run = bias_of_query<T>(args, window, i, j);
  const int columns = window.keys.columns.length;
  const T other_side = static_cast<T>(args.mask), padding = -__builtin_inf();
  T* to = row;
  for (int k = 0; k < window.keys.rows.length; ++k, run += args.bias_row_step(), to += columns) {
    for (int l = 0; l < columns; l += kWidth<T>) store(to + l, load(run + l));
    const bool other_row = (i < window.row_break) != (k < window.key_row_break);
    if (!other_row && window.column_break == 0) continue;
    for (int l = 0; l < columns; ++l) {
      const bool other = other_row || (j < window.column_break) != (l < window.key_column_break);
      if (other) to[l] += other_side;
    }
  }
  for (; to < row + padded_keys; ++to) *to = padding;
}

// The bias of all queries and keys of a whole window, which is the same for all whole windows of a head. Where runs are
// not whole vectors it is copied once per head, unless the copy would evict everything else from the cache.
template <typename P, typename T = Sum<P>>
class BiasOfWholeWindows {
 public:
  BiasOfWholeWindows(Scratch& scratch, const AttentionArgs& args, const AttentionShape<P>& shape)
      : args_(args), shape_(shape) {
    const int64_t bytes = args.heads * per_head() * static_cast<int64_t>(sizeof(T));
    const bool in_place = reads_bias_in_place<T>(args, args.columns.key_window, shape.most_keys, shape.padded_keys);
    if (in_place || bytes > kMostBytes) return;
    rows_ = scratch.take<T>(args.heads * per_head());
    copied_ = scratch.take<bool>(args.heads);
    for (int64_t head = 0; copied_ != nullptr && head < args.heads; ++head) copied_[head] = false;
  }

  // Returns rows of `padded_keys` numbers, one for each query, or null if there is no copy for this window.
  SAVL_INLINE const T* of(const Window& window) {
    if (rows_ == nullptr || window.is_masked() || window.queries.size() != shape_.most_queries ||
        window.keys.size() != shape_.most_keys) {
      return nullptr;
    }
    T* rows = rows_ + window.head * per_head();
    if (!copied_[window.head]) {
      copied_[window.head] = true;
      Place query(window.queries, 0);
      for (int64_t i = 0; i < shape_.most_queries; ++i, query.next()) {
        copy_bias_row(args_, window, query.row, query.column, shape_.padded_keys, rows + i * shape_.padded_keys);
      }
    }
    return rows;
  }

 private:
  static constexpr int64_t kMostBytes = 1 << 18;
  int64_t per_head() const { return shape_.most_queries * shape_.padded_keys + kWidth<T>; }
  const AttentionArgs& args_;
  const AttentionShape<P>& shape_;
  T* rows_ = nullptr;
  bool* copied_ = nullptr;
};

// The logits of a window, one block of query rows after the other: bias plus products, and the largest of each row.
// They are in units of ln 2, like the bias table and the packed queries, so that the softmax is a power of two.
template <typename P, typename T = Sum<P>>
class Logits {
 public:
  Logits(const AttentionArgs& args, const Window& window, const AttentionShape<P>& shape,
         const AttentionBuffers<P>& buffers, int64_t padded_keys, BiasOfWholeWindows<P>& bias)
      : args_(args),
        window_(window),
        shape_(shape),
        buffers_(buffers),
        padded_keys_(padded_keys),
        bias_rows_(bias.of(window)),
        in_place_(!window.is_masked() &&
                  reads_bias_in_place<T>(args, window.keys.columns.length, window.keys.size(), padded_keys)),
        products_(in_place_ || bias_rows_ != nullptr ? buffers.logits : buffers.products) {
    addend_.offset = buffers.offsets;
    addend_.scale = static_cast<T>(logit_scale<P>(args));
    if (kTiles<P> && !in_place_ && bias_rows_ == nullptr && !window.is_masked() &&
        window.keys.columns.length >= kWidth<T>) {
      addend_.keys = window.keys.size();
      addend_.run = window.keys.columns.length;
      addend_.step = args.bias_row_step();
    }
    int64_t* offset = buffers.offsets;
    for (int64_t key = 0; key < padded_keys; key += kWidth<T>) {
      const int64_t columns = window.keys.columns.length;
      *offset++ = in_place_ ? key % columns + key / columns * args.bias_row_step() : key;
    }
  }

  // Computes rows [first, first + count). The rows after them, up to the next multiple of kRowStep, have no meaning.
  SAVL_INLINE void compute(int64_t first, int64_t count) {
    const int64_t tiled = round_up(count, kRowStep);
    Place query(window_.queries, first);
    for (int64_t r = 0; r < tiled; ++r) {
      addend_.row[r] = bias_of(query, row(r));
      largest_[r] = broadcast(T(-__builtin_inf()));
      if (r + 1 < count) query.next();
    }
    multiply_panels(tiled, buffers_.queries + first * shape_.padded_depth, shape_, buffers_.key_panels, padded_keys_,
                    addend_, products_, buffers_.logits, largest_);
  }

  // Row r of the block.
  SAVL_INLINE T* row(int64_t r) const { return buffers_.logits + r * padded_keys_; }

  // Row r of the block after `softmax<P>`: operands of a product with the values.
  SAVL_INLINE const P* weights(int64_t r) const { return reinterpret_cast<const P*>(row(r)); }

  // Replaces the first `count` rows of the block by 2^(logit - largest), as numbers or as operands W, and sets
  // `inverse` to one over their sums. One NaN makes the whole row NaN. The rows are reduced side by side: the lanes of
  // one vector depend on each other.
  template <typename W>
  SAVL_INLINE void softmax(int64_t count, T* inverse) {
    T largest[kRowBlock];
    Vec<T> sums[kRowBlock];
    for (int64_t r = 0; r < count; ++r) largest[r] = largest_of<T>(largest_[r]);
    for (int64_t r = 0; r < count; ++r) sums[r] = replace_by_weights<W>(r, broadcast(largest[r]));
    for (int64_t r = 0; r < count; ++r) inverse[r] = T(1) / sum_of<T>(sums[r]);
  }

 private:
  template <typename W>
  SAVL_INLINE Vec<T> replace_by_weights(int64_t r, Vec<T> largest) {
    const T* logits = row(r);
    W* to = reinterpret_cast<W*>(row(r));
    Vec<T> sums[kNumbers<W>] = {};
#pragma GCC unroll 4
    for (int64_t j = 0; j < padded_keys_; j += kNumbers<W> * kWidth<T>, to += kWidth<W>) {
      const Vec<T> weight = softmax_power<P>(load(logits + j) - largest);
      sums[0] += weight;
      if constexpr (kNumbers<W> == 1) {
        store(to, weight);
      } else {
        const Vec<T> next = softmax_power<P>(load(logits + j + kWidth<T>) - largest);
        sums[1] += next;
        store(to, to_pairs(weight, next));
      }
    }
    return kNumbers<W> == 1 ? sums[0] : sums[0] + sums[kNumbers<W> - 1];
  }

  // The bias of a query: in place, in the copy for whole windows, or copied to `room`.
  SAVL_INLINE const T* bias_of(const Place& query, T* room) {
    if (in_place_ || addend_.run != 0) return bias_of_query<T>(args_, window_, query.row, query.column);
    if (bias_rows_ != nullptr) return bias_rows_ + (query.row * query.columns + query.column) * padded_keys_;
    copy_bias_row(args_, window_, query.row, query.column, padded_keys_, room);
    return room;
  }

  const AttentionArgs& args_;
  const Window& window_;
  const AttentionShape<P>& shape_;
  const AttentionBuffers<P>& buffers_;
  int64_t padded_keys_;
  const T* bias_rows_;
  bool in_place_;
  T* products_;  // the logits themselves, unless the bias of a key is read after the product is overwritten
  Addend<T> addend_;
  Vec<T> largest_[kRowBlock];
};

// All memory of one call of a kernel. `Buffers` are those of the forward or of the backward pass.
template <typename P, typename Buffers>
struct AttentionMemory {
  const AttentionShape<P> shape;
  Scratch scratch;
  const Buffers buffers;
  BiasOfWholeWindows<P> bias;
  int64_t* const positions;

  explicit AttentionMemory(const AttentionArgs& args)
      : AttentionMemory(args, AttentionMemory(args, 0).scratch.taken()) {}

 private:
  AttentionMemory(const AttentionArgs& args, int64_t bytes)
      : shape(args),
        scratch(bytes),
        buffers(scratch, shape),
        bias(scratch, args, shape),
        positions(scratch.take<int64_t>(position_count(args))) {}
};

SAVL_END_KERNELS
