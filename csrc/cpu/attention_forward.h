// Window attention, forward. One task is one head of one window:
//
//   pack     the scaled queries and the values row by row, the scaled keys in panels of up to three vectors of columns
//   rows     for each block of query rows: queries times keys, plus the bias, which is read as runs of the reversed
//            table; softmax over the whole row; times the values, written to the output
//
// For 16x16 windows of 24 channels a task reads 72 KB of the image and writes 24 KB, keeps 24 KB of keys, 24 KB of
// values and 16 KB of logits in the cache, and does 2 * 256 * 256 * 24 multiplications and additions each.
#pragma once

#include <cstdint>

#include "cpu/attention_logits.h"
#include "cpu/attention_pack.h"
#include "cpu/attention_products.h"
#include "cpu/attention_window.h"
#include "cpu/simd.h"

SAVL_BEGIN_KERNELS

template <typename T>
struct AttentionForwardBuffers : AttentionBuffers<T> {
  T* out;  // a block of rows

  AttentionForwardBuffers(Scratch& scratch, const AttentionShape<T>& shape)
      : AttentionBuffers<T>(scratch, shape), out(scratch.take<T>(kRowBlock * shape.padded_dim)) {}
};

template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE void attend(const AttentionArgs& args, const Window& window, const AttentionShape<T>& shape,
                        const AttentionForwardBuffers<T>& buffers, BiasOfWholeWindows<T>& bias) {
  buffers.template load<S>(args, window, shape);
  const int64_t queries = window.queries.size(), keys = window.keys.size();
  const int64_t padded_keys = round_up(keys, kKeyStep<T>);
  Logits<T> logits(args, window, shape, buffers, padded_keys, bias);
  for (int64_t first = 0; first < queries; first += kRowBlock) {
    const int64_t count = smaller(kRowBlock, queries - first);
    logits.compute(first, count);
    T inverse[kRowBlock];
    for (int64_t r = 0; r < count; ++r) inverse[r] = logits.softmax(r);
    zero_rows(buffers.out, 0, kRowBlock, shape.padded_dim);
    add_all_weighted(round_up(count, kRowTile), keys, buffers.logits, padded_keys, buffers.value_rows, shape,
                     buffers.out);
    Place query(window.queries, first);
    for (int64_t r = 0; r < count; ++r, query.next()) {
      const int64_t row = window.queries.rows.position[query.row];
      const int64_t column = window.queries.columns.position[query.column];
      S* to = const_cast<S*>(pixel_of<S>(args.out, window, row, column, shape.head_dim));
      write_channels(buffers.out + r * shape.padded_dim, shape.head_dim, inverse[r], to);
    }
  }
}

// 0, n - 1, 1, n - 2, ...: threads share the tasks by halves, and the last windows of a shifted image, which are cut
// into parts, take less time than the others.
SAVL_INLINE int64_t from_both_ends(int64_t index, int64_t count) {
  return index % 2 == 0 ? index / 2 : count - 1 - index / 2;
}

template <typename S>
void attention_kernel(const AttentionArgs& args, int64_t begin, int64_t end) {
  using T = Arithmetic<S>;
  AttentionMemory<T, AttentionForwardBuffers<T>> memory(args);
  const int64_t windows = args.window_rows() * args.window_columns();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task % args.heads;
    const int64_t index = from_both_ends(task / args.heads, args.batch * windows);
    for_parts_of_window<S>(args, index / windows, index % windows, head, memory.positions, [&](const Window& window) {
      attend<S>(args, window, memory.shape, memory.buffers, memory.bias);
    });
  }
}

SAVL_END_KERNELS
