// The forward pass of window attention. One task computes one head of one window, in two steps:
//
//   1. Pack the inputs into contiguous buffers. Queries, multiplied by severity / sqrt(head_dim), and values are stored
//      row by row. Keys, multiplied by severity, are stored in panels that are up to three SIMD vectors wide.
//   2. For each block of query rows: multiply the queries by the keys and add the bias, apply the softmax to each row,
//      multiply by the values, and write the rows to the output. The rows of the bias table are stored in reverse
//      order, so that the biases of one row of keys are contiguous.
//
// With 16x16 windows and 24 channels in float32, a task reads 72 KB of the image and writes 24 KB. It keeps 24 KB of
// keys, 24 KB of values and 16 KB of logits in the cache. It computes 2 * 256 * 256 * 24 multiplications and as many
// additions.
#pragma once

#include <cstdint>

#include "cpu/attention_logits.h"
#include "cpu/attention_pack.h"
#include "cpu/attention_products.h"
#include "cpu/attention_window.h"
#include "cpu/simd.h"

SAVL_BEGIN_KERNELS

template <typename P>
struct AttentionForwardBuffers : AttentionBuffers<P> {
  Sum<P>* out;  // the output of a block of query rows

  AttentionForwardBuffers(Scratch& scratch, const AttentionShape<P>& shape)
      : AttentionBuffers<P>(scratch, shape), out(scratch.take<Sum<P>>(kRowBlock * shape.padded_dim)) {}
};

template <typename S, typename P = Operand<S>, typename T = Sum<P>>
SAVL_INLINE void attend(const AttentionArgs& args, const Window& window, const AttentionShape<P>& shape,
                        const AttentionForwardBuffers<P>& buffers, BiasOfWholeWindows<P>& bias) {
  buffers.template load<S>(args, window, shape);
  const int64_t queries = window.queries.size(), keys = window.keys.size();
  share_last_vectors(buffers.value_rows, operands_of<P>(keys), shape);
  const int64_t padded_keys = round_up(keys, kKeyStep<P>);
  Logits<P> logits(args, window, shape, buffers, padded_keys, bias);
  for (int64_t first = 0; first < queries; first += kRowBlock) {
    const int64_t count = smaller(kRowBlock, queries - first);
    logits.compute(first, count);
    T inverse[kRowBlock];
    logits.template softmax<P>(count, inverse);
    multiply_values(round_up(count, kRowStep), keys, logits.weights(0), padded_keys, buffers.value_rows, shape,
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

// Returns element `index` of the sequence 0, count - 1, 1, count - 2, ... Windows are processed in this order because
// each thread gets a contiguous range of tasks, and the last windows of a shifted image, which are processed in parts,
// take less time than the others.
SAVL_INLINE int64_t alternate_between_ends(int64_t index, int64_t count) {
  return index % 2 == 0 ? index / 2 : count - 1 - index / 2;
}

template <typename S>
void attention_kernel(const AttentionArgs& args, int64_t begin, int64_t end) {
  using P = Operand<S>;
  AttentionMemory<P, AttentionForwardBuffers<P>> memory(args);
  [[maybe_unused]] const TileRegisters<P> tiles;
  const int64_t windows = args.windows();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task % args.heads;
    const int64_t index = alternate_between_ends(task / args.heads, args.batch * windows);
    for_parts_of_window<S>(args, index / windows, index % windows, head, memory.positions, [&](const Window& window) {
      attend<S>(args, window, memory.shape, memory.buffers, memory.bias);
    });
  }
}

SAVL_END_KERNELS
