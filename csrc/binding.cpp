// SPDX-License-Identifier: Apache-2.0
// The operators under torch's CPU dispatch key, over torch's stable ABI: one build serves every
// torch from 2.11 on. Shapes, strides and threads are settled here; the arithmetic is behind
// kernels.h.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace skipvit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels& kernels() { return *cpu_kernels().table; }

// Raises ValueError. (std::invalid_argument arrives as RuntimeError from torch 2.15 on; this
// arrives as it is in 2.11, 2.13 and 2.15.) Only outside of parallel_for, where torch replaces the
// message. Cold: with the messages inlined into them the operators took 0.05 us longer.
template <class... Parts>
[[noreturn]] __attribute__((cold, noinline)) void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw pybind11::value_error(message.str());
}

std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < t.dim(); ++d) {
    text << (d == 0 ? "" : ", ") << t.size(d);
  }
  text << ')';
  return text.str();
}

DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      fail(name, " must be float32, float16, bfloat16 or float64");
  }
}

// count * size, a size of 0 as 1. Refuses what only expanded and empty tensors can have: below it
// no product of sizes and bytes overflows.
int64_t times(const char* name, int64_t count, int64_t size) {
  constexpr int64_t kMost = int64_t{1} << 55;
  if (__builtin_mul_overflow(count, std::max<int64_t>(1, size), &count) || count > kMost) {
    fail(name, " must have at most 2**55 elements");
  }
  return count;
}

// An empty tensor's is null, which must not be offset nor given to memset.
void* data_of(const char* name, const Tensor& t) {
  alignas(64) static char nothing[64];
  void* data = t.data_ptr();
  if (data == nullptr && t.numel() > 0) {
    fail(name, " has no memory: its storage was freed");
  }
  return data == nullptr ? nothing : data;
}

// A negative size in `sizes` stands for any.
View view_of(const char* name, const Tensor& t, DType dtype, std::initializer_list<int64_t> sizes) {
  View view{};
  if (t.dim() != static_cast<int64_t>(sizes.size())) {
    fail(name, " must have ", sizes.size(), " dimensions, got ", shape_of(t));
  }
  const auto have = t.sizes(), strides = t.strides();
  int64_t count = 1;
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    const int64_t want = sizes.begin()[d];
    if (want >= 0 && have[d] != want) {
      fail(name, " must have size ", want, " in dimension ", d, ", got ", shape_of(t));
    }
    view.size[d] = have[d];
    view.stride[d] = have[d] > 1 ? strides[d] : count;  // torch lets a size of 1 have any
    count = times(name, count, have[d]);
  }
  view.data = data_of(name, t);
  view.dtype = dtype;
  view.element_size = static_cast<int64_t>(t.element_size());
  if ((reinterpret_cast<intptr_t>(view.data) & (view.element_size - 1)) != 0) {
    fail(name, " must be aligned to its elements of ", view.element_size, " bytes");
  }
  return view;
}

View float_view(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  return view_of(name, t, dtype_of(name, t), sizes);
}

View same_dtype_view(const char* name, const Tensor& t, const View& other,
                     std::initializer_list<int64_t> sizes) {
  const View view = float_view(name, t, sizes);
  if (view.dtype != other.dtype) {
    fail(name, " must have the dtype of the other tensors");
  }
  return view;
}

View index_view(const Tensor& index, int64_t batch, const char* name = "index", int64_t size = -1) {
  if (index.scalar_type() != ScalarType::Long) {
    fail(name, " must be int64");
  }
  return view_of(name, index, DType::kFloat64, {batch, size});
}

// Scores (B, n) are scores (B, 1, n): a mean over one head has the same bits.
View scores_view(const Tensor& scores, int64_t batch) {
  if (scores.dim() == 3) {
    const View view = float_view("scores", scores, {batch, -1, -1});
    if (view.size[1] == 0) {
      fail("scores must have at least one head, got ", shape_of(scores));
    }
    return view;
  }
  View view = float_view("scores", scores, {batch, -1});
  view.size[2] = view.size[1];
  view.stride[2] = view.stride[1];
  view.size[1] = 1;
  return view;
}

void check_count(const char* name, int64_t count, int64_t limit) {
  if (count < 0 || count > limit) {
    fail(name, " must be in [0, ", limit, "], got ", count);
  }
}

// A contiguous CPU tensor. Straight through the C shim: torch::stable::new_empty goes through the
// dispatcher by name, 1 us a tensor where the whole operator can take 4.
Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) {
  int64_t strides[4];
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride = times("the result", stride, sizes.begin()[d]);
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                         sizes.begin(), strides, dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty_like(const Tensor& dtype_of, std::initializer_list<int64_t> sizes) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(dtype_of.get(), &dtype));
  return empty(sizes, dtype);
}

// A contiguous output just allocated in the dtype of a view that is already at hand.
View output_view(const Tensor& t, const View& like) {
  View view{};
  int64_t stride = 1;
  const auto sizes = t.sizes();
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
    view.size[d] = sizes[d];
    view.stride[d] = stride;
    stride *= std::max<int64_t>(1, sizes[d]);
  }
  view.data = data_of("the result", t);
  view.dtype = like.dtype;
  view.element_size = like.element_size;
  return view;
}

// Work that moves less than this stays on one thread: waking another costs some microseconds.
constexpr int64_t kGrainBytes = 256 * 1024;

template <class F>
void for_items(int64_t items, int64_t bytes_per_item, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes_per_item));
  torch::stable::parallel_for(0, items, grain, f);
}

// Whether whole images keep every thread busy.
bool enough_images(int64_t batch) {
  const int64_t threads = torch::stable::get_num_threads();
  return batch % threads == 0 || batch >= 4 * threads;
}

// Pieces per image for the kernels that sum over rows: one where there are images enough for the
// threads, else so many that no thread is left without. 64 channels are the least worth splitting.
int64_t column_blocks(int64_t batch, int64_t channels) {
  const int64_t wanted = enough_images(batch) ? 1 : torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min(wanted, channels / 64));
}

// Buffers of the calling thread that only grow, never null; the worker threads read and write
// through it.
template <class T>
T* caller_scratch(int64_t count) {
  thread_local std::unique_ptr<T[]> data;
  thread_local int64_t capacity = -1;
  if (count > capacity) {
    data.reset(new T[count]);
    capacity = count;
  }
  return data.get();
}

struct Byte16 {
  alignas(16) char bytes[16];
};

void raise_if_invalid(const IndexCheck& check, int64_t num_rows, const char* name = "index") {
  if (check.kind == IndexCheck::kOutOfRange) {
    fail(name, " must hold rows in [0, ", num_rows, "), got ", check.row);
  }
  if (check.kind == IndexCheck::kRepeated) {
    fail("index must hold each row of an image once, got ", check.row, " twice in image ",
         check.image);
  }
  if (check.kind == IndexCheck::kMissing) {
    fail(name, " must hold every row in [0, ", num_rows, "), got no ", check.row, " in image ",
         check.image);
  }
}

void check_image_rows(int64_t count) {
  if (count >= INT32_MAX) {
    fail("an image must have less than 2**31 - 1 rows, got ", count);
  }
}

// The check of the first image that is not valid; f(begin, end) checks a range of them.
template <class F>
IndexCheck check_images(const View& index, const F& f) {
  IndexCheck first{IndexCheck::kOk, index.size[0], 0};
  std::mutex mutex;
  // An entry costs about as much as moving 64 bytes.
  for_items(index.size[0], index.size[1] * 64, [&](int64_t begin, int64_t end) {
    const IndexCheck check = f(begin, end);
    if (check.kind != IndexCheck::kOk) {
      const std::lock_guard<std::mutex> lock(mutex);
      first = check.image < first.image ? check : first;
    }
  });
  return first;
}

// Checks the index and returns its inverse (B, N).
const int32_t* checked_inverse(const View& index, int64_t num_tokens) {
  check_image_rows(num_tokens);
  int32_t* inverse = caller_scratch<int32_t>(index.size[0] * num_tokens);
  const IndexCheck check = check_images(index, [&](int64_t begin, int64_t end) {
    return kernels().invert_index(index, num_tokens, inverse, begin, end);
  });
  raise_if_invalid(check, num_tokens);
  return inverse;
}

// The rows of each owner: see group_rows.
struct Groups {
  int32_t *starts, *rows;
};

Groups checked_groups(const View& owner, int64_t num_rows, bool every) {
  check_image_rows(owner.size[1]);
  check_image_rows(num_rows);
  const int64_t batch = owner.size[0], num_starts = batch * (num_rows + 1);
  int32_t* starts = caller_scratch<int32_t>(num_starts + batch * owner.size[1]);
  const Groups groups{starts, starts + num_starts};
  const IndexCheck check = check_images(owner, [&](int64_t begin, int64_t end) {
    return kernels().group_rows(owner, num_rows, every, groups.starts, groups.rows, begin, end);
  });
  raise_if_invalid(check, num_rows, "owner");
  return groups;
}

View float32_view(const char* name, const Tensor& t, int64_t batch, int64_t count) {
  if (t.scalar_type() != ScalarType::Float) {
    fail(name, " must be float32");
  }
  return view_of(name, t, DType::kFloat32, {batch, count});
}

// ------------------------------------------------------------------------------- operators

Tensor cls_scores(const Tensor& q, const Tensor& k, std::optional<double> given_scale,
                  int64_t num_prefix_tokens) {
  const View keys = float_view("k", k, {-1, -1, -1, -1});
  const int64_t batch = keys.size[0], heads = keys.size[1], tokens = keys.size[2];
  const View query = same_dtype_view("q", q, keys, {batch, heads, keys.size[3]});
  if (heads == 0 || keys.size[3] == 0) {
    fail("q must have at least one head of width 1, got ", shape_of(q));
  }
  check_count("num_prefix_tokens", num_prefix_tokens, tokens);
  Tensor out = empty({batch, tokens - num_prefix_tokens}, aoti_torch_dtype_float32());
  const double scale = given_scale.value_or(std::pow(keys.size[3], -0.5));
  if (num_prefix_tokens == tokens) {  // a softmax needs a token
    return out;
  }
  const bool wide = keys.dtype == DType::kFloat64;
  const int64_t logit_bytes = wide ? 8 : 4;
  const int64_t num_logits = batch * heads * tokens;
  void* logits = caller_scratch<Byte16>((num_logits * logit_bytes + 15) / 16);
  float* result = static_cast<float*>(out.data_ptr());
  const int64_t blocks = (tokens + kTokenBlock - 1) / kTokenBlock;
  const int64_t block_bytes = kTokenBlock * heads * keys.size[3] * keys.element_size;
  for_items(batch * blocks, block_bytes, [&](int64_t begin, int64_t end) {
    kernels().cls_logits(query, keys, scale, logits, begin, end);
  });
  // An exponential costs about as much as moving 32 bytes.
  for_items(batch, heads * tokens * 32, [&](int64_t begin, int64_t end) {
    kernels().cls_softmax_mean(logits, wide, heads, tokens, num_prefix_tokens, result, begin, end);
  });
  return out;
}

void move_rows(const View& x, const View& index, const View& out) {
  const int64_t row_bytes = x.size[2] * x.element_size;
  for_items(index.size[0] * index.size[1], row_bytes,
            [&](int64_t begin, int64_t end) { kernels().gather_rows(x, index, out, begin, end); });
}

struct Selection {
  View x;
  bool wide;         // scores, and so their mean, are float64
  const void* mean;  // (B, n), the scores themselves or in the caller's scratch
  Tensor tokens;     // (B, P+K+extra_rows, C), the first P+K rows filled
  Tensor index;      // (B, P+K)
  View out;
  int64_t num_patches;
};

const void* mean_scores(const View& scores) {
  const int64_t batch = scores.size[0], n = scores.size[2];
  const bool as_sums = scores.dtype == DType::kFloat32 || scores.dtype == DType::kFloat64;
  if (scores.size[1] == 1 && as_sums && scores.stride[2] == 1 && scores.stride[0] == n) {
    return scores.data;  // the mean over one head
  }
  void* mean = caller_scratch<Byte16>((batch * n * 8 + 15) / 16);
  for_items(batch, scores.size[1] * n * scores.element_size,
            [&](int64_t begin, int64_t end) { kernels().head_mean(scores, mean, begin, end); });
  return mean;
}

Selection select_and_move(const Tensor& x, const Tensor& scores, int64_t num_keep,
                          int64_t num_prefix, int64_t extra_rows) {
  const View tokens_in = float_view("x", x, {-1, -1, -1});
  const int64_t batch = tokens_in.size[0], num_tokens = tokens_in.size[1];
  const View score = scores_view(scores, batch);
  const int64_t n = score.size[2];
  check_count("num_prefix_tokens", num_prefix, num_tokens);
  if (num_prefix + n != num_tokens) {
    fail("scores must have one column for each of ", num_tokens - num_prefix, " patches, got ",
         shape_of(scores));
  }
  check_count("num_keep", num_keep, n);
  if (n > INT32_MAX) {
    fail("scores must have less than 2**31 columns, got ", n);
  }
  const int64_t rows = num_prefix + num_keep;
  Selection s{tokens_in,
              score.dtype == DType::kFloat64,
              mean_scores(score),
              empty_like(x, {batch, rows + extra_rows, tokens_in.size[2]}),
              empty({batch, rows}, aoti_torch_dtype_int64()),
              {},
              n};
  s.out = output_view(s.tokens, tokens_in);
  int64_t* index = static_cast<int64_t*>(s.index.data_ptr());
  const View kept = index_view(s.index, batch);
  const auto select = [&](int64_t begin, int64_t end) {
    kernels().select_topk(s.mean, s.wide, n, num_keep, num_prefix, index, begin, end);
  };
  // The threshold search passes over the 4-byte keys about 25 times.
  const int64_t select_bytes = n * 100,
                move_bytes = rows * tokens_in.size[2] * tokens_in.element_size;
  if (enough_images(batch)) {  // threads meet once: 33 us, not 37, for B 64, N 197, C 192
    for_items(batch, select_bytes + move_bytes, [&](int64_t begin, int64_t end) {
      select(begin, end);
      kernels().gather_rows(tokens_in, kept, s.out, begin * rows, end * rows);
    });
  } else {
    for_items(batch, select_bytes, select);
    move_rows(tokens_in, kept, s.out);
  }
  return s;
}

std::tuple<Tensor, Tensor> gather_topk(const Tensor& x, const Tensor& scores, int64_t num_keep,
                                       int64_t num_prefix_tokens) {
  const Selection s = select_and_move(x, scores, num_keep, num_prefix_tokens, 0);
  return {s.tokens, s.index};
}

std::tuple<Tensor, Tensor> gather_topk_fuse(const Tensor& x, const Tensor& scores, int64_t num_keep,
                                            int64_t num_prefix_tokens) {
  const Selection s = select_and_move(x, scores, num_keep, num_prefix_tokens, 1);
  const int64_t batch = s.x.size[0], channels = s.x.size[2];
  const int64_t blocks = column_blocks(batch, channels);
  const int64_t image_bytes = (s.num_patches - num_keep) * channels * s.x.element_size;
  const int64_t* index = static_cast<const int64_t*>(s.index.data_ptr());
  for_items(batch * blocks, image_bytes / blocks, [&](int64_t begin, int64_t end) {
    kernels().sum_dropped(s.x, s.mean, s.wide, index, num_prefix_tokens + num_keep, s.num_patches,
                          s.out, blocks, begin, end);
  });
  return {s.tokens, s.index};
}

std::tuple<Tensor, Tensor> gather_topk_fuse_backward(const Tensor& grad, const Tensor& x,
                                                     const Tensor& scores, const Tensor& index) {
  const View from = float_view("x", x, {-1, -1, -1});
  const int64_t batch = from.size[0], num_tokens = from.size[1], channels = from.size[2];
  const View rows = index_view(index, batch);
  const View grad_rows = same_dtype_view("grad", grad, from, {batch, rows.size[1] + 1, channels});
  const View score = scores_view(scores, batch);
  if (score.size[2] > num_tokens) {
    fail("scores must have at most ", num_tokens, " columns, got ", shape_of(scores));
  }
  const int32_t* inverse = checked_inverse(rows, num_tokens);
  const void* mean = mean_scores(score);
  Tensor grad_x = empty_like(x, {batch, num_tokens, channels});
  Tensor grad_scores = scores.dim() == 3 ? empty_like(scores, {batch, score.size[1], score.size[2]})
                                         : empty_like(scores, {batch, score.size[2]});
  const View out = output_view(grad_x, from);
  View out_scores = score;
  out_scores.data = grad_scores.data_ptr();
  out_scores.stride[2] = 1;
  out_scores.stride[1] = score.size[2];
  out_scores.stride[0] = score.size[1] * score.size[2];
  const bool wide = score.dtype == DType::kFloat64;
  for_items(batch * num_tokens, 2 * channels * from.element_size, [&](int64_t begin, int64_t end) {
    kernels().fuse_backward(grad_rows, from, mean, wide, inverse, out, out_scores, begin, end);
  });
  return {grad_x, grad_scores};
}

Tensor gather_rows(const Tensor& x, const Tensor& index) {
  const View from = float_view("x", x, {-1, -1, -1});
  const View rows = index_view(index, from.size[0]);
  raise_if_invalid(kernels().check_range(rows, from.size[1]), from.size[1]);
  Tensor out = empty_like(x, {from.size[0], rows.size[1], from.size[2]});
  move_rows(from, rows, output_view(out, from));
  return out;
}

void put_rows(const View* x, const View& tokens, const View* update, const int32_t* inverse,
              const View& out) {
  const int64_t row_bytes = out.size[2] * out.element_size;
  for_items(out.size[0] * out.size[1], row_bytes, [&](int64_t begin, int64_t end) {
    kernels().scatter_rows(x, tokens, update, inverse, out, begin, end);
  });
}

Tensor gather_rows_backward(const Tensor& grad, const Tensor& index, int64_t num_tokens) {
  const View rows = index_view(index, -1);
  const View from = float_view("grad", grad, {rows.size[0], rows.size[1], -1});
  check_count("num_tokens", num_tokens, INT32_MAX);
  Tensor out = empty_like(grad, {rows.size[0], num_tokens, from.size[2]});
  const int32_t* inverse = checked_inverse(rows, num_tokens);
  put_rows(nullptr, from, nullptr, inverse, output_view(out, from));
  return out;
}

Tensor scatter_back(const Tensor& x, const Tensor& tokens, const Tensor& index,
                    const std::optional<Tensor>& update) {
  const View skipped = float_view("x", x, {-1, -1, -1});
  const int64_t batch = skipped.size[0], num_tokens = skipped.size[1], channels = skipped.size[2];
  const View rows = index_view(index, batch);
  const View moved = same_dtype_view("tokens", tokens, skipped, {batch, rows.size[1], channels});
  View added{};
  if (update) {
    added = same_dtype_view("update", *update, skipped, {batch, channels});
  }
  const int32_t* inverse = checked_inverse(rows, num_tokens);
  Tensor out = empty_like(x, {batch, num_tokens, channels});
  put_rows(&skipped, moved, update ? &added : nullptr, inverse, output_view(out, skipped));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> scatter_back_backward(const Tensor& grad, const Tensor& index,
                                                         bool has_update) {
  const View from = float_view("grad", grad, {-1, -1, -1});
  const int64_t batch = from.size[0], num_tokens = from.size[1], channels = from.size[2];
  const View rows = index_view(index, batch);
  const int32_t* inverse = checked_inverse(rows, num_tokens);
  Tensor grad_x = empty_like(grad, {batch, num_tokens, channels});
  Tensor grad_tokens = empty_like(grad, {batch, rows.size[1], channels});
  Tensor grad_update = has_update ? empty_like(grad, {batch, channels}) : empty_like(grad, {0});
  const View out_x = output_view(grad_x, from);
  const View out_tokens = output_view(grad_tokens, from);
  const View out_update = output_view(grad_update, from);
  const int64_t blocks = column_blocks(batch, channels);
  const int64_t image_bytes = num_tokens * channels * from.element_size;
  for_items(batch * blocks, image_bytes / blocks, [&](int64_t begin, int64_t end) {
    kernels().scatter_back_backward(from, inverse, out_x, out_tokens,
                                    has_update ? &out_update : nullptr, blocks, begin, end);
  });
  return {grad_x, grad_tokens, grad_update};
}

// Features (B, N, D) are features (B, 1, N, D).
View features_view(const Tensor& features) {
  if (features.dim() == 4) {
    const View view = float_view("features", features, {-1, -1, -1, -1});
    if (view.size[1] == 0) {
      fail("features must have at least one head, got ", shape_of(features));
    }
    return view;
  }
  View view = float_view("features", features, {-1, -1, -1});
  for (int64_t d = 3; d > 1; --d) {
    view.size[d] = view.size[d - 1];
    view.stride[d] = view.stride[d - 1];
  }
  view.size[1] = 1;
  return view;
}

Tensor match_higher(const Tensor& features, const Tensor& ranks, int64_t num_prefix_tokens) {
  const View from = features_view(features);
  const int64_t batch = from.size[0], num_tokens = from.size[2];
  check_count("num_prefix_tokens", num_prefix_tokens, num_tokens);
  const int64_t n = num_tokens - num_prefix_tokens;
  const View rank = float32_view("ranks", ranks, batch, n);
  if (n > INT32_MAX) {
    fail("features must have less than 2**31 patches, got ", n);
  }
  Tensor out = empty({batch, n}, aoti_torch_dtype_float32());
  float* result = static_cast<float*>(out.data_ptr());
  // 32 multiplications take as long as moving 16 bytes; half of the others rank above a patch.
  for_items(batch * n, n * from.size[3] / 4, [&](int64_t begin, int64_t end) {
    kernels().match_higher(from, rank, num_prefix_tokens, result, begin, end);
  });
  return out;
}

Tensor match_kept(const Tensor& features, const Tensor& index, int64_t num_prefix_tokens) {
  const View from = features_view(features);
  const int64_t batch = from.size[0], num_tokens = from.size[2];
  const View rows = index_view(index, batch);
  check_count("num_prefix_tokens", num_prefix_tokens, rows.size[1]);
  const int64_t num_keep = rows.size[1] - num_prefix_tokens;
  if (num_keep == 0 && rows.size[1] < num_tokens) {
    fail("index must hold at least one kept patch, got ", shape_of(index));
  }
  const int32_t* inverse = checked_inverse(rows, num_tokens);
  Tensor owner = empty({batch, num_tokens}, aoti_torch_dtype_int64());
  int64_t* result = static_cast<int64_t*>(owner.data_ptr());
  // 32 multiplications take as long as moving 16 bytes.
  for_items(batch * num_tokens, num_keep * from.size[3] / 2, [&](int64_t begin, int64_t end) {
    kernels().match_kept(from, rows, inverse, num_prefix_tokens, result, begin, end);
  });
  return owner;
}

std::tuple<Tensor, Tensor> merge_rows(const Tensor& x, const Tensor& owner, int64_t num_rows,
                                      const std::optional<Tensor>& sizes) {
  const View from = float_view("x", x, {-1, -1, -1});
  const int64_t batch = from.size[0], num_tokens = from.size[1], channels = from.size[2];
  const View owners = index_view(owner, batch, "owner", num_tokens);
  check_count("num_rows", num_rows, num_tokens);
  View size{};
  if (sizes) {
    size = float32_view("sizes", *sizes, batch, num_tokens);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t n = 0; n < num_tokens; ++n) {
        const float s =
            static_cast<const float*>(size.data)[b * size.stride[0] + n * size.stride[1]];
        if (!(s > 0)) {
          fail("sizes must be positive, got ", s);
        }
      }
    }
  }
  const Groups groups = checked_groups(owners, num_rows, true);
  Tensor tokens = empty_like(x, {batch, num_rows, channels});
  Tensor merged_sizes = empty({batch, num_rows}, aoti_torch_dtype_float32());
  float* merged = static_cast<float*>(merged_sizes.data_ptr());
  const View out = output_view(tokens, from);
  const int64_t image_bytes = num_tokens * channels * from.element_size;
  for_items(batch * num_rows, image_bytes / std::max<int64_t>(1, num_rows),
            [&](int64_t begin, int64_t end) {
              kernels().merge_rows(from, sizes ? &size : nullptr, groups.starts, groups.rows, out,
                                   merged, begin, end);
            });
  return {tokens, merged_sizes};
}

Tensor merge_rows_backward(const Tensor& grad, const Tensor& owner,
                           const std::optional<Tensor>& sizes, const Tensor& merged_sizes) {
  const View from = float_view("grad", grad, {-1, -1, -1});
  const int64_t batch = from.size[0], num_rows = from.size[1], channels = from.size[2];
  const View owners = index_view(owner, batch, "owner");
  const int64_t num_tokens = owners.size[1];
  View size{};
  if (sizes) {
    size = float32_view("sizes", *sizes, batch, num_tokens);
  }
  const View merged = float32_view("merged_sizes", merged_sizes, batch, num_rows);
  raise_if_invalid(kernels().check_range(owners, num_rows), num_rows, "owner");
  Tensor grad_x = empty_like(grad, {batch, num_tokens, channels});
  const View out = output_view(grad_x, from);
  for_items(batch * num_tokens, channels * from.element_size, [&](int64_t begin, int64_t end) {
    kernels().merge_rows_backward(from, owners, sizes ? &size : nullptr, merged, out, begin, end);
  });
  return grad_x;
}

Tensor restore_rows(const Tensor& x, const Tensor& before, const Tensor& after,
                    const Tensor& owner) {
  const View own = float_view("x", x, {-1, -1, -1});
  const int64_t batch = own.size[0], num_tokens = own.size[1], channels = own.size[2];
  const View was = same_dtype_view("before", before, own, {batch, -1, channels});
  const View is = same_dtype_view("after", after, own, {batch, was.size[1], channels});
  const View owners = index_view(owner, batch, "owner", num_tokens);
  const Groups groups = checked_groups(owners, was.size[1], false);
  Tensor restored = empty_like(x, {batch, num_tokens, channels});
  const View out = output_view(restored, own);
  const int64_t image_bytes = 2 * num_tokens * channels * own.element_size;
  for_items(batch * was.size[1], image_bytes / std::max<int64_t>(1, was.size[1]),
            [&](int64_t begin, int64_t end) {
              kernels().restore_rows(own, was, is, groups.starts, groups.rows, out, begin, end);
            });
  return restored;
}

std::tuple<Tensor, Tensor, Tensor> restore_rows_backward(const Tensor& grad, const Tensor& owner,
                                                         int64_t num_rows) {
  const View from = float_view("grad", grad, {-1, -1, -1});
  const int64_t batch = from.size[0], num_tokens = from.size[1], channels = from.size[2];
  const View owners = index_view(owner, batch, "owner", num_tokens);
  check_count("num_rows", num_rows, INT32_MAX - 1);
  Tensor grad_x = empty_like(grad, {batch, num_tokens, channels});
  Tensor grad_before = empty_like(grad, {batch, num_rows, channels});
  Tensor grad_after = empty_like(grad, {batch, num_rows, channels});
  const Groups groups = checked_groups(owners, num_rows, false);
  const View out_x = output_view(grad_x, from), out_before = output_view(grad_before, from);
  const View out_after = output_view(grad_after, from);
  const int64_t image_bytes = (num_tokens + num_rows) * channels * from.element_size;
  for_items(batch * num_rows, image_bytes / std::max<int64_t>(1, num_rows),
            [&](int64_t begin, int64_t end) {
              kernels().restore_rows_backward(from, groups.starts, groups.rows, out_x, out_before,
                                              out_after, begin, end);
            });
  return {grad_x, grad_before, grad_after};
}

STABLE_TORCH_LIBRARY_IMPL(skipvit, CPU, library) {
  library.impl("cls_scores", TORCH_BOX(&cls_scores));
  library.impl("gather_topk", TORCH_BOX(&gather_topk));
  library.impl("gather_topk_fuse", TORCH_BOX(&gather_topk_fuse));
  library.impl("gather_topk_fuse_backward", TORCH_BOX(&gather_topk_fuse_backward));
  library.impl("gather_rows", TORCH_BOX(&gather_rows));
  library.impl("gather_rows_backward", TORCH_BOX(&gather_rows_backward));
  library.impl("scatter_back", TORCH_BOX(&scatter_back));
  library.impl("scatter_back_backward", TORCH_BOX(&scatter_back_backward));
  library.impl("match_higher", TORCH_BOX(&match_higher));
  library.impl("match_kept", TORCH_BOX(&match_kept));
  library.impl("merge_rows", TORCH_BOX(&merge_rows));
  library.impl("merge_rows_backward", TORCH_BOX(&merge_rows_backward));
  library.impl("restore_rows", TORCH_BOX(&restore_rows));
  library.impl("restore_rows_backward", TORCH_BOX(&restore_rows_backward));
}

}  // namespace
}  // namespace skipvit

PYBIND11_MODULE(_C, module) {
  // Chosen here, so that a wrong SKIPVIT_CPU_ISA is an import error and not a failure in a loop.
  const skipvit::CpuKernels& chosen = skipvit::cpu_kernels();
  module.def("build_info", [chosen] {
    pybind11::dict info;
    info["version"] = SKIPVIT_VERSION;
    info["compiler"] = SKIPVIT_COMPILER;
    info["isa"] = chosen.isa;
    info["compiled_isas"] = chosen.compiled;
    return info;
  });
}
