// SPDX-License-Identifier: Apache-2.0
// The model of the core must object to each thing that it says it objects to, and only to that: one
// small kernel a rule, next to the same kernel without the fault.
#include <cstdio>
#include <cstdlib>

#include "kernel_operator.h"

using namespace AscendC;

namespace {

alignas(64) float input[256], output[256];
model::Launch memory;
int failures = 0;

template <class Kernel>
std::string fault_of(Kernel kernel, int cores = 1) {
  memory = model::Launch{};
  memory.ranges.push_back({reinterpret_cast<uint8_t*>(input), sizeof(input), false, {}, {}});
  memory.ranges.push_back({reinterpret_cast<uint8_t*>(output), sizeof(output), true, {}, {}});
  for (model::GmRange& range : memory.ranges) {
    range.writer.assign(range.bytes, -1);
    range.touched.assign(range.bytes, 0);
  }
  try {
    for (int i = 0; i < cores; ++i) {
      model::core().reset(&memory, i);
      kernel();
      model::core().finish();
    }
  } catch (const model::Fault& fault) {
    return fault.what();
  }
  return "";
}

template <class Kernel>
void expect(const char* fault, Kernel kernel, int cores = 1) {
  const std::string got = fault_of(kernel, cores);
  const bool right = *fault == '\0' ? got.empty() : got.find(fault) != std::string::npos;
  if (!right) {
    ++failures;
    std::printf("expected '%s', got '%s'\n", fault, got.c_str());
  }
}

// Input to output through the vector unit; `Fault` leaves one thing out.
enum Omit { kNothing, kLoadFlag, kBarrier, kStoreFlag, kScalarFlag, kFree };

template <Omit omitted>
void chain() {
  TPipe pipe;
  TBuf<TPosition::VECIN> in;
  TBuf<TPosition::VECOUT> out;
  pipe.InitBuffer(in, 256);
  pipe.InitBuffer(out, 256);
  GlobalTensor<float> from, to;
  from.SetGlobalBuffer(input);
  to.SetGlobalBuffer(output);
  DataCopy(in.Get<float>(), from, 64);
  if (omitted != kLoadFlag) {
    SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
    WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
  }
  Muls(out.Get<float>(), in.Get<float>(), 2.0f, 64);
  if (omitted != kBarrier) {
    PipeBarrier<PIPE_V>();
  }
  Adds(out.Get<float>(), out.Get<float>(), 1.0f, 64);
  if (omitted != kScalarFlag) {
    SetFlag<HardEvent::V_S>(EVENT_ID1);
    WaitFlag<HardEvent::V_S>(EVENT_ID1);
  }
  out.Get<float>().GetValue(3);
  if (omitted != kStoreFlag) {
    SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
    WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
  }
  DataCopy(to, out.Get<float>(), 64);
}

TPipe pipe;

template <TPosition position = TPosition::VECCALC>
LocalTensor<float> buffer(uint32_t bytes = 1024) {
  TBuf<position> buf;
  pipe.InitBuffer(buf, bytes);
  return buf.template Get<float>();
}

LocalTensor<float> filled(uint32_t count = 64) {
  const LocalTensor<float> tensor = buffer();
  Duplicate(tensor, 1.0f, static_cast<int32_t>(count));
  PipeBarrier<PIPE_V>();
  return tensor;
}

GlobalTensor<float> global(float* data) {
  GlobalTensor<float> tensor;
  tensor.SetGlobalBuffer(data);
  return tensor;
}

}  // namespace

int main() {
  // ------------------------------------------------------------ order between the pipes
  expect("", chain<kNothing>);
  expect("the vector pipe does not wait for the MTE2 pipe", chain<kLoadFlag>);
  expect("the vector pipe does not wait for the vector pipe", chain<kBarrier>);
  expect("the MTE3 pipe does not wait for the vector pipe", chain<kStoreFlag>);
  expect("the scalar pipe does not wait for the vector pipe", chain<kScalarFlag>);
  expect("write after read", [] {
    const LocalTensor<float> a = filled(), b = buffer();
    PipeBarrier<PIPE_ALL>();
    Muls(b, a, 1.0f, 64);
    a.SetValue(0, 1.0f);
  });
  expect("the vector pipe does not wait for the scalar pipe", [] {
    const LocalTensor<float> a = buffer(), b = buffer();
    for (uint32_t i = 0; i < 64; ++i) {
      a.SetValue(i, 1.0f);
    }
    Muls(b, a, 1.0f, 64);
  });

  expect("write after read", [] {  // in place: its own read must not hide the one before it
    const LocalTensor<float> a = filled(), b = filled(), c = buffer();
    Add(c, a, b, 64);
    Muls(a, a, 2.0f, 64);
  });
  expect("", [] {
    const LocalTensor<float> a = filled(), b = filled(), c = buffer();
    Add(c, a, b, 64);
    PipeBarrier<PIPE_V>();
    Muls(a, a, 2.0f, 64);
  });

  // -------------------------------------------------------------------------- flags
  expect("nobody set", [] { WaitFlag<HardEvent::V_S>(EVENT_ID0); });
  expect("never waited for", [] { SetFlag<HardEvent::V_S>(EVENT_ID0); });
  expect("set twice", [] {
    SetFlag<HardEvent::V_S>(EVENT_ID0);
    SetFlag<HardEvent::V_S>(EVENT_ID0);
  });
  expect("event id must be in [0, 4), got 4", [] { SetFlag<HardEvent::V_S>(4); });
  expect("more than four events", [] {
    for (int i = 0; i < 5; ++i) {
      SetFlag<HardEvent::V_S>(pipe.FetchEventID(HardEvent::V_S));
    }
  });

  // -------------------------------------------------------------------------- queues
  expect("", [] {
    TQue<TPosition::VECIN, 2> queue;
    pipe.InitBuffer(queue, 2, 256);
    queue.EnQue(queue.AllocTensor<float>());
    queue.FreeTensor(queue.DeQue<float>());
  });
  expect("were not freed", [] {
    TQue<TPosition::VECIN, 2> queue;
    pipe.InitBuffer(queue, 2, 256);
    queue.EnQue(queue.AllocTensor<float>());
    queue.DeQue<float>();
  });
  expect("empty queue", [] {
    TQue<TPosition::VECIN, 2> queue;
    pipe.InitBuffer(queue, 2, 256);
    queue.DeQue<float>();
  });
  expect("are in use", [] {
    TQue<TPosition::VECIN, 2> queue;
    pipe.InitBuffer(queue, 1, 256);
    queue.AllocTensor<float>();
    queue.AllocTensor<float>();
  });
  expect("not ready for it", [] {
    TQue<TPosition::VECIN, 2> queue;
    pipe.InitBuffer(queue, 2, 256);
    queue.FreeTensor(queue.AllocTensor<float>());
  });
  expect("depth of 1", [] {
    TQue<TPosition::VECIN, 1> queue;
    pipe.InitBuffer(queue, 2, 256);
    queue.EnQue(queue.AllocTensor<float>());
    queue.EnQue(queue.AllocTensor<float>());
  });
  expect("more than four tensors", [] {
    TQue<TPosition::VECIN, 5> queue;
    pipe.InitBuffer(queue, 5, 256);
    for (int i = 0; i < 5; ++i) {
      queue.AllocTensor<float>();
    }
  });
  expect("nobody wrote", [] {  // what a queue's buffer held before it was freed is gone
    TQue<TPosition::VECIN, 1> queue;
    pipe.InitBuffer(queue, 1, 256);
    LocalTensor<float> tensor = queue.AllocTensor<float>();
    DataCopy(tensor, global(input), 64);
    queue.EnQue(tensor);
    queue.FreeTensor(queue.DeQue<float>());
    PipeBarrier<PIPE_ALL>();
    tensor = queue.AllocTensor<float>();
    PipeBarrier<PIPE_ALL>();
    tensor.GetValue(0);
  });

  // ------------------------------------------------------------------- buffers and lengths
  expect("whole number of 32-byte blocks", [] { buffer(1000); });
  expect("253952 bytes", [] { buffer(248 * 1024 + 32); });
  expect("", [] { buffer(248 * 1024); });
  expect("more than 64 buffers", [] {
    for (int i = 0; i < 65; ++i) {
      buffer(32);
    }
  });
  expect("whole 32-byte blocks, got 388",
         [] { DataCopy(buffer<TPosition::VECIN>(), global(input), 97); });
  expect("multiple of 32 bytes, got byte 4", [] { Duplicate(buffer()[1], 0.0f, 8); });
  expect("leaves", [] { Duplicate(buffer(32), 0.0f, 9); });
  expect("outside a buffer of 8", [] { buffer(32).SetValue(8, 0.0f); });
  expect("count must be positive", [] { Duplicate(buffer(), 0.0f, 0); });
  expect("mask must be in [1, 64]",
         [] { Add(filled(), filled(), filled(), 65, 1, {1, 1, 1, 8, 8, 8}); });
  expect("repeats must be in [1, 255]",
         [] { Add(filled(), filled(), filled(), 64, 0, {1, 1, 1, 8, 8, 8}); });
  expect("must not be 0", [] { Add(filled(), filled(), filled(), 8, 2, {1, 1, 1, 0, 1, 1}); });
  expect("overwrites what a later repeat reads", [] {
    const LocalTensor<float> a = filled(256);
    Add(a[8], a, a, 8, 2, {1, 1, 1, 1, 1, 1});
  });
  expect("whole repeats of 256 bytes",
         [] { Compare(buffer().ReinterpretCast<uint8_t>(), filled(), filled(), CMPMODE::GT, 60); });
  expect("goes to a VECIN buffer", [] { DataCopy(buffer(), global(input), 64); });

  // ------------------------------------------------------------------- what nobody wrote
  expect("which nobody wrote", [] { buffer().GetValue(0); });
  expect("which nobody wrote", [] {  // one undefined operand makes the result undefined
    const LocalTensor<float> sum = buffer();
    Add(sum, filled(), buffer(), 8);
    PipeBarrier<PIPE_ALL>();
    sum.GetValue(0);
  });
  expect("that nobody computed", [] { DataCopy(global(output), buffer<TPosition::VECOUT>(), 8); });

  // ------------------------------------------------------------------------ global memory
  const auto store = [](uint64_t first, uint32_t count) {
    const LocalTensor<float> tensor = buffer<TPosition::VECOUT>();
    Duplicate(tensor, 1.0f, 256);
    PipeBarrier<PIPE_ALL>();
    DataCopy(global(output)[first], tensor, count);
  };
  expect("", [&] { store(0, 256); });
  expect("past its tensor", [&] { store(8, 256); });
  expect("written twice, by cores 0 and 1", [&] { store(8 * core().block, 16); }, 2);
  expect("", [&] { store(8 * core().block, 8); }, 2);
  expect("", [&] {
    store(0, 16);
    store(3, 8);
  });
  expect("written twice, by cores 0 and 0", [&] {
    const LocalTensor<float> tensor = buffer<TPosition::VECOUT>();
    Duplicate(tensor, 2.0f, 8);
    store(0, 16);
    DataCopy(global(output)[3], tensor, 8);
  });
  expect("wrote in this launch", [&] {
    store(0, 8);
    DataCopy(buffer<TPosition::VECIN>(), global(output), 8);
  });
  expect("into an input", [] {
    const LocalTensor<float> tensor = buffer<TPosition::VECOUT>();
    Duplicate(tensor, 1.0f, 8);
    PipeBarrier<PIPE_ALL>();
    DataCopy(global(input), tensor, 8);
  });
  expect("", [] { DataCopy(buffer<TPosition::VECIN>(), global(input)[255], 8); });  // 28 bytes over
  expect("outside every tensor",
         [] { DataCopy(buffer<TPosition::VECIN>(), global(input)[1 << 20], 8); });
  expect("past its tensor", [] { DataCopy(buffer<TPosition::VECIN>(), global(input)[248], 16); });

  // ------------------------------------------------------------------------------- half
  for (uint32_t bits = 0; bits < 0x7C00; ++bits) {
    const model::Half half{static_cast<uint16_t>(bits)};
    const float value = model::to_float(half),
                next = model::to_float({static_cast<uint16_t>(bits + 1)});
    const float middle = value + (next - value) / 2;
    const uint32_t even = bits + (bits & 1);
    if (model::to_half(value).bits != bits ||
        (bits < 0x7BFF && (model::to_half(middle).bits != even ||
                           model::to_half(std::nextafter(middle, 1e9f)).bits != bits + 1))) {
      ++failures;
      std::printf("half %04x does not round as IEEE says\n", bits);
      break;
    }
  }
  if (model::to_half(1e9f).bits != 0x7BFF || model::to_half(-1e9f).bits != 0xFBFF) {
    ++failures;
    std::printf("half does not saturate\n");
  }

  std::printf("%d failures\n", failures);
  return failures != 0;
}
