// Window attention, backward. The logits are computed again, one block of rows after the other. With P the softmax, G
// the gradient of the output, and q and k multiplied by their factors as in the forward pass:
//
//   dP = G v^T      dS = P * (dP - sum_j P dP)      dbias[i - j] = sum dS
//   dq = dS k       dk = dS^T q                     dv = P^T G
//
// From dq and dk, the product rule gives the gradients of the unscaled q and k and of their factors.
//
// One task is one head of a chunk of windows, worked on in order. Each chunk has its own gradient of the bias, to which
// no other task writes. Overlapping windows add to the same keys: they are divided into colours, and one call works on
// one colour, whose windows share no key.
#pragma once

#include <cstdint>

#include "cpu/attention_logits.h"
#include "cpu/attention_pack.h"
#include "cpu/attention_products.h"
#include "cpu/attention_tiles.h"
#include "cpu/attention_window.h"
#include "cpu/simd.h"

SAVL_BEGIN_KERNELS

template <typename P, typename T = Sum<P>>
struct AttentionBackwardBuffers : AttentionBuffers<P> {
  P *value_panels, *grad_out;     // packed inputs
  T *grad_logits, *grad_queries;  // of a block of query rows
  T *grad_keys, *grad_values;     // sums over the query rows, with room for a whole tile
  int64_t* zero_offsets;          // of `Addend`
  // For pairs only, of all queries: pairs of two rows of the queries, of the gradient of the output, of P and of dS;
  // and room for a row of tiles.
  P *query_pairs, *grad_out_pairs, *weight_pairs, *grad_logit_pairs, *tile_row;

  AttentionBackwardBuffers(Scratch& scratch, const AttentionShape<P>& shape)
      : AttentionBuffers<P>(scratch, shape),
        value_panels(scratch.take<P>(shape.padded_keys * shape.depth)),
        grad_out(scratch.take<P>(shape.padded_queries * shape.padded_depth)),
        grad_logits(scratch.take<T>(kRowBlock * shape.padded_keys)),
        grad_queries(scratch.take<T>(kRowBlock * shape.padded_dim)),
        grad_keys(scratch.take<T>((shape.padded_keys + kRowTile) * shape.padded_dim)),
        grad_values(scratch.take<T>((shape.padded_keys + kRowTile) * shape.padded_dim)),
        zero_offsets(scratch.take<int64_t>(shape.padded_keys)) {
    const int64_t pairs = kNumbers<P> == 1 ? 0 : operands_of<P>(round_up(shape.most_queries, kKeyStep<P>));
    query_pairs = scratch.take<P>(pairs * shape.padded_dim);
    grad_out_pairs = scratch.take<P>(pairs * shape.padded_dim);
    weight_pairs = scratch.take<P>(pairs * shape.padded_keys);
    grad_logit_pairs = scratch.take<P>(pairs * shape.padded_keys);
    tile_row = scratch.take<P>(kTiles<P> ? pairs * kRowStep : 0);
  }

  template <typename S>
  SAVL_INLINE void load(const AttentionArgs& args, const Window& window, const AttentionShape<P>& shape) const {
    const int64_t queries = window.queries.size(), keys = window.keys.size();
    if constexpr (kNumbers<P> == 1) {
      AttentionBuffers<P>::template load<S>(args, window, shape);
      pack_panels(this->value_rows, keys, shape, value_panels);
    } else {
      pack_rows<S>(window, window.keys, args.v, {}, shape, 1.0, this->key_rows);
      pack_panels(this->key_rows, keys, shape, value_panels);
      this->template load_keys<S>(args, window, shape);
      this->template load_queries<S>(window, args.q, args.q_factors, shape, packed_query_scale<P>(args), this->queries);
    }
    this->template load_queries<S>(window, args.grad_out, {}, shape, 1.0, grad_out);
    if constexpr (kNumbers<P> == 2) {
      pair_rows(this->key_rows, keys, shape, this->value_rows);  // keys in the place of values
      pair_rows(this->queries, queries, shape, query_pairs);
      pair_rows(grad_out, queries, shape, grad_out_pairs);
      const int64_t first = operands_of<P>(queries), last = operands_of<P>(round_up(queries, kKeyStep<P>));
      zero_rows(weight_pairs, first, last, round_up(keys, kKeyStep<P>));
      zero_rows(grad_logit_pairs, first, last, round_up(keys, kKeyStep<P>));
    }
    const int64_t tiled = round_up(keys, kRowTile);
    zero_rows(grad_keys, 0, tiled, shape.padded_dim);
    zero_rows(grad_values, 0, tiled, shape.padded_dim);
  }

  // Rows of operands for a product with the gradient of the logits.
  P* keys() const { return kNumbers<P> == 1 ? this->key_rows : this->value_rows; }
};

// Replaces the weights of a row by P, and dP by dS. `inverse` is one over the sum of the unnormalised weights.
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

// Packs row r of a block and the next one, if it is below `count`, into pairs.
template <typename P, typename T>
SAVL_INLINE void pair_block_rows(const T* rows, int64_t r, int64_t count, int64_t padded_keys, P* pairs) {
  const T *first = rows + r * padded_keys, *second = r + 1 < count ? first + padded_keys : nullptr;
  for (int64_t j = 0; j < padded_keys; j += kWidth<T>) {
    store(pairs + j, interleaved_pairs(load(first + j), second == nullptr ? Vec<T>{} : load(second + j)));
  }
}

// Replaces a row of numbers by operands of a product with rows of operands of the keys.
template <typename P, typename T>
SAVL_INLINE void narrow_row(T* row, int64_t padded_keys) {
  if constexpr (kNumbers<P> == 2) {
    P* to = reinterpret_cast<P*>(row);
    for (int64_t j = 0; j < padded_keys; j += 2 * kWidth<T>, to += kWidth<P>) {
      store(to, to_pairs(load(row + j), load(row + j + kWidth<T>)));
    }
  }
}

// Adds the gradient of the logits of query (i, j) to the gradient of the bias, in the runs from which the bias was
// read. The sums are double: an entry of the bias is a sum over all windows.
template <typename T>
SAVL_INLINE void add_bias_gradient(const AttentionArgs& args, const Window& window, int i, int j, const T* row,
                                   double* bias) {
  const int columns = window.keys.columns.length;
  double* run = bias + bias_run(args, window, i, j, args.keys());
  for (int k = 0; k < window.keys.rows.length; ++k, row += columns, run += args.bias_row_step()) {
    for (int l = 0; l < columns; ++l) run[l] += row[l];
  }
}

// The lanes of the last vector of `for_overlapping_vectors` that the vector before does not have.
template <typename T>
SAVL_INLINE auto new_lanes(int64_t channels) {
  T lane[kWidth<T>];
  for (int i = 0; i < kWidth<T>; ++i) lane[i] = static_cast<T>(i);
  return load(lane) >= static_cast<T>(kWidth<T> - channels % kWidth<T>);
}

// The dot product of two rows of channels, in double.
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

// Writes the gradient of a scaled row to `target`, or adds it if `add` is true, and adds the gradient of its factor, if
// there are factors. `unscaled` is the image whose pixels were multiplied by them.
template <typename S, typename T>
SAVL_INLINE void spread_gradient(const AttentionArgs& args, const Window& window, const Image& unscaled,
                                 const RowFactors& factors, const Image& target, int64_t row, int64_t column,
                                 const T* gradient, T scale, bool add) {
  T* to = const_cast<T*>(pixel_of<T>(target, window, row, column, args.head_dim));
  T factor = scale;
  if (factors.values != nullptr) {
    const int64_t pixel = factors.pixel(window.batch, row, column);
    const S* from = pixel_of<S>(unscaled, window, row, column, args.head_dim);
    factors.gradient[window.head * factors.gradient_head_stride + pixel] +=
        dot_of(from, gradient, args.head_dim) * scale;
    factor *= static_cast<const T*>(factors.values)[window.head * factors.head_stride + pixel];
  }
  if (!add) return write_channels(gradient, args.head_dim, factor, to);
  const bool done = for_overlapping_vectors<T>(args.head_dim, [&](int64_t c) SAVL_ALWAYS_INLINE {
    const Vec<T> before = load(to + c), sum = before + load(gradient + c) * factor;
    store(to + c, c % kWidth<T> == 0 ? sum : new_lanes<T>(args.head_dim) ? sum : before);
  });
  for (int64_t c = done ? args.head_dim : 0; c < args.head_dim; ++c) to[c] += gradient[c] * factor;
}

template <typename S, typename P = Operand<S>, typename T = Sum<P>>
SAVL_INLINE void attend_backward(const AttentionArgs& args, const Window& window, const AttentionShape<P>& shape,
                                 const AttentionBackwardBuffers<P>& buffers, BiasOfWholeWindows<P>& bias,
                                 double* grad_bias) {
  buffers.template load<S>(args, window, shape);
  const int64_t queries = window.queries.size(), keys = window.keys.size();
  const int64_t padded_keys = round_up(keys, kKeyStep<P>), stride = shape.padded_dim;
  share_last_vectors(buffers.keys(), operands_of<P>(keys), shape);
  Logits<P> logits(args, window, shape, buffers, padded_keys, bias);
  Addend<T> zero;  // reads every vector of every row from the same place
  const T zeros[kWidth<T>] = {};
  for (const T*& row : zero.row) row = zeros;
  for (int64_t vector = 0; vector < padded_keys / kWidth<T>; ++vector) buffers.zero_offsets[vector] = 0;
  zero.offset = buffers.zero_offsets;
  Vec<T> unused[kRowBlock] = {};
  for (int64_t first = 0; first < queries; first += kRowBlock) {
    const int64_t count = smaller(kRowBlock, queries - first), tiled = round_up(count, kRowStep);
    const P* grad_rows = buffers.grad_out + first * shape.padded_depth;
    logits.compute(first, count);
    multiply_panels(tiled, grad_rows, shape, buffers.value_panels, padded_keys, zero, buffers.products,
                    buffers.grad_logits, kTiles<P> ? nullptr : unused);
    T inverse[kRowBlock];
    logits.template softmax<T>(count, inverse);
    const Place first_query(window.queries, first);
    Place query = first_query;
    for (int64_t r = 0; r < count; ++r, query.next()) {
      T* grad = buffers.grad_logits + r * padded_keys;
      softmax_row_backward(padded_keys, inverse[r], logits.row(r), grad);
      if (grad_bias != nullptr) add_bias_gradient(args, window, query.row, query.column, grad, grad_bias);
    }
    if constexpr (kNumbers<P> == 1) {
      const P* query_rows = buffers.queries + first * stride;
      add_all_transposed(count, keys, buffers.grad_logits, padded_keys, query_rows, shape, buffers.grad_keys);
      add_all_transposed(count, keys, buffers.logits, padded_keys, grad_rows, shape, buffers.grad_values);
    } else {
      for (int64_t r = 0; r < count; r += 2) {
        const int64_t pair = (first + r) / 2 * padded_keys;
        pair_block_rows(buffers.logits, r, count, padded_keys, buffers.weight_pairs + pair);
        pair_block_rows(buffers.grad_logits, r, count, padded_keys, buffers.grad_logit_pairs + pair);
      }
    }
    for (int64_t r = 0; r < count; ++r) narrow_row<P>(buffers.grad_logits + r * padded_keys, padded_keys);
    multiply_values(tiled, keys, reinterpret_cast<const P*>(buffers.grad_logits), padded_keys, buffers.keys(), shape,
                    buffers.grad_queries);
    query = first_query;
    for (int64_t r = 0; r < count; ++r, query.next()) {
      spread_gradient<S>(args, window, args.q, args.q_factors, args.grad_q, window.queries.rows.position[query.row],
                         window.queries.columns.position[query.column], buffers.grad_queries + r * stride,
                         static_cast<T>(query_scale(args) * kLn2), false);
    }
  }
  if constexpr (kNumbers<P> == 2) {
    const int64_t pairs = operands_of<P>(queries);
    add_all_transposed(pairs, keys, buffers.grad_logit_pairs, padded_keys, buffers.query_pairs, shape,
                       buffers.grad_keys, buffers.tile_row);
    add_all_transposed(pairs, keys, buffers.weight_pairs, padded_keys, buffers.grad_out_pairs, shape,
                       buffers.grad_values, buffers.tile_row);
  }
  Place place(window.keys, 0);
  for (int64_t key = 0; key < keys; ++key, place.next()) {
    const int64_t row = window.keys.rows.position[place.row], column = window.keys.columns.position[place.column];
    if (row < 0 || column < 0) continue;
    // The logits are in units of ln 2.
    spread_gradient<S>(args, window, args.k, args.k_factors, args.grad_k, row, column, buffers.grad_keys + key * stride,
                       static_cast<T>(logit_scale<P>(args) * kLn2), args.overlapping);
    spread_gradient<S>(args, window, args.v, {}, args.grad_v, row, column, buffers.grad_values + key * stride, T(1),
                       args.overlapping);
  }
}

template <typename S>
void attention_backward_kernel(const AttentionArgs& args, int64_t begin, int64_t end) {
  using P = Operand<S>;
  AttentionMemory<P, AttentionBackwardBuffers<P>> memory(args);
  [[maybe_unused]] const TileRegisters<P> tiles;
  const int64_t first_row = args.colour / args.colour_columns, first_column = args.colour % args.colour_columns;
  const int64_t rows = (args.rows.windows() - first_row + args.colour_rows - 1) / args.colour_rows;
  const int64_t columns = (args.columns.windows() - first_column + args.colour_columns - 1) / args.colour_columns;
  const int64_t windows = args.batch * rows * columns;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task % args.heads, chunk = task / args.heads;
    double* grad_bias = args.grad_bias;
    if (grad_bias != nullptr) grad_bias += (chunk * args.heads + head) * args.bias_size();
    const int64_t last = windows * (chunk + 1) / args.chunks;
    for (int64_t window = windows * chunk / args.chunks; window < last; ++window) {
      const int64_t batch = window / (rows * columns), place = window % (rows * columns);
      const int64_t row = first_row + place / columns * args.colour_rows;
      const int64_t column = first_column + place % columns * args.colour_columns;
      for_parts_of_window<S>(args, batch, row * args.columns.windows() + column, head, memory.positions,
                             [&](const Window& part) {
                               attend_backward<S>(args, part, memory.shape, memory.buffers, memory.bias, grad_bias);
                             });
    }
  }
}

SAVL_END_KERNELS
