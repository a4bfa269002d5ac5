// SPDX-License-Identifier: Apache-2.0
// The CPU kernels, free of torch: raw pointers, sizes and strides in, bytes out.
//
// kernels.cpp is compiled once per instruction set; cpu_kernels() picks one table at run time.
// Every function works on a range [begin, end) of independent items, so the caller decides how to
// spread them over threads. The result never depends on the split, nor on the instruction set: sums
// run in a fixed order of 64-byte vectors and multiplications are not contracted into FMAs.
#pragma once

#include <cstdint>

namespace skipvit {

enum class DType : int { kFloat32, kFloat16, kBFloat16, kFloat64 };

// A tensor of up to four dimensions; strides in elements, any value including 0.
struct View {
  void* data;
  DType dtype;
  int64_t element_size;
  int64_t size[4];
  int64_t stride[4];
};

// The first row that is not valid in an index (B, M) or in owners (B, N), if there is one.
struct IndexCheck {
  enum Kind { kOk, kOutOfRange, kRepeated, kMissing } kind;
  int64_t image;
  int64_t row;
};

// Tokens per item of cls_logits: a piece of an image worth a thread, and few enough for B = 1.
constexpr int64_t kTokenBlock = 32;

struct Kernels {
  // logits (B, H, N) = scale * q (B, H, D) . k (B, H, N, D), float32 (float64 for float64).
  // Items: the blocks of kTokenBlock tokens of every image, B * ceil(N / kTokenBlock).
  void (*cls_logits)(const View& q, const View& k, double scale, void* logits, int64_t begin,
                     int64_t end);

  // out (B, N-P) = mean over heads of softmax over all N keys, prefix columns left out.
  // Items: images. `wide` says that logits are float64.
  void (*cls_softmax_mean)(const void* logits, bool wide, int64_t heads, int64_t tokens,
                           int64_t num_prefix, float* out, int64_t begin, int64_t end);

  // mean (B, n) = scores (B, H, n) averaged over H in float32 (float64 for float64). Items: images.
  void (*head_mean)(const View& scores, void* mean, int64_t begin, int64_t end);

  // index (B, P+K): 0..P-1, then P + the positions of the K largest of mean (B, n), ascending.
  // Items: images. `wide` says that mean is float64.
  void (*select_topk)(const void* mean, bool wide, int64_t num_patches, int64_t num_keep,
                      int64_t num_prefix, int64_t* index, int64_t begin, int64_t end);

  // Whether every entry of index (B, M) is in [0, num_rows).
  IndexCheck (*check_range)(const View& index, int64_t num_rows);

  // inverse (B, N): the r with index[b, r] == row, or -1. Items: images; stops at the first invalid
  // entry, one out of range or a repeated one.
  IndexCheck (*invert_index)(const View& index, int64_t num_tokens, int32_t* inverse, int64_t begin,
                             int64_t end);

  // out[b, r] = x[b, index[b, r]]. Items: the B*M rows. out may have more than M rows per image.
  void (*gather_rows)(const View& x, const View& index, const View& out, int64_t begin,
                      int64_t end);

  // The last row of out[b] = sum over patches outside index of mean * row of x, ascending.
  // Items: (image, column block) pairs.
  void (*sum_dropped)(const View& x, const void* mean, bool wide, const int64_t* index,
                      int64_t num_index, int64_t num_patches, const View& out, int64_t blocks,
                      int64_t begin, int64_t end);

  // grad_x[b, row] = grad[b, inverse] for kept rows, mean * grad[b, last] for dropped patches;
  // grad_scores (B, H, n) = x row . grad[b, last] / H for dropped patches and 0 for kept ones.
  // Items: the B*N rows of x.
  void (*fuse_backward)(const View& grad, const View& x, const void* mean, bool wide,
                        const int32_t* inverse, const View& grad_x, const View& grad_scores,
                        int64_t begin, int64_t end);

  // out[b, row] = tokens[b, inverse] where inverse >= 0, else x[b, row] (+ update[b]);
  // without x the other rows are 0. Items: the B*N rows of out.
  void (*scatter_rows)(const View* x, const View& tokens, const View* update,
                       const int32_t* inverse, const View& out, int64_t begin, int64_t end);

  // grad_x = grad with the rows of the index zeroed, grad_tokens = those rows, and grad_update (B,
  // C), where given, the sum of the other rows, ascending. Items: (image, column block) pairs.
  void (*scatter_back_backward)(const View& grad, const int32_t* inverse, const View& grad_x,
                                const View& grad_tokens, const View* grad_update, int64_t blocks,
                                int64_t begin, int64_t end);

  // out (B, n): the largest cosine of a patch with one of higher rank, of features (B, H, P + n, D)
  // averaged over H; minus infinity where there is none. ranks (B, n) float32. Items: the B*n
  // patches, in each image by descending rank.
  void (*match_higher)(const View& features, const View& ranks, int64_t num_prefix, float* out,
                       int64_t begin, int64_t end);

  // owner (B, N): the r of a row that is index[b, r], of another row the r >= num_prefix with the
  // largest cosine of features (B, H, N, D), averaged over H. Items: the B*N rows.
  void (*match_kept)(const View& features, const View& index, const int32_t* inverse,
                     int64_t num_prefix, int64_t* owner, int64_t begin, int64_t end);

  // rows (B, N): the positions of owner 0, of owner 1, ..., each ascending; those of m are from
  // starts[b, m] to starts[b, m + 1] of (B, M + 1). Items: images; stops at the first owner out of
  // range or, with `every`, at the first m that has no row.
  IndexCheck (*group_rows)(const View& owner, int64_t num_rows, bool every, int32_t* starts,
                           int32_t* rows, int64_t begin, int64_t end);

  // out[b, m] = the sum of size * row of x over owner m's rows, in order, over merged_sizes[b, m],
  // the sum of the sizes (without `sizes` 1 each). Items: the B*M rows of out.
  void (*merge_rows)(const View& x, const View* sizes, const int32_t* starts, const int32_t* rows,
                     const View& out, float* merged_sizes, int64_t begin, int64_t end);

  // grad_x[b, n] = size / merged size * grad[b, owner]. Items: the B*N rows of grad_x.
  void (*merge_rows_backward)(const View& grad, const View& owner, const View* sizes,
                              const View& merged_sizes, const View& grad_x, int64_t begin,
                              int64_t end);

  // out[b, n] = x[b, n] + after[b, m] - before[b, m] of its owner m, or after[b, m] where that has
  // one row. Items: the B*M owners.
  void (*restore_rows)(const View& x, const View& before, const View& after, const int32_t* starts,
                       const int32_t* rows, const View& out, int64_t begin, int64_t end);

  // grad_x = grad, grad_after[b, m] = the sum of owner m's rows of grad, in order, grad_before =
  // 0 - grad_after; of an owner with one row grad_x and grad_before are 0. Items: the B*M owners.
  void (*restore_rows_backward)(const View& grad, const int32_t* starts, const int32_t* rows,
                                const View& grad_x, const View& grad_before, const View& grad_after,
                                int64_t begin, int64_t end);
};

struct CpuKernels {
  const Kernels* table;
  const char* isa;       // "baseline", "avx2", "avx512" or "avx512bf16"
  const char* compiled;  // the names compiled in, separated by commas
};

// The best table this machine can run, or the one named by SKIPVIT_CPU_ISA (read once); throws
// std::runtime_error when that one is unknown, not compiled in or not supported here.
const CpuKernels& cpu_kernels();

}  // namespace skipvit
