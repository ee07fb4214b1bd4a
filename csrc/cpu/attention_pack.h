// What both directions of the attention kernels begin with: which pixels a window has, and how their channels are
// packed.
//
// Included once per instruction set, inside its namespace.

constexpr int kRowTile = 4;  // query rows that share loads of keys and values in registers
constexpr int kPanel = 3;    // vectors of columns in registers: kRowTile * kPanel accumulators
// Chosen by benchmarks/cpu_blocks.py, which builds others.
#ifndef SAVL_ROW_BLOCK
#define SAVL_ROW_BLOCK 16
#endif
#ifndef SAVL_KEY_BLOCK
#define SAVL_KEY_BLOCK 64
#endif
constexpr int kRowBlock = SAVL_ROW_BLOCK;  // query rows whose logits are in cache at a time
constexpr int kKeyBlock = SAVL_KEY_BLOCK;  // values in the first-level cache at a time

// Keys are padded to whole vectors, and to whole tiles where those are wider.
template <typename T>
constexpr int kKeyStep = kWidth<T> < kRowTile ? kRowTile : kWidth<T>;

// The pixels of a window along one axis: image coordinates, -1 for those outside the image.
struct Axis {
  const int64_t* position;
  int length;
};

// Queries and keys that attend to each other. Along each axis, query i and key j are i - j + offset rows apart in the
// bias table. Where a break is set, pixels on different sides of it are masked.
struct Window {
  int64_t batch, head;
  Axis query_rows, query_columns, key_rows, key_columns;
  int offset;
  int row_break, column_break;
  int queries() const { return query_rows.length * query_columns.length; }
  int keys() const { return key_rows.length * key_columns.length; }
};

// A pixel among those of a window, counted row by row.
struct Place {
  int row, column, columns;
  Place(const Axis& axis, int64_t index)
      : row(static_cast<int>(index) / axis.length),
        column(static_cast<int>(index) % axis.length),
        columns(axis.length) {}
  SAVL_INLINE void next() {
    if (++column == columns) {
      column = 0;
      ++row;
    }
  }
};

template <typename S>
SAVL_INLINE const S* pixel_of(const Image& image, const Window& window, int64_t row, int64_t column, int64_t head_dim) {
  return static_cast<const S*>(image.data) + window.batch * image.batch_stride + row * image.row_stride +
         column * image.column_stride + window.head * head_dim;
}

// The next row of the image is too far away for the processor to see it coming.
template <typename S>
SAVL_INLINE void prefetch_row_below(const Image& image, const S* pixel, int64_t head_dim) {
  prefetch_after(pixel, image.row_stride);
  prefetch_after(pixel, image.row_stride + head_dim - 1);
}

// Everything that depends on shape alone.
template <typename T>
struct AttentionShape {
  int64_t head_dim, padded_dim;  // channels of a head, and that rounded up to whole vectors
  int64_t most_queries, most_keys, padded_keys;

  explicit AttentionShape(const AttentionArgs& args)
      : head_dim(args.head_dim),
        padded_dim(round_up(args.head_dim, kWidth<T>)),
        most_queries(args.window * args.window),
        most_keys(args.key_window * args.key_window),
        padded_keys(round_up(most_keys, kKeyStep<T>)) {}
};

// Calls `work(c)` for vectors of channels from c on that cover all of them: what the last one has too little it takes
// from the one before, so that its channels are worked on twice. False where there are fewer channels than lanes.
template <typename T, typename Work>
SAVL_INLINE bool for_overlapping_vectors(int64_t channels, const Work& work) {
  if (channels < kWidth<T>) return false;
  int64_t c = 0;
  for (; c + kWidth<T> <= channels; c += kWidth<T>) work(c);
  if (c < channels) work(channels - kWidth<T>);
  return true;
}

// Channels of a pixel times a factor, in double: see `pack_rows`.
template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE void scale_channels(const S* pixel, int64_t channels, double factor, T* scaled) {
  const bool done = for_overlapping_vectors<T>(channels, [&](int64_t c) SAVL_ALWAYS_INLINE {
    store(scaled + c, factor == 1.0 ? load_wide(pixel + c) : times(load_wide(pixel + c), factor));
  });
  for (int64_t c = done ? channels : 0; c < channels; ++c) scaled[c] = static_cast<T>(widen(pixel[c]) * factor);
}

// Channels times a factor, to a pixel.
template <typename S, typename T = Arithmetic<S>>
SAVL_INLINE void write_channels(const T* channels, int64_t count, T factor, S* pixel) {
  const bool done = for_overlapping_vectors<T>(
      count, [&](int64_t c) SAVL_ALWAYS_INLINE { store_narrow(pixel + c, load(channels + c) * factor); });
  for (int64_t c = done ? count : 0; c < count; ++c) pixel[c] = narrow<S>(channels[c] * factor);
}

// Rows of `padded_dim`, zeros behind the channels and for pixels outside the image; each row times its factor.
//
// Factors are double and the product is rounded once: the rounding of a float factor would be common to a whole row,
// and would add up in its logits instead of averaging out.
template <typename S, typename T>
SAVL_NOINLINE void pack_rows(const Image& image, const Window& window, const Axis& rows, const Axis& columns,
                             const AttentionShape<T>& shape, const AttentionArgs& args, bool weigh, double scale,
                             T* packed) {
  const T* severity = weigh ? static_cast<const T*>(args.severity) : nullptr;
  const int64_t last = shape.padded_dim - kWidth<T>;
  for (int i = 0; i < rows.length; ++i) {
    const bool row_inside = rows.position[i] >= 0;
    const int64_t row = row_inside ? rows.position[i] : 0;
    const S* first = pixel_of<S>(image, window, row, 0, shape.head_dim);
    const T* factors = severity == nullptr ? nullptr : severity + (window.batch * args.height + row) * args.width;
    for (int j = 0; j < columns.length; ++j, packed += shape.padded_dim) {
      const int64_t column = columns.position[j];
      const bool inside = row_inside && column >= 0;
      for (int64_t c = inside ? last : 0; c <= last; c += kWidth<T>) store(packed + c, Vec<T>{});
      if (inside) {
        const S* pixel = first + column * image.column_stride;
        prefetch_row_below(image, pixel, shape.head_dim);
        scale_channels(pixel, shape.head_dim, factors == nullptr ? scale : scale * factors[column], packed);
      }
    }
  }
}

// Vectors of the next panel when `left` are left: kPanel of them, but never one alone where two and two would do, since
// one vector of accumulators is too few to hide the latency of a multiplication.
SAVL_INLINE int64_t panel_vectors(int64_t left) { return left == kPanel + 1 ? 2 : smaller(kPanel, left); }

// Rows to panels of columns: a panel holds, channel by channel, its vectors of keys.
template <typename T>
SAVL_NOINLINE void pack_panels(const T* rows, int keys, const AttentionShape<T>& shape, T* panels) {
  const int64_t padded = round_up(keys, kKeyStep<T>);
  int64_t width = 0;
  for (int64_t first = 0; first < padded; first += width) {
    width = panel_vectors((padded - first) / kWidth<T>) * kWidth<T>;
    T* panel = panels + first * shape.head_dim;
    for (int64_t j = 0; j < width; j += kWidth<T>) {
      for (int64_t c = 0; c < shape.head_dim; c += kWidth<T>) {
        Vec<T> block[kWidth<T>];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kWidth<T>; ++i) {
          const int64_t key = first + j + i;
          block[i] = key < keys ? load(rows + key * shape.padded_dim + c) : Vec<T>{};
        }
        transpose<T>(block);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kWidth<T>; ++i) {
          if (c + i < shape.head_dim) store(panel + (c + i) * width + j, block[i]);
        }
      }
    }
  }
}
