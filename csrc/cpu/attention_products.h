// The products of both directions of the attention kernels, by tiles that stay in registers: rows times panels of keys,
// and weights times values.
//
// Included once per instruction set, inside its namespace.

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

template <typename T>
SAVL_INLINE void zero_rows(T* rows, int64_t first, int64_t last, int64_t stride) {
  for (T* element = rows + first * stride; element < rows + last * stride; ++element) *element = 0;
}
