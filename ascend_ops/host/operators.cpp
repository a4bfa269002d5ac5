// SPDX-License-Identifier: Apache-2.0
#include "operators.h"

#include <algorithm>
#include <sstream>

#include "launches.h"
#include "tiling.h"

namespace skipvit {
namespace {

constexpr const char* kChip = " on Ascend910A";

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
[[noreturn]] void bad_value(const Parts&... parts) {
  throw BadArgument{false, text(parts...)};
}

std::string shape_text(const std::vector<int64_t>& sizes) {
  std::string out = "(";
  for (size_t d = 0; d < sizes.size(); ++d) {
    out += (d == 0 ? "" : ", ") + std::to_string(sizes[d]);
  }
  return out + ")";
}

// A negative size stands for any.
void require_shape(const View& view, const std::vector<int64_t>& sizes) {
  bool same = view.sizes.size() == sizes.size();
  for (size_t d = 0; same && d < sizes.size(); ++d) {
    same = sizes[d] < 0 || view.sizes[d] == sizes[d];
  }
  if (!same) {
    bad_value(view.name, " must have shape ", shape_text(sizes), " (-1: any size), got ",
              shape_text(view.sizes));
  }
}

DType require_float(const View& view) {
  if (view.dtype == "float32") {
    return kFloat32;
  }
  if (view.dtype == "float16") {
    return kFloat16;
  }
  throw BadArgument{true,
                    text(view.name, " must be float32 or float16", kChip, ", got ", view.dtype,
                         view.dtype == "bfloat16" ? ": the chip has no bfloat16, use float16"
                                                  : ": convert it first")};
}

void require_same_dtype(const View& view, const View& other) {
  if (view.dtype != other.dtype) {
    throw BadArgument{true, text(view.name, " must have the dtype of ", other.name, ", ",
                                 other.dtype, ", got ", view.dtype)};
  }
}

int64_t size_of(const std::string& dtype) {
  return dtype == "float16" ? 2 : dtype == "int64" ? 8 : 4;
}

void require_width(const View& view, int64_t width) {
  const int64_t bytes = width * size_of(view.dtype), elements = kBlockBytes / size_of(view.dtype);
  if (width == 0 || bytes % kBlockBytes != 0) {
    bad_value(view.name, " must have a last dimension that is a multiple of ", elements, kChip,
              " (32 bytes of ", view.dtype, "), got ", width, ": pad it");
  }
  if (bytes > kMaxRowBytes) {
    bad_value(view.name, " must have a last dimension of at most ",
              kMaxRowBytes / size_of(view.dtype), kChip, ", got ", width);
  }
}

void require_tokens(const View& view, int64_t tokens) {
  if (tokens > kMaxTokens) {
    bad_value(view.name, " must have at most ", kMaxTokens, " tokens", kChip, ", got ", tokens);
  }
}

// (B, N, C) tokens of a width and number that the kernels take.
DType require_rows(const View& view) {
  require_shape(view, {-1, -1, -1});
  const DType dtype = require_float(view);
  require_tokens(view, view.sizes[1]);
  require_width(view, view.sizes[2]);
  return dtype;
}

// (B, M) with M at most N: rows are unique. Returns M.
int64_t require_index(const View& index, int64_t batch, const char* rows, int64_t num_tokens) {
  require_shape(index, {batch, -1});
  if (index.dtype != "int64") {
    throw BadArgument{true, text("index must be int64, got ", index.dtype)};
  }
  if (index.sizes[1] > num_tokens) {
    bad_value("index must name each of the ", num_tokens, " rows of ", rows, " at most once, got ",
              index.sizes[1], " entries");
  }
  return index.sizes[1];
}

struct Scores {
  DType dtype;
  int64_t heads, patches;
};

Scores require_scores(const View& scores, int64_t batch) {
  const bool has_heads = scores.sizes.size() == 3;
  require_shape(scores,
                has_heads ? std::vector<int64_t>{batch, -1, -1} : std::vector<int64_t>{batch, -1});
  if (has_heads && scores.sizes[1] == 0) {
    bad_value("scores must have at least one head, got ", shape_text(scores.sizes));
  }
  return {require_float(scores), has_heads ? scores.sizes[1] : 1, scores.sizes.back()};
}

Output output(std::vector<int64_t> sizes, const std::string& dtype) {
  int64_t count = 1;
  for (const int64_t size : sizes) {
    count *= size;
  }
  const int64_t block = kBlockBytes / size_of(dtype);
  return {std::move(sizes), dtype, count + block - 1};
}

void require_fit(const Tiling& tiling, const View& view) {
  if (tiling.tile_rows == 0) {
    bad_value(view.name, " must fit the unified buffer of 248 KB", kChip, ", which ",
              shape_text(view.sizes), " of ", view.dtype,
              " does not: use fewer tokens or channels");
  }
}

using Launch = std::function<uint32_t(const std::vector<void*>&, void*)>;

// One kernel of a call.
struct Step {
  uint64_t ub_bytes;
  Launch launch;
};

void run_in_order(Call& call, std::vector<Step> steps) {
  for (const Step& step : steps) {
    call.ub_bytes = std::max(call.ub_bytes, step.ub_bytes);
  }
  call.launch = [steps = std::move(steps)](const std::vector<void*>& outputs,
                                           void* stream) -> uint32_t {
    for (const Step& step : steps) {
      if (const uint32_t error = step.launch(outputs, stream)) {
        return error;
      }
    }
    return 0;
  };
}

uint32_t u32(int64_t value) { return static_cast<uint32_t>(value); }

// moved, base and update may be null; `like` has the rows' width and dtype. With `taken` the named
// rows of base go to the second output.
void add_place_rows(std::vector<Step>& steps, void* moved, void* base, void* update,
                    const View& index, const View& like, int64_t num_tokens, DType dtype,
                    bool taken, uint32_t cores) {
  const int64_t batch = index.sizes[0], channels = like.sizes[2];
  if (batch * num_tokens == 0) {
    return;
  }
  const Tiling t =
      tile_place_rows(batch, num_tokens, index.sizes[1], channels * size_of(like.dtype), cores);
  require_fit(t, like);
  steps.push_back({t.ub_bytes, [=, by = index.data, entries = u32(index.sizes[1])](
                                   const std::vector<void*>& outputs, void* stream) {
                     return aclrtlaunch_skipvit_place_rows(
                         t.cores, stream, moved, base, update, by, outputs[0],
                         taken ? outputs[1] : nullptr, t.total, t.per_core, dtype, u32(num_tokens),
                         entries, u32(channels), t.tile_rows);
                   }});
}

}  // namespace

Call gather_rows(const View& x, const View& index, uint32_t cores) {
  require_rows(x);
  const int64_t batch = x.sizes[0], moved = require_index(index, batch, "x", x.sizes[1]);
  Call call;
  call.outputs = {output({batch, moved, x.sizes[2]}, x.dtype)};
  std::vector<Step> steps;
  if (batch * moved > 0) {
    const uint32_t row_bytes = u32(x.sizes[2] * size_of(x.dtype));
    const Tiling t = tile_gather_rows(batch, moved, row_bytes, cores);
    require_fit(t, x);
    steps.push_back({t.ub_bytes, [=, from = x.data, by = index.data, tokens = u32(x.sizes[1])](
                                     const std::vector<void*>& outputs, void* stream) {
                       return aclrtlaunch_skipvit_gather_rows(t.cores, stream, from, by, outputs[0],
                                                              t.total, t.per_core, tokens,
                                                              u32(moved), row_bytes, t.tile_rows);
                     }});
  }
  run_in_order(call, std::move(steps));
  return call;
}

Call gather_rows_backward(const View& grad, const View& index, int64_t num_tokens, uint32_t cores) {
  const DType dtype = require_rows(grad);
  require_tokens(grad, num_tokens);
  require_index(index, grad.sizes[0], "x", num_tokens);
  require_shape(grad, {-1, index.sizes[1], -1});
  Call call;
  call.outputs = {output({grad.sizes[0], num_tokens, grad.sizes[2]}, grad.dtype)};
  std::vector<Step> steps;
  add_place_rows(steps, grad.data, nullptr, nullptr, index, grad, num_tokens, dtype, false, cores);
  run_in_order(call, std::move(steps));
  return call;
}

Call scatter_back(const View& x, const View& tokens, const View& index, const View& update,
                  uint32_t cores) {
  const DType dtype = require_rows(x);
  const int64_t moved = require_index(index, x.sizes[0], "x", x.sizes[1]);
  require_shape(tokens, {x.sizes[0], moved, x.sizes[2]});
  require_same_dtype(tokens, x);
  if (!update.absent) {
    require_shape(update, {x.sizes[0], x.sizes[2]});
    require_same_dtype(update, x);
  }
  Call call;
  call.outputs = {output(x.sizes, x.dtype)};
  std::vector<Step> steps;
  add_place_rows(steps, tokens.data, x.data, update.absent ? nullptr : update.data, index, x,
                 x.sizes[1], dtype, false, cores);
  run_in_order(call, std::move(steps));
  return call;
}

Call scatter_back_backward(const View& grad, const View& index, bool has_update, uint32_t cores) {
  const DType dtype = require_rows(grad);
  const int64_t batch = grad.sizes[0], num_tokens = grad.sizes[1], channels = grad.sizes[2];
  const int64_t moved = require_index(index, batch, "grad", num_tokens);
  Call call;
  call.outputs = {output(grad.sizes, grad.dtype), output({batch, moved, channels}, grad.dtype),
                  has_update ? output({batch, channels}, grad.dtype) : output({0}, grad.dtype)};
  std::vector<Step> steps;
  add_place_rows(steps, nullptr, grad.data, nullptr, index, grad, num_tokens, dtype, true, cores);
  if (has_update && batch > 0) {
    const Tiling t =
        tile_sum_rows(batch, num_tokens, moved, channels, size_of(grad.dtype), 0, 4, cores);
    require_fit(t, grad);
    steps.push_back({t.ub_bytes, [=, from = grad.data, by = index.data](
                                     const std::vector<void*>& outputs, void* stream) {
                       return aclrtlaunch_skipvit_sum_rows(
                           t.cores, stream, from, nullptr, by, outputs[2], t.total, t.per_core,
                           dtype, kFloat32, u32(num_tokens), u32(moved), u32(channels), 1, 0,
                           u32(channels), t.block_channels);
                     }});
  }
  run_in_order(call, std::move(steps));
  return call;
}

Call gather_topk(const View& x, const View& scores, int64_t num_keep, int64_t num_prefix, bool fuse,
                 uint32_t cores) {
  const DType dtype = require_rows(x);
  const int64_t batch = x.sizes[0], num_tokens = x.sizes[1], channels = x.sizes[2];
  const Scores s = require_scores(scores, batch);
  if (num_prefix < 0 || num_prefix + s.patches != num_tokens) {
    bad_value("scores must have one column for each of ", num_tokens - num_prefix, " patches, got ",
              shape_text(scores.sizes));
  }
  if (num_keep < 0 || num_keep > s.patches) {
    bad_value("num_keep must be in [0, ", s.patches, "], got ", num_keep);
  }
  const int64_t rows = num_prefix + num_keep, out_rows = rows + (fuse ? 1 : 0);
  const int64_t score_size = size_of(scores.dtype), row_bytes = channels * size_of(x.dtype);
  Call call;
  call.outputs = {output({batch, out_rows, channels}, x.dtype), output({batch, rows}, "int64")};
  std::vector<Step> steps;
  if (batch * rows > 0) {
    const Tiling t =
        tile_gather_topk(batch, num_prefix, s.patches, num_keep, row_bytes, score_size, cores);
    require_fit(t, x);
    steps.push_back({t.ub_bytes, [=, from = x.data, by = scores.data](
                                     const std::vector<void*>& outputs, void* stream) {
                       return aclrtlaunch_skipvit_gather_topk(
                           t.cores, stream, from, by, outputs[0], outputs[1], t.total, t.per_core,
                           s.dtype, u32(num_tokens), u32(row_bytes), u32(s.heads), u32(s.patches),
                           u32(num_keep), u32(out_rows), t.tile_rows);
                     }});
  }
  if (fuse && batch > 0) {
    const Tiling t = tile_sum_rows(batch, num_tokens, rows, channels, size_of(x.dtype), s.patches,
                                   score_size, cores);
    require_fit(t, x);
    steps.push_back({t.ub_bytes, [=, from = x.data, by = scores.data, size = size_of(x.dtype)](
                                     const std::vector<void*>& outputs, void* stream) {
                       uint8_t* last_row =
                           static_cast<uint8_t*>(outputs[0]) + rows * channels * size;
                       return aclrtlaunch_skipvit_sum_rows(
                           t.cores, stream, from, by, outputs[1], last_row, t.total, t.per_core,
                           dtype, s.dtype, u32(num_tokens), u32(rows), u32(channels), u32(s.heads),
                           u32(num_prefix), u32(out_rows * channels), t.block_channels);
                     }});
  }
  run_in_order(call, std::move(steps));
  return call;
}

Call gather_topk_fuse_backward(const View& grad, const View& x, const View& scores,
                               const View& index, uint32_t cores) {
  const DType dtype = require_rows(x);
  const int64_t batch = x.sizes[0], num_tokens = x.sizes[1], channels = x.sizes[2];
  const int64_t moved = require_index(index, batch, "x", num_tokens);
  require_shape(grad, {batch, moved + 1, channels});
  require_same_dtype(grad, x);
  const Scores s = require_scores(scores, batch);
  if (s.patches > num_tokens) {
    bad_value("scores must have at most ", num_tokens, " columns, got ", shape_text(scores.sizes));
  }
  const int64_t prefix = num_tokens - s.patches, score_size = size_of(scores.dtype);
  Call call;
  call.outputs = {output(x.sizes, x.dtype), output(scores.sizes, scores.dtype)};
  std::vector<Step> steps;
  if (batch * num_tokens > 0) {
    const Tiling t = tile_fuse_backward(batch, num_tokens, moved, channels, size_of(x.dtype),
                                        s.patches, score_size, cores);
    require_fit(t, x);
    steps.push_back(
        {t.ub_bytes, [=, g = grad.data, from = x.data, by = scores.data, rows = index.data](
                         const std::vector<void*>& outputs, void* stream) {
           return aclrtlaunch_skipvit_fuse_backward(t.cores, stream, g, from, by, rows, outputs[0],
                                                    outputs[1], t.total, t.per_core, dtype, s.dtype,
                                                    u32(num_tokens), u32(moved), u32(channels),
                                                    u32(s.heads), u32(prefix), t.tile_rows);
         }});
  }
  run_in_order(call, std::move(steps));
  return call;
}

std::string refuse_chip(const char* soc_name) {
  const std::string name = soc_name == nullptr ? "a chip without a name" : soc_name;
  for (const char* chip : {"Ascend910A", "Ascend910ProA", "Ascend910PremiumA", "Ascend910ProB",
                           "Ascend910B"}) {  // no digit: 910B1 to B4 are another architecture
    if (name == chip) {
      return "";
    }
  }
  return text(
      "the Ascend kernels are for the first Ascend910 (Ascend910A, ProA, PremiumA, ProB, or ",
      "Ascend910B without a digit), got ", name);
}

bool reads_in_place(const View& k) {
  const int64_t size = size_of(k.dtype), width = k.sizes[3];
  // torch calls a dimension of one entry contiguous whatever its stride.
  const int64_t row = k.sizes[2] > 1 ? k.strides[2] : width;
  const int64_t gap = (row - width) * size;  // between two keys
  return k.strides[3] == 1 && k.strides[0] >= 0 && k.strides[1] >= 0 && gap >= 0 &&
         gap % kBlockBytes == 0 && gap / kBlockBytes <= UINT16_MAX;
}

Call cls_scores(const View& q, const View& k, double scale, int64_t num_prefix, uint32_t cores) {
  require_shape(k, {-1, -1, -1, -1});
  const DType dtype = require_float(k);
  const int64_t batch = k.sizes[0], heads = k.sizes[1], num_tokens = k.sizes[2], width = k.sizes[3];
  require_tokens(k, num_tokens);
  require_width(k, width);
  if (width > kMaxHeadWidth) {
    bad_value("k must have a last dimension of at most ", kMaxHeadWidth, kChip, ", got ", width);
  }
  require_shape(q, {batch, heads, width});
  require_same_dtype(q, k);
  if (heads == 0) {
    bad_value("k must have at least one head, got ", shape_text(k.sizes));
  }
  if (num_prefix < 0 || num_prefix > num_tokens) {
    bad_value("num_prefix_tokens must be in [0, ", num_tokens, "], got ", num_prefix);
  }
  const int64_t patches = num_tokens - num_prefix;
  Call call;
  call.outputs = {output({batch, patches}, "float32")};
  std::vector<Step> steps;
  if (batch * patches > 0) {
    if (!reads_in_place(k)) {
      bad_value("k must have keys that are dense and whole blocks of 32 bytes apart", kChip,
                ": make it contiguous");
    }
    const int64_t row = num_tokens > 1 ? k.strides[2] : width;
    const Tiling t = tile_cls_scores(batch, num_tokens, patches, width, size_of(k.dtype), cores);
    require_fit(t, k);
    steps.push_back({t.ub_bytes, [=, query = q.data, keys = k.data, strides = k.strides](
                                     const std::vector<void*>& outputs, void* stream) {
                       return aclrtlaunch_skipvit_cls_scores(
                           t.cores, stream, query, keys, outputs[0], t.total, t.per_core,
                           static_cast<uint64_t>(strides[0]), static_cast<uint64_t>(strides[1]),
                           u32(row), dtype, u32(heads), u32(num_tokens), u32(num_prefix),
                           u32(width), t.tile_rows, static_cast<float>(scale));
                     }});
  }
  run_in_order(call, std::move(steps));
  return call;
}

}  // namespace skipvit
