// SPDX-License-Identifier: Apache-2.0
// The operators under torch's PrivateUse1 key, for tensors of torch_npu. Arguments are checked and
// kernels launched by host/operators.cpp; here are torch's tensors, memory and stream.
#include <acl/acl.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <optional>
#include <tuple>

#include "chip.h"
#include "host/operators.h"
#include "torch_npu/csrc/core/npu/NPUFormat.h"
#include "torch_npu/csrc/core/npu/NPUGuard.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"
#include "torch_npu/csrc/framework/OpCommand.h"

namespace skipvit::binding {
namespace {

using at::Tensor;

std::string dtype_name(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return "float32";
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    case at::kDouble:
      return "float64";
    case at::kLong:
      return "int64";
    default:
      return c10::toString(type);
  }
}

at::ScalarType scalar_type(const std::string& dtype) {
  return dtype == "float16" ? at::kHalf : dtype == "int64" ? at::kLong : at::kFloat;
}

View view_of(const char* name, const Tensor& tensor) {
  return {name, tensor.data_ptr(), dtype_name(tensor.scalar_type()), tensor.sizes().vec(),
          tensor.strides().vec()};
}

// Row-major memory: torch_npu may hold the result of a matrix product in a tiled format of its own.
Tensor plain(const Tensor& tensor) {
  switch (at_npu::native::get_npu_format(tensor)) {
    case ACL_FORMAT_ND:
    case ACL_FORMAT_NCHW:
    case ACL_FORMAT_NHWC:
    case ACL_FORMAT_NCDHW:
      return tensor;
    default:
      return at_npu::native::npu_format_cast(tensor, ACL_FORMAT_ND);
  }
}

// A call past the public functions may bring tensors of several devices: a pointer of another one
// must not reach a core. `like` is the operator's first tensor.
const Tensor& on_npu(const char* name, const Tensor& tensor, const Tensor& like) {
  TORCH_CHECK_VALUE(tensor.is_privateuseone(), name, " must be on an NPU, got ", tensor.device());
  TORCH_CHECK_VALUE(tensor.device() == like.device(), name, " must be on ", like.device(), ", got ",
                    tensor.device());
  return tensor;
}

Tensor dense(const char* name, const Tensor& tensor, const Tensor& like) {
  return plain(on_npu(name, tensor, like)).contiguous();
}

// AI cores of the device, asked once: 30 or 32 on the chips of this family.
uint32_t cores_of(const c10::Device& device) {
  static std::array<std::atomic<uint32_t>, 128> known{};  // a device's index is a signed byte
  std::atomic<uint32_t>& cores = known.at(static_cast<size_t>(device.index()));
  if (cores == 0) {
    int64_t asked = 0;
    const aclError status = aclGetDeviceCapability(static_cast<uint32_t>(device.index()),
                                                   ACL_DEVICE_INFO_AI_CORE_NUM, &asked);
    cores = status == ACL_SUCCESS ? static_cast<uint32_t>(std::clamp<int64_t>(asked, 1, kMaxCores))
                                  : 30;
  }
  return cores;
}

// Why the kernels cannot run on this chip, or an empty text.
const std::string& refused() {
  static const std::string why = refuse_chip(aclrtGetSocName());
  return why;
}

// Plans the call, allocates its outputs and enqueues its kernels on the current stream. `inputs`
// stay alive until the kernels have been enqueued; after that the allocator keeps their memory in
// order.
template <class Plan>
std::vector<Tensor> run(const char* name, std::vector<Tensor> inputs, const Plan& plan) {
  const Tensor& like = inputs.front();
  const c10_npu::NPUGuard guard(like.device());
  TORCH_CHECK(refused().empty(), refused());
  Call call;
  try {
    call = plan(cores_of(like.device()));
  } catch (const BadArgument& bad) {
    if (bad.is_type) {
      TORCH_CHECK_TYPE(false, bad.message);
    }
    TORCH_CHECK_VALUE(false, bad.message);
  }
  std::vector<Tensor> outputs;
  std::vector<void*> addresses;
  for (const Output& output : call.outputs) {
    const auto options = like.options().dtype(scalar_type(output.dtype));
    const Tensor memory = at::empty({output.storage}, options);
    addresses.push_back(memory.data_ptr());
    outputs.push_back(memory.narrow(0, 0, c10::multiply_integers(output.sizes)).view(output.sizes));
  }
  aclrtStream stream = c10_npu::getCurrentNPUStream().stream(false);
  at_npu::native::OpCommand::RunOpApi(
      name, [call = std::move(call), addresses, inputs, outputs, stream]() -> int {
        return static_cast<int>(call.launch(addresses, stream));
      });
  return outputs;
}

Tensor cls_scores(const Tensor& q, const Tensor& k, std::optional<double> scale,
                  int64_t num_prefix_tokens) {
  const Tensor query = dense("q", q, q);
  Tensor keys = plain(on_npu("k", k, q));
  if (keys.dim() == 4 && !reads_in_place(view_of("k", keys))) {
    keys = keys.contiguous();
  }
  const double width = query.dim() > 0 ? static_cast<double>(query.size(-1)) : 1;
  const double factor = scale.value_or(std::pow(width, -0.5));
  return run("skipvit_cls_scores", {query, keys}, [&](uint32_t cores) {
    return skipvit::cls_scores(view_of("q", query), view_of("k", keys), factor, num_prefix_tokens,
                               cores);
  })[0];
}

std::tuple<Tensor, Tensor> topk(const char* name, const Tensor& x, const Tensor& scores,
                                int64_t num_keep, int64_t num_prefix_tokens, bool fuse) {
  const Tensor rows = dense("x", x, x), ranks = dense("scores", scores, x);
  const std::vector<Tensor> out = run(name, {rows, ranks}, [&](uint32_t cores) {
    return skipvit::gather_topk(view_of("x", rows), view_of("scores", ranks), num_keep,
                                num_prefix_tokens, fuse, cores);
  });
  return {out[0], out[1]};
}

std::tuple<Tensor, Tensor> gather_topk(const Tensor& x, const Tensor& scores, int64_t num_keep,
                                       int64_t num_prefix_tokens) {
  return topk("skipvit_gather_topk", x, scores, num_keep, num_prefix_tokens, false);
}

std::tuple<Tensor, Tensor> gather_topk_fuse(const Tensor& x, const Tensor& scores, int64_t num_keep,
                                            int64_t num_prefix_tokens) {
  return topk("skipvit_gather_topk_fuse", x, scores, num_keep, num_prefix_tokens, true);
}

std::tuple<Tensor, Tensor> gather_topk_fuse_backward(const Tensor& grad, const Tensor& x,
                                                     const Tensor& scores, const Tensor& index) {
  const Tensor g = dense("grad", grad, grad), rows = dense("x", x, grad),
               ranks = dense("scores", scores, grad), entries = dense("index", index, grad);
  const std::vector<Tensor> out =
      run("skipvit_gather_topk_fuse_backward", {g, rows, ranks, entries}, [&](uint32_t cores) {
        return skipvit::gather_topk_fuse_backward(view_of("grad", g), view_of("x", rows),
                                                  view_of("scores", ranks),
                                                  view_of("index", entries), cores);
      });
  return {out[0], out[1]};
}

Tensor gather_rows(const Tensor& x, const Tensor& index) {
  const Tensor rows = dense("x", x, x), entries = dense("index", index, x);
  return run("skipvit_gather_rows", {rows, entries}, [&](uint32_t cores) {
    return skipvit::gather_rows(view_of("x", rows), view_of("index", entries), cores);
  })[0];
}

Tensor gather_rows_backward(const Tensor& grad, const Tensor& index, int64_t num_tokens) {
  const Tensor g = dense("grad", grad, grad), entries = dense("index", index, grad);
  return run("skipvit_gather_rows_backward", {g, entries}, [&](uint32_t cores) {
    return skipvit::gather_rows_backward(view_of("grad", g), view_of("index", entries), num_tokens,
                                         cores);
  })[0];
}

Tensor scatter_back(const Tensor& x, const Tensor& tokens, const Tensor& index,
                    const std::optional<Tensor>& update) {
  const Tensor skipped = dense("x", x, x), moved = dense("tokens", tokens, x),
               entries = dense("index", index, x),
               added = update ? dense("update", *update, x) : Tensor();
  View added_view{"update", nullptr, "", {}, {}, true};
  if (update) {
    added_view = view_of("update", added);
  }
  return run("skipvit_scatter_back", {skipped, moved, entries, added}, [&](uint32_t cores) {
    return skipvit::scatter_back(view_of("x", skipped), view_of("tokens", moved),
                                 view_of("index", entries), added_view, cores);
  })[0];
}

std::tuple<Tensor, Tensor, Tensor> scatter_back_backward(const Tensor& grad, const Tensor& index,
                                                         bool has_update) {
  const Tensor g = dense("grad", grad, grad), entries = dense("index", index, grad);
  const std::vector<Tensor> out =
      run("skipvit_scatter_back_backward", {g, entries}, [&](uint32_t cores) {
        return skipvit::scatter_back_backward(view_of("grad", g), view_of("index", entries),
                                              has_update, cores);
      });
  return {out[0], out[1], out[2]};
}

}  // namespace

// Why the library registered no kernel, for backends/npu.py; null where it did.
extern "C" __attribute__((visibility("default"))) const char* skipvit_ascend_refusal() {
  static const char* const chip = aclrtGetSocName();
  static const std::string why = chip != nullptr ? refuse_chip(chip) : "";
  return why.empty() ? nullptr : why.c_str();
}

// Whether the vector unit finishes sums of float32 in this build (kernels/fold.h); for its test.
extern "C" __attribute__((visibility("default"))) int skipvit_ascend_reduces_float() {
#ifdef SKIPVIT_REDUCE_FLOAT
  return 1;
#else
  return 0;
#endif
}

// Registers nothing on a chip that is named and not ours; a driver that cannot name it yet is asked
// again by the first call.
TORCH_LIBRARY_IMPL(skipvit, PrivateUse1, m) {
  if (skipvit_ascend_refusal() != nullptr) {
    return;
  }
  m.impl("cls_scores", cls_scores);
  m.impl("gather_topk", gather_topk);
  m.impl("gather_topk_fuse", gather_topk_fuse);
  m.impl("gather_topk_fuse_backward", gather_topk_fuse_backward);
  m.impl("gather_rows", gather_rows);
  m.impl("gather_rows_backward", gather_rows_backward);
  m.impl("scatter_back", scatter_back);
  m.impl("scatter_back_backward", scatter_back_backward);
}

}  // namespace skipvit::binding
