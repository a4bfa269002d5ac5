// SPDX-License-Identifier: Apache-2.0
// Runs the kernels on the CPU model: the launch functions that CANN would generate, and a C
// interface for Python over the same host code that the torch_npu binding uses.
#include <memory>

#include "../../ascend_ops/host/launches.h"
#include "../../ascend_ops/host/operators.h"
#include "kernel_operator.h"

// The kernels, as CANN would compile them one by one.
#include "../../ascend_ops/kernels/cls_scores.cpp"
#include "../../ascend_ops/kernels/fuse_backward.cpp"
#include "../../ascend_ops/kernels/gather_rows.cpp"
#include "../../ascend_ops/kernels/gather_topk.cpp"
#include "../../ascend_ops/kernels/place_rows.cpp"
#include "../../ascend_ops/kernels/sum_rows.cpp"

namespace {

model::Launch current;                      // the memory of the call in progress
std::vector<std::vector<uint8_t>> written;  // by range: bytes written by any kernel of the call
std::string error;

struct KernelCount {
  const char* kernel;
  model::Count busiest;
  int64_t must_move;  // bytes that some core reads, and that some core writes, each once
  uint32_t cores;
};
std::vector<KernelCount> counts;  // of the call in progress

// One launch: every core in turn. What a core wrote is forbidden to read until the next launch.
template <class Kernel, class... Args>
uint32_t launch(const char* name, Kernel kernel, uint32_t cores, Args... args) {
  if (cores < 1 || cores > skipvit::kMaxCores) {
    error = std::string(name) + ": cores must be in [1, 32], got " + std::to_string(cores);
    return 1;
  }
  for (model::GmRange& range : current.ranges) {
    range.writer.assign(range.bytes, -1);
    range.touched.assign(range.bytes, 0);
  }
  current.busiest = {};
  for (uint32_t i = 0; i < cores; ++i) {
    model::core().reset(&current, i);
    try {
      kernel(args...);
      model::core().finish();
    } catch (const model::Fault& fault) {
      error = std::string(name) + ", core " + std::to_string(i) + ": " + fault.what();
      return 1;
    }
  }
  for (size_t r = 0; r < written.size(); ++r) {
    const model::GmRange& range = current.ranges[r];
    for (size_t i = 0; range.writable && i < range.bytes; ++i) {
      if (range.writer[i] >= 0 && ++written[r][i] > 1) {
        error = std::string(name) + ": a kernel before it wrote the same byte";
        return 1;
      }
    }
  }
  int64_t must_move = 0;
  for (const model::GmRange& range : current.ranges) {
    for (const uint8_t touched : range.touched) {
      must_move += (touched & 1) + (touched >> 1);
    }
  }
  counts.push_back({name, current.busiest, must_move, cores});
  return 0;
}

uint8_t* gm(void* data) { return static_cast<uint8_t*>(data); }

}  // namespace

extern "C" {

uint32_t aclrtlaunch_skipvit_gather_topk(uint32_t cores, void*, void* x, void* scores, void* tokens,
                                         void* index, uint64_t total, uint64_t per_core, uint32_t a,
                                         uint32_t b, uint32_t c, uint32_t d, uint32_t e, uint32_t f,
                                         uint32_t g, uint32_t h) {
  return launch("gather_topk", skipvit_gather_topk, cores, gm(x), gm(scores), gm(tokens), gm(index),
                total, per_core, a, b, c, d, e, f, g, h);
}

uint32_t aclrtlaunch_skipvit_gather_rows(uint32_t cores, void*, void* x, void* index, void* out,
                                         uint64_t total, uint64_t per_core, uint32_t a, uint32_t b,
                                         uint32_t c, uint32_t d) {
  return launch("gather_rows", skipvit_gather_rows, cores, gm(x), gm(index), gm(out), total,
                per_core, a, b, c, d);
}

uint32_t aclrtlaunch_skipvit_place_rows(uint32_t cores, void*, void* moved, void* base,
                                        void* update, void* index, void* out, void* taken,
                                        uint64_t total, uint64_t per_core, uint32_t a, uint32_t b,
                                        uint32_t c, uint32_t d, uint32_t e) {
  return launch("place_rows", skipvit_place_rows, cores, gm(moved), gm(base), gm(update), gm(index),
                gm(out), gm(taken), total, per_core, a, b, c, d, e);
}

uint32_t aclrtlaunch_skipvit_sum_rows(uint32_t cores, void*, void* x, void* scores, void* index,
                                      void* out, uint64_t total, uint64_t per_core, uint32_t a,
                                      uint32_t b, uint32_t c, uint32_t d, uint32_t e, uint32_t f,
                                      uint32_t g, uint32_t h, uint32_t i) {
  return launch("sum_rows", skipvit_sum_rows, cores, gm(x), gm(scores), gm(index), gm(out), total,
                per_core, a, b, c, d, e, f, g, h, i);
}

uint32_t aclrtlaunch_skipvit_fuse_backward(uint32_t cores, void*, void* grad, void* x, void* scores,
                                           void* index, void* grad_x, void* dots, uint64_t total,
                                           uint64_t per_core, uint32_t a, uint32_t b, uint32_t c,
                                           uint32_t d, uint32_t e, uint32_t f, uint32_t g,
                                           uint32_t h) {
  return launch("fuse_backward", skipvit_fuse_backward, cores, gm(grad), gm(x), gm(scores),
                gm(index), gm(grad_x), gm(dots), total, per_core, a, b, c, d, e, f, g, h);
}

uint32_t aclrtlaunch_skipvit_cls_scores(uint32_t cores, void*, void* q, void* k, void* out,
                                        uint64_t total, uint64_t per_core, uint64_t image,
                                        uint64_t head, uint32_t a, uint32_t b, uint32_t c,
                                        uint32_t d, uint32_t e, uint32_t f, uint32_t g,
                                        float scale) {
  return launch("cls_scores", skipvit_cls_scores, cores, gm(q), gm(k), gm(out), total, per_core,
                image, head, a, b, c, d, e, f, g, scale);
}

// Memory that the kernels may touch from now on, where a driver and not Python hands it out.
void skipvit_model_memory(void* base, int64_t bytes) {
  current.ranges.push_back({gm(base), static_cast<size_t>(bytes), true, {}, {}});
}

// ---------------------------------------------------------------- the interface for Python

struct PlainView {
  const char* name;
  void* data;
  const char* dtype;
  int32_t dim, absent;
  int64_t sizes[4], strides[4];
};

const char* skipvit_model_refuse_chip(const char* name) {
  return (error = skipvit::refuse_chip(name)).c_str();
}

const char* skipvit_model_error() { return error.c_str(); }

// A call of `op` on views and numbers, or null: *kind is then 1 for a TypeError, 2 for a
// ValueError.
skipvit::Call* skipvit_model_plan(const char* op, const PlainView* plain, const double* numbers,
                                  uint32_t cores, int* kind) {
  skipvit::View v[4];
  for (int i = 0; i < 4; ++i) {
    const PlainView& p = plain[i];
    v[i].absent = p.absent != 0 || p.name == nullptr;
    if (!v[i].absent) {
      v[i] = {p.name, p.data, p.dtype, {p.sizes, p.sizes + p.dim}, {p.strides, p.strides + p.dim}};
    }
  }
  const auto number = [&](int i) { return static_cast<int64_t>(numbers[i]); };
  const std::string name = op;
  try {
    return new skipvit::Call(
        name == "gather_topk" ? skipvit::gather_topk(v[0], v[1], number(0), number(1), false, cores)
        : name == "gather_topk_fuse"
            ? skipvit::gather_topk(v[0], v[1], number(0), number(1), true, cores)
        : name == "gather_topk_fuse_backward"
            ? skipvit::gather_topk_fuse_backward(v[0], v[1], v[2], v[3], cores)
        : name == "gather_rows" ? skipvit::gather_rows(v[0], v[1], cores)
        : name == "gather_rows_backward"
            ? skipvit::gather_rows_backward(v[0], v[1], number(0), cores)
        : name == "scatter_back" ? skipvit::scatter_back(v[0], v[1], v[2], v[3], cores)
        : name == "scatter_back_backward"
            ? skipvit::scatter_back_backward(v[0], v[1], number(0) != 0, cores)
            : skipvit::cls_scores(v[0], v[1], numbers[0], number(1), cores));
  } catch (const skipvit::BadArgument& bad) {
    error = bad.message;
    *kind = bad.is_type ? 1 : 2;
    return nullptr;
  }
}

int skipvit_model_outputs(const skipvit::Call* call) {
  return static_cast<int>(call->outputs.size());
}

// The shape of output i and the elements to allocate; returns its number of dimensions.
int skipvit_model_output(const skipvit::Call* call, int i, int64_t* sizes, int64_t* storage,
                         const char** dtype) {
  const skipvit::Output& output = call->outputs[i];
  std::copy(output.sizes.begin(), output.sizes.end(), sizes);
  *storage = output.storage;
  *dtype = output.dtype.c_str();
  return static_cast<int>(output.sizes.size());
}

uint64_t skipvit_model_ub_bytes(const skipvit::Call* call) { return call->ub_bytes; }

// Every fixed cost times `factor`; those of bytes and of repeats stay.
void skipvit_model_scale_costs(double factor) {
  model::cost = {};
  for (double* fixed :
       {&model::cost.scalar, &model::cost.issue, &model::cost.vector, &model::cost.barrier,
        &model::cost.flag, &model::cost.transfer, &model::cost.latency}) {
    *fixed *= factor;
  }
}

// The i-th kernel of the last call: its name, or null; cycles, instructions, scalar accesses,
// vector instructions, DMAs and bytes of its busiest core, bytes that must move, cores.
const char* skipvit_model_count(int i, double* out) {
  if (i >= static_cast<int>(counts.size())) {
    return nullptr;
  }
  const KernelCount& c = counts[i];
  const double values[] = {c.busiest.cycles,
                           static_cast<double>(c.busiest.instructions),
                           static_cast<double>(c.busiest.scalars),
                           static_cast<double>(c.busiest.vectors),
                           static_cast<double>(c.busiest.transfers),
                           static_cast<double>(c.busiest.bytes),
                           static_cast<double>(c.must_move),
                           static_cast<double>(c.cores)};
  std::copy(std::begin(values), std::end(values), out);
  return c.kernel;
}

// Runs and frees the call. `memory` and `bytes`: inputs, then outputs; the kernels may
// touch nothing else. `must[i]` bytes of output i must have been written. 0, or
// skipvit_model_error.
int skipvit_model_launch(skipvit::Call* owned, void** memory, const int64_t* bytes, int inputs,
                         const int64_t* must, int64_t* stats) {
  const std::unique_ptr<skipvit::Call> call(owned);
  const int outputs = static_cast<int>(call->outputs.size());
  current = model::Launch{};
  counts.clear();
  for (int i = 0; i < inputs + outputs; ++i) {
    current.ranges.push_back(
        {static_cast<uint8_t*>(memory[i]), static_cast<size_t>(bytes[i]), i >= inputs, {}, {}});
  }
  written.assign(current.ranges.size(), {});
  for (size_t r = 0; r < written.size(); ++r) {
    written[r].assign(current.ranges[r].bytes, 0);
  }
  const std::vector<void*> results(memory + inputs, memory + inputs + outputs);
  if (call->launch(results, nullptr) != 0) {
    return 1;
  }
  for (int i = 0; i < outputs; ++i) {
    for (int64_t b = 0; b < must[i]; ++b) {
      if (written[inputs + i][b] == 0) {
        error =
            "byte " + std::to_string(b) + " of output " + std::to_string(i) + " was never written";
        return 1;
      }
    }
  }
  stats[0] = static_cast<int64_t>(current.over_reads);
  stats[1] = static_cast<int64_t>(current.nonfinite);
  stats[2] = static_cast<int64_t>(current.peak_ub);
  return 0;
}

}  // extern "C"
