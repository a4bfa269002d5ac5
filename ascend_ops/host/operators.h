// SPDX-License-Identifier: Apache-2.0
// The operators without torch: check the arguments, say what to allocate, launch the kernels. The
// torch_npu binding and the tests' CPU model both run this code.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace skipvit {

// A tensor. `data` may be null where the tensor is empty or absent.
struct View {
  const char* name;
  void* data;
  std::string dtype;  // as torch names it: float32, float16, int64 ...
  std::vector<int64_t> sizes, strides;
  bool absent = false;
};

// The caller raises TypeError or ValueError; nothing has been launched.
struct BadArgument {
  bool is_type;
  std::string message;
};

struct Output {
  std::vector<int64_t> sizes;
  std::string dtype;
  // Elements to allocate: the kernels write whole 32-byte blocks, so the last may reach past the
  // end, by less than a block.
  int64_t storage;
};

// A checked call, ready for its memory.
struct Call {
  std::vector<Output> outputs;
  uint64_t ub_bytes = 0;  // unified buffer that the largest of the kernels takes
  // Enqueues the kernels on `stream`; 0 or the first error code.
  std::function<uint32_t(const std::vector<void*>& outputs, void* stream)> launch;
};

// Every view but k is dense. `cores` is how many AI cores to use, 1 to 32.
Call gather_topk(const View& x, const View& scores, int64_t num_keep, int64_t num_prefix, bool fuse,
                 uint32_t cores);
Call gather_topk_fuse_backward(const View& grad, const View& x, const View& scores,
                               const View& index, uint32_t cores);
Call gather_rows(const View& x, const View& index, uint32_t cores);
Call gather_rows_backward(const View& grad, const View& index, int64_t num_tokens, uint32_t cores);
Call scatter_back(const View& x, const View& tokens, const View& index, const View& update,
                  uint32_t cores);
Call scatter_back_backward(const View& grad, const View& index, bool has_update, uint32_t cores);
Call cls_scores(const View& q, const View& k, double scale, int64_t num_prefix, uint32_t cores);

// Why the kernels cannot run on the chip of this name (null: the driver has none), or an empty
// text. The launch functions that CANN generates print and return success on a chip they were not
// built for, and outputs would keep whatever their memory held.
std::string refuse_chip(const char* soc_name);

// Whether cls_scores reads k as it lies; otherwise it must be made dense first.
bool reads_in_place(const View& k);

}  // namespace skipvit
