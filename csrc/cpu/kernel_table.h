// What stands between the ops, which know torch, and the kernels, which know vectors: plain arguments, and a table of
// functions for each instruction set that this library was compiled for.
//
// A kernel works on a range of tasks, [begin, end). Tasks are cut by shape alone and every task adds up in a fixed
// order, so that results have the same bits however many threads share the tasks.
#pragma once

#include <cstdint>
#include <vector>

#include "field.h"

namespace savl::cpu {

enum class Storage : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2 };
constexpr int kStorages = 3;
constexpr int kWidestVector = 64;  // bytes, of all instruction sets

// (B, H, W, channels) with channels contiguous; strides in elements. The dtype is the kernel's.
struct Image {
  const void* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0, column_stride = 0;
};

// Both attentions. T below is double for float64 and float otherwise: the type of all arithmetic.
struct AttentionArgs {
  Image q, k, v;         // the first channel of the first head each
  Image out;             // forward: written, dtype as q
  const void* severity;  // T (B, H, W) contiguous, or null
  const void* bias;      // T (heads, span, span) in units of ln 2, each row back to front, and room for a vector more
  bool bias_is_finite;   // of the whole table
  int64_t batch, height, width, heads, head_dim;
  int64_t window, key_window, shift;

  // Backward only. Gradients have dtype T; q's is written, k's and v's are written for plain windows and added to
  // where windows overlap.
  Image grad_out;  // dtype as q
  Image grad_q, grad_k, grad_v;
  double* grad_severity;                // (heads, B, H, W), zeros; null where severity is
  double* grad_bias;                    // (chunks, heads, span, span), zeros, reversed like bias
  int64_t chunks;                       // windows are dealt out to this many chunks
  int64_t colour_rows, colour_columns;  // windows this far apart share no key
  int64_t colour;                       // which of the colour_rows * colour_columns to do

  int64_t span() const { return window + key_window - 1; }
  int64_t window_rows() const { return height / window; }
  int64_t window_columns() const { return width / window; }
  int64_t forward_tasks() const { return batch * window_rows() * window_columns() * heads; }
  int64_t backward_tasks() const { return chunks * heads; }
};

// `planar`: pixel_stride is 1 in every field; otherwise channel_stride is.
struct PosteriorArgs {
  Field mu, logvar;
  Field eps;  // data null for none, or for seeded noise
  bool seeded;
  uint64_t seed, offset;
  Field sample;    // written; data null where there is no noise
  void* kl;        // T (B, pixels), written
  void* variance;  // T (B, pixels), written
  int64_t batch, channels, pixels;
  bool planar;

  // Backward only; a null gradient is zero.
  Field grad_sample;                     // dtype as mu, same layout
  const void* grad_kl;                   // T (B, pixels)
  const void* grad_variance;             // T (B, pixels), with what severity and statistics pass on
  Field grad_mu, grad_logvar, grad_eps;  // written, dtype as mu; eps's data null where not wanted

  static constexpr int64_t kBlock = 1024;  // pixels of one task: a page of a channel
  int64_t block() const { return pixels < kBlock ? pixels : kBlock; }
  int64_t blocks() const { return (pixels + kBlock - 1) / kBlock; }
  int64_t tasks() const { return batch * blocks(); }
};

// Rows of `channels` contiguous elements, `*_stride` elements apart.
struct ModulationArgs {
  const void *attended, *gamma, *beta, *residual;  // beta may be null
  int64_t attended_stride, gamma_stride, beta_stride, residual_stride;
  void* out;  // contiguous, dtype as residual
  int64_t rows, channels;
  bool residual_is_float;  // residual, out and grad_out are float32 whatever attended is

  // Backward only
  const void* grad_out;
  int64_t grad_out_stride;
  void *grad_attended, *grad_gamma;  // written, contiguous, dtype as attended
};

// Rows of `channels` contiguous elements, `*_stride` elements apart. T as above.
struct NormArgs {
  const void* x;  // S
  int64_t x_stride;
  const void *weight, *bias;  // T (channels)
  double eps;
  void* out;             // contiguous, dtype as x
  void *mean, *inverse;  // T (rows), written; read by the backward pass
  int64_t rows, channels;
  bool wide;  // out and grad_out are float32 whatever x is

  // Backward only
  const void* grad_out;
  int64_t grad_out_stride;
  void* grad_x;  // written, contiguous, dtype as x
  int64_t chunk_rows;
  double* sums;  // (chunks, 2, channels), zeros: gradients of weight and bias
};

template <typename Args>
using Kernel = void (*)(const Args&, int64_t begin, int64_t end);

struct KernelTable {
  const char* instruction_set;
  Kernel<AttentionArgs> attention[kStorages], attention_backward[kStorages];
  Kernel<PosteriorArgs> posterior[kStorages], posterior_backward[kStorages];
  Kernel<ModulationArgs> modulation[kStorages], modulation_backward[kStorages];
  Kernel<NormArgs> norm[kStorages], norm_backward[kStorages];
};

extern const KernelTable kPortableKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#endif

// Those that this processor can run, the best first. "portable" is always among them.
const std::vector<const KernelTable*>& kernel_tables();

// The one in use: the best, unless SAVL_CPU_INSTRUCTION_SET or `use_kernels` say otherwise.
const KernelTable& kernels();

// Chooses by name; false, and nothing changes, where this processor cannot run it.
bool use_kernels(const char* instruction_set);

}  // namespace savl::cpu
