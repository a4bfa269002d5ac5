// SPDX-License-Identifier: Apache-2.0
// A functional model of one Ascend910A AI core, for g++: stands in for CANN's header of this name
// so that ascend_ops/kernels/*.cpp compile and run unchanged on any machine. Written from the
// public documentation; no line of CANN is in it.
//
// Only what the 910A documents is here, with the types it documents: anything else does not
// compile. What is here fails loudly (model::Fault) where the chip would fail silently:
//   - addresses and lengths that are not whole 32-byte blocks (hardware rounds them down),
//   - more than 248 KB of unified buffer, a buffer size that is no whole number of blocks,
//   - a queue used out of order, or beyond its depth; more than four events of one kind,
//   - reads of bytes nobody wrote, for a result, a branch or global memory,
//   - global memory: out of bounds, written twice (by two cores, or by one with another value),
//     read after being written,
//   - two pipes (scalar, vector, MTE2, MTE3), or two operations of one pipe, that touch the same 32
//     bytes without a flag, a queue or a barrier between them.
// Beside that it counts instructions and bytes and adds up guessed costs (Cost), for counts.py.
// Not modelled: the time anything really takes, rounding of Exp and Div beyond IEEE, bisheng's
// front end.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __aicore__
#define __global__
#define __gm__
#define GM_ADDR uint8_t*

namespace model {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Fault(text.str());
}

// IEEE half with the chip's saturation: no infinity comes out of a conversion.
struct Half {
  uint16_t bits;
};

inline float to_float(Half h) {
  const uint32_t sign = (h.bits & 0x8000u) << 16, exponent = (h.bits >> 10) & 31,
                 mantissa = h.bits & 1023u;
  uint32_t out;
  if (exponent == 31) {
    out = sign | 0x7F800000u | (mantissa << 13);
  } else if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  } else {
    out = sign | ((exponent + 112) << 23) | (mantissa << 13);
  }
  float value;
  std::memcpy(&value, &out, 4);
  return value;
}

inline Half to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) {
    return {sign};
  }
  if (magnitude >= 65520.0f) {
    return {static_cast<uint16_t>(sign | 0x7BFFu)};
  }
  if (magnitude < 0x1p-14f) {  // below the normal numbers: a multiple of 2**-24
    return {
        static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f)))};
  }
  const uint32_t rounded = (bits & 0x7FFFFFFFu) + 0xFFFu + ((bits >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13))};
}

enum Pipe : int { kS, kV, kMTE2, kMTE3, kPipes };
inline const char* const kPipeNames[] = {"scalar", "vector", "MTE2", "MTE3"};

constexpr size_t kUbSize = 256 * 1024;   // of the chip
constexpr size_t kUbLimit = 248 * 1024;  // the top 8 KB belong to the framework
constexpr size_t kUnit = 32;
constexpr int kEventIds = 4;
constexpr int kMaxBuffers = 64;
constexpr int kMaxAllocated = 4;  // tensors of queues at one position

struct GmRange {
  uint8_t* base;
  size_t bytes;
  bool writable;
  std::vector<int16_t> writer;   // core that wrote each byte, -1 for none
  std::vector<uint8_t> touched;  // 1: read, 2: written, by any core
};

// What things take, in cycles of the core. Guesses, to the order of magnitude, but for the rate of
// memory: 32 bytes a cycle and core is CANN's own cost model of the 910A.
struct Cost {
  double scalar = 10;    // an access of the scalar unit, with the arithmetic and branch around it
  double issue = 4;      // of the scalar unit, for any other instruction
  double vector = 10;    // before the first repeat; then 1 a repeat of 256 bytes,
  double slow = 4;       // or this one for Exp, Div and a sum across lanes
  double barrier = 10;   // until the vector pipe is empty
  double flag = 20;      // until the other pipe has seen it
  double transfer = 30;  // before the first byte of a DMA; the next may be under way by then
  double latency = 200;  // until what a DMA moved is there
  double memory = 1 / 32.0;  // a byte, of what loads and stores share
};
inline Cost cost;

struct Count {
  int64_t instructions = 0, scalars = 0, vectors = 0, transfers = 0, bytes = 0;
  double cycles = 0;
};

// What global memory a launch may touch, and what it did with it.
struct Launch {
  std::vector<GmRange> ranges;
  size_t over_reads = 0;  // bytes read past an end, less than one block each time
  size_t nonfinite = 0;   // infinities and NaNs that arithmetic met: undefined on this chip
  size_t peak_ub = 0;
  Count busiest;  // of the core that takes longest

  GmRange& find(const void* address, size_t bytes, const char* what) {
    const uint8_t* first = static_cast<const uint8_t*>(address);
    for (GmRange& range : ranges) {
      if (first >= range.base && first < range.base + range.bytes) {
        return range;
      }
    }
    fail(what, " of ", bytes, " bytes of global memory outside every tensor");
  }
};

// Everything a core knows. The order of events is a vector clock: known[p][q] is how many
// operations of pipe q have finished for certain before pipe p starts its next one.
struct Core {
  struct Unit {
    int write_pipe = kS;
    uint32_t write = 0;
    uint32_t read[kPipes] = {};
    // The read before an operation's own: one that reads and writes the unit must still wait for
    // it.
    uint32_t read_before[kPipes] = {};
  };
  struct Flag {
    bool set = false;
    uint32_t known[kPipes] = {};
    double time = 0;
  };

  Launch* launch = nullptr;
  int64_t block = 0;
  alignas(64) uint8_t ub[kUbSize];
  uint8_t defined[kUbSize];
  Unit units[kUbSize / kUnit];
  uint32_t issued[kPipes];
  uint32_t known[kPipes][kPipes];
  Flag flags[kPipes][kPipes][kEventIds];
  size_t ub_used;
  int buffers;
  int open_tensors;  // allocated from a queue and not freed
  int allocated[3];  // the same, by position
  Count count;
  double clock[kPipes];  // when each pipe has done all that it was given
  double memory;         // and the core's way to global memory

  void reset(Launch* to, int64_t index) {
    launch = to;
    block = index;
    std::memset(ub, 0xA5, sizeof(ub));
    std::memset(defined, 0, sizeof(defined));
    std::fill(std::begin(units), std::end(units), Unit{});
    std::memset(issued, 0, sizeof(issued));
    std::memset(known, 0, sizeof(known));
    for (auto& from : flags) {
      for (auto& pair : from) {
        std::fill(std::begin(pair), std::end(pair), Flag{});
      }
    }
    ub_used = 0;
    buffers = open_tensors = 0;
    std::fill(std::begin(allocated), std::end(allocated), 0);
    count = {};
    std::fill(std::begin(clock), std::end(clock), 0.0);
    memory = 0;
  }

  void finish() {
    launch->peak_ub = std::max(launch->peak_ub, ub_used);
    count.cycles = *std::max_element(std::begin(clock), std::end(clock));
    if (count.cycles > launch->busiest.cycles) {
      launch->busiest = count;
    }
    if (open_tensors != 0) {
      fail(open_tensors, " tensors of queues were not freed");
    }
    for (int p = 0; p < kPipes; ++p) {
      for (int q = 0; q < kPipes; ++q) {
        for (int id = 0; id < kEventIds; ++id) {
          if (flags[p][q][id].set) {
            fail("a flag ", kPipeNames[p], " -> ", kPipeNames[q], " was set and never waited for");
          }
        }
      }
    }
  }

  uint32_t issue(Pipe pipe) {
    const uint32_t number = ++issued[pipe];
    if (pipe == kS) {
      known[kS][kS] = number;  // the scalar unit runs in order
      ++count.scalars;
      clock[kS] += cost.scalar;
    }
    return number;
  }

  // The scalar unit hands an instruction to a pipe, which starts when it is free.
  double hand_over(Pipe pipe) {
    ++count.instructions;
    clock[kS] += cost.issue;
    return clock[pipe] = std::max(clock[pipe], clock[kS]);
  }

  void compute(size_t repeats, bool is_slow) {
    ++count.vectors;
    hand_over(kV);
    clock[kV] += cost.vector + static_cast<double>(repeats) * (is_slow ? cost.slow : 1);
  }

  void transfer(Pipe pipe, size_t bytes) {
    ++count.transfers;
    count.bytes += static_cast<int64_t>(bytes);
    memory = std::max(memory, hand_over(pipe) + cost.transfer) +
             static_cast<double>(bytes) * cost.memory;
    clock[pipe] = memory;
  }

  void before(Pipe pipe, int other, uint32_t earlier, size_t address, const char* hazard) {
    if (earlier == 0 || known[pipe][other] >= earlier) {
      return;
    }
    fail("race (", hazard, "): the ", kPipeNames[pipe], " pipe does not wait for the ",
         kPipeNames[other], " pipe at byte ", address, " of the unified buffer");
  }

  void read(Pipe pipe, uint32_t number, size_t address, size_t bytes) {
    for (size_t u = address / kUnit; u <= (address + bytes - 1) / kUnit; ++u) {
      Unit& unit = units[u];
      if (unit.write_pipe != pipe || unit.write != number) {
        before(pipe, unit.write_pipe, unit.write, u * kUnit, "read after write");
      }
      if (unit.read[pipe] != number) {
        unit.read_before[pipe] = unit.read[pipe];
        unit.read[pipe] = number;
      }
    }
  }

  void write(Pipe pipe, uint32_t number, size_t address, size_t bytes) {
    for (size_t u = address / kUnit; u <= (address + bytes - 1) / kUnit; ++u) {
      Unit& unit = units[u];
      if (unit.write_pipe != pipe || unit.write != number) {
        before(pipe, unit.write_pipe, unit.write, u * kUnit, "write after write");
      }
      for (int p = 0; p < kPipes; ++p) {
        const bool own = p == pipe && unit.read[p] == number;
        before(pipe, p, own ? unit.read_before[p] : unit.read[p], u * kUnit, "write after read");
      }
      unit.write_pipe = pipe;
      unit.write = number;
    }
  }

  void set(Pipe from, Pipe to, int id) {
    if (id < 0 || id >= kEventIds) {
      fail("event id must be in [0, 4), got ", id);
    }
    Flag& flag = flags[from][to][id];
    if (flag.set) {
      fail("flag ", kPipeNames[from], " -> ", kPipeNames[to], " ", id, " is set twice");
    }
    flag.set = true;
    std::copy(std::begin(known[from]), std::end(known[from]), std::begin(flag.known));
    flag.known[from] = issued[from];
    flag.time = hand_over(from) + (from == kMTE2 || from == kMTE3 ? cost.latency : 0);
  }

  void wait(Pipe from, Pipe to, int id) {
    if (id < 0 || id >= kEventIds || !flags[from][to][id].set) {
      fail("waits for the flag ", kPipeNames[from], " -> ", kPipeNames[to], " ", id,
           " that nobody set: the core hangs");
    }
    Flag& flag = flags[from][to][id];
    flag.set = false;
    for (int p = 0; p < kPipes; ++p) {
      known[to][p] = std::max(known[to][p], flag.known[p]);
    }
    clock[to] = std::max(hand_over(to), flag.time + cost.flag);
  }

  int free_event(Pipe from, Pipe to) {
    for (int id = 0; id < kEventIds; ++id) {
      if (!flags[from][to][id].set) {
        return id;
      }
    }
    fail("more than four events ", kPipeNames[from], " -> ", kPipeNames[to], " at a time");
  }

  void barrier(int pipe) {
    if (pipe == kPipes) {
      hand_over(kS);
      std::fill(std::begin(clock), std::end(clock),
                *std::max_element(std::begin(clock), std::end(clock)) + cost.barrier);
    } else {
      hand_over(static_cast<Pipe>(pipe));
      clock[pipe] += cost.barrier;
    }
    for (int p = 0; p < kPipes; ++p) {
      for (int q = 0; q < kPipes; ++q) {
        if (pipe == kPipes || (p == pipe && q == pipe)) {
          known[p][q] = issued[q];
        }
      }
    }
  }

  size_t allocate(size_t bytes) {
    if (bytes == 0 || bytes % kUnit != 0) {
      fail("a buffer must be a whole number of 32-byte blocks, got ", bytes, " bytes");
    }
    if (++buffers > kMaxBuffers) {
      fail("more than ", kMaxBuffers, " buffers");
    }
    const size_t address = ub_used;
    ub_used += bytes;
    if (ub_used > kUbLimit) {
      fail("the unified buffer is ", kUbLimit, " bytes, the kernel asks for ", ub_used);
    }
    return address;
  }
};

inline Core& core() {
  static Core the_core;
  return the_core;
}

}  // namespace model

using half = model::Half;

namespace AscendC {

using model::core;
using model::fail;

enum class TPosition { GM, VECIN, VECOUT, VECCALC };
enum class CMPMODE { LT, GT, EQ, LE, GE, NE };
enum class RoundMode { CAST_NONE };
enum pipe_t {
  PIPE_V = model::kV,
  PIPE_MTE2 = model::kMTE2,
  PIPE_MTE3 = model::kMTE3,
  PIPE_ALL = model::kPipes
};
using TEventID = int32_t;
enum event_t : int32_t { EVENT_ID0, EVENT_ID1, EVENT_ID2, EVENT_ID3 };
enum class HardEvent {
  MTE2_V,
  V_MTE2,
  MTE3_V,
  V_MTE3,
  MTE2_MTE3,
  MTE3_MTE2,
  V_S,
  S_V,
  MTE2_S,
  S_MTE2,
  MTE3_S,
  S_MTE3
};

namespace detail {

using model::Half;
using model::kMTE2;
using model::kMTE3;
using model::kS;
using model::kUnit;
using model::kV;
using model::Pipe;

struct Ends {
  Pipe from, to;
};

constexpr Ends ends(HardEvent event) {
  switch (event) {
    case HardEvent::MTE2_V:
      return {kMTE2, kV};
    case HardEvent::V_MTE2:
      return {kV, kMTE2};
    case HardEvent::MTE3_V:
      return {kMTE3, kV};
    case HardEvent::V_MTE3:
      return {kV, kMTE3};
    case HardEvent::MTE2_MTE3:
      return {kMTE2, kMTE3};
    case HardEvent::MTE3_MTE2:
      return {kMTE3, kMTE2};
    case HardEvent::V_S:
      return {kV, kS};
    case HardEvent::S_V:
      return {kS, kV};
    case HardEvent::MTE2_S:
      return {kMTE2, kS};
    case HardEvent::S_MTE2:
      return {kS, kMTE2};
    case HardEvent::MTE3_S:
      return {kMTE3, kS};
    default:
      return {kS, kMTE3};
  }
}

template <class T, class... Allowed>
constexpr bool one_of = (std::is_same_v<T, Allowed> || ...);

template <class T>
constexpr bool copyable = one_of<T, int8_t, uint8_t, int16_t, uint16_t, half, int32_t, uint32_t,
                                 float, int64_t, uint64_t, double>;

}  // namespace detail

template <typename T>
class GlobalTensor {
 public:
  static_assert(detail::copyable<T>, "the 910A moves no such type");
  void SetGlobalBuffer(T* buffer) { data_ = buffer; }
  GlobalTensor operator[](uint64_t offset) const {
    GlobalTensor moved;
    moved.data_ = data_ + offset;
    return moved;
  }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

template <typename T>
class LocalTensor {
 public:
  LocalTensor() = default;
  LocalTensor(size_t address, size_t bytes, TPosition position)
      : address_(address), bytes_(bytes), position_(position) {}

  LocalTensor operator[](uint32_t offset) const {
    if (offset * sizeof(T) > bytes_) {
      fail("an offset of ", offset, " elements leaves a buffer of ", bytes_, " bytes");
    }
    return {address_ + offset * sizeof(T), bytes_ - offset * sizeof(T), position_};
  }

  template <typename U>
  LocalTensor<U> ReinterpretCast() const {
    return {address_, bytes_, position_};
  }

  T GetValue(uint32_t index) const {
    const size_t at = scalar_address(index);
    core().read(model::kS, core().issue(model::kS), at, sizeof(T));
    for (size_t i = 0; i < sizeof(T); ++i) {
      if (!core().defined[at + i]) {
        fail("the scalar unit reads byte ", at + i, " of the unified buffer, which nobody wrote");
      }
    }
    T value;
    std::memcpy(&value, core().ub + at, sizeof(T));
    return value;
  }

  void SetValue(uint32_t index, T value) const {
    const size_t at = scalar_address(index);
    core().write(model::kS, core().issue(model::kS), at, sizeof(T));
    std::memset(core().defined + at, 1, sizeof(T));
    std::memcpy(core().ub + at, &value, sizeof(T));
  }

  uint32_t GetSize() const { return static_cast<uint32_t>(bytes_ / sizeof(T)); }
  size_t address() const { return address_; }
  size_t bytes() const { return bytes_; }
  TPosition position() const { return position_; }

 private:
  size_t scalar_address(uint32_t index) const {
    if ((index + size_t{1}) * sizeof(T) > bytes_) {
      fail("element ", index, " is outside a buffer of ", bytes_ / sizeof(T));
    }
    return address_ + index * sizeof(T);
  }

  size_t address_ = 0, bytes_ = 0;
  TPosition position_ = TPosition::VECCALC;
};

// ------------------------------------------------------------------------------- events

template <HardEvent event>
void SetFlag(int32_t id) {
  core().set(detail::ends(event).from, detail::ends(event).to, id);
}

template <HardEvent event>
void WaitFlag(int32_t id) {
  core().wait(detail::ends(event).from, detail::ends(event).to, id);
}

template <pipe_t pipe>
void PipeBarrier() {
  core().barrier(pipe);
}

inline int64_t GetBlockIdx() { return core().block; }

// ------------------------------------------------------------------- buffers and queues

template <TPosition position>
class TBuf {
 public:
  template <typename T>
  LocalTensor<T> Get() {
    if (bytes_ == 0) {
      fail("a buffer is used before InitBuffer");
    }
    return {address_, bytes_, position};
  }

 private:
  friend class TPipe;
  size_t address_ = 0, bytes_ = 0;
};

// A ring of buffers between the pipe that fills them and the one that empties them.
template <TPosition source, TPosition destination, int depth>
class TQueBind {
  static constexpr model::Pipe kProducer = source == TPosition::VECIN ? model::kMTE2 : model::kV;
  static constexpr model::Pipe kConsumer =
      destination == TPosition::VECOUT ? model::kMTE3 : model::kV;
  enum State { kFree, kAllocated, kQueued, kTaken };
  struct Slot {
    State state = kFree;
    int event = -1;  // of the flag that the next step waits for; -1 on the first round
  };

 public:
  template <typename T>
  LocalTensor<T> AllocTensor() {
    for (size_t i = 0; i < slots_.size(); ++i) {
      Slot& slot = slots_[(next_ + i) % slots_.size()];
      if (slot.state == kFree) {
        if (slot.event >= 0) {
          core().wait(kConsumer, kProducer, slot.event);
        }
        next_ = (next_ + i + 1) % slots_.size();
        slot.state = kAllocated;
        ++core().open_tensors;
        if (++core().allocated[static_cast<int>(source) - 1] > model::kMaxAllocated) {
          fail("more than four tensors allocated from queues of one position");
        }
        return tensor<T>(&slot - slots_.data(), source);
      }
    }
    fail("AllocTensor: all ", slots_.size(), " buffers of the queue are in use");
  }

  template <typename T>
  bool EnQue(const LocalTensor<T>& tensor) {
    Slot& slot = find(tensor, kAllocated, "EnQue");
    if (queued_.size() >= depth) {
      fail("EnQue beyond the queue's depth of ", depth);
    }
    slot.event = core().free_event(kProducer, kConsumer);
    core().set(kProducer, kConsumer, slot.event);
    slot.state = kQueued;
    queued_.push_back(&slot - slots_.data());
    return true;
  }

  template <typename T>
  LocalTensor<T> DeQue() {
    if (queued_.empty()) {
      fail("DeQue from an empty queue");
    }
    const size_t index = queued_.front();
    queued_.erase(queued_.begin());
    core().wait(kProducer, kConsumer, slots_[index].event);
    slots_[index].state = kTaken;
    return tensor<T>(index, destination);
  }

  template <typename T>
  void FreeTensor(const LocalTensor<T>& tensor) {
    Slot& slot = find(tensor, kTaken, "FreeTensor");
    slot.event = core().free_event(kConsumer, kProducer);
    core().set(kConsumer, kProducer, slot.event);
    slot.state = kFree;
    --core().open_tensors;
    --core().allocated[static_cast<int>(source) - 1];
    forget_content(&slot - slots_.data());
  }

  // The framework waits for the last flags when the pipe is destroyed.
  ~TQueBind() {
    for (Slot& slot : slots_) {
      if (slot.state == kFree && slot.event >= 0) {
        core().flags[kConsumer][kProducer][slot.event].set = false;
      }
    }
  }

 private:
  friend class TPipe;

  template <typename T>
  LocalTensor<T> tensor(size_t index, TPosition position) const {
    return {address_ + index * bytes_, bytes_, position};
  }

  template <typename T>
  Slot& find(const LocalTensor<T>& tensor, State expected, const char* what) {
    const size_t index = (tensor.address() - address_) / std::max<size_t>(1, bytes_);
    if (tensor.address() < address_ || index >= slots_.size() ||
        tensor.address() != address_ + index * bytes_ || slots_[index].state != expected) {
      fail(what, " of a tensor that is not ready for it");
    }
    return slots_[index];
  }

  // A freed buffer may hold anything when it is next allocated.
  void forget_content(size_t index) {
    std::memset(core().defined + address_ + index * bytes_, 0, bytes_);
  }

  size_t address_ = 0, bytes_ = 0, next_ = 0;
  std::vector<Slot> slots_;
  std::vector<size_t> queued_;
};

template <TPosition position, int depth>
using TQue = TQueBind<position == TPosition::VECIN ? TPosition::VECIN : TPosition::VECCALC,
                      position == TPosition::VECIN ? TPosition::VECCALC : TPosition::VECOUT, depth>;

class TPipe {
 public:
  template <TPosition source, TPosition destination, int depth>
  bool InitBuffer(TQueBind<source, destination, depth>& queue, uint8_t number, uint32_t bytes) {
    queue.address_ = core().ub_used;
    for (int i = 0; i < number; ++i) {
      core().allocate(bytes);
    }
    queue.bytes_ = bytes;
    queue.slots_.resize(number);
    return true;
  }

  template <TPosition position>
  bool InitBuffer(TBuf<position>& buffer, uint32_t bytes) {
    buffer.address_ = core().allocate(bytes);
    buffer.bytes_ = bytes;
    return true;
  }

  TEventID FetchEventID(HardEvent event) {
    return core().free_event(detail::ends(event).from, detail::ends(event).to);
  }
};

// ---------------------------------------------------------------------------- data moves

struct DataCopyParams {
  uint16_t blockCount = 1, blockLen = 0, srcGap = 0,
           dstGap = 0;  // the last three in 32-byte blocks
};

namespace detail {

inline void check_aligned(size_t address, const char* what) {
  if (address % kUnit != 0) {
    fail(what, " must start at a multiple of 32 bytes, got byte ", address);
  }
}

template <typename T>
void check_span(const LocalTensor<T>& tensor, size_t bytes, const char* what) {
  check_aligned(tensor.address(), what);
  if (bytes > tensor.bytes()) {
    fail(what, " of ", bytes, " bytes leaves a buffer of ", tensor.bytes());
  }
}

inline void check_blocks(size_t bytes, const char* what) {
  if (bytes == 0 || bytes % kUnit != 0) {
    fail(what, " must move whole 32-byte blocks, got ", bytes, " bytes");
  }
}

// Reads past the end of a tensor stay inside its allocation up to one block: torch_npu pads by 32.
inline void load(size_t to, const uint8_t* from, size_t bytes, uint32_t number) {
  model::GmRange& range = core().launch->find(from, bytes, "a read");
  const size_t offset = from - range.base;
  const size_t inside = std::min(bytes, range.bytes - offset);
  if (bytes - inside >= kUnit) {
    fail("a read of ", bytes, " bytes ends ", bytes - inside, " bytes past its tensor");
  }
  core().launch->over_reads += bytes - inside;
  for (size_t i = 0; i < inside; ++i) {
    range.touched[offset + i] |= 1;
  }
  if (range.writable) {
    for (size_t i = 0; i < inside; ++i) {
      if (range.writer[offset + i] >= 0) {
        fail("reads global memory that core ", range.writer[offset + i], " wrote in this launch");
      }
    }
  }
  core().write(kMTE2, number, to, bytes);
  std::memcpy(core().ub + to, from, inside);
  std::memset(core().ub + to + inside, 0xA5, bytes - inside);
  std::memset(core().defined + to, 1, bytes);
}

inline void store(uint8_t* to, size_t from, size_t bytes, uint32_t number) {
  model::GmRange& range = core().launch->find(to, bytes, "a write");
  const size_t offset = to - range.base;
  if (!range.writable) {
    fail("writes into an input tensor");
  }
  if (offset + bytes > range.bytes) {
    fail("a write of ", bytes, " bytes ends ", offset + bytes - range.bytes, " past its tensor");
  }
  core().read(kMTE3, number, from, bytes);
  for (size_t i = 0; i < bytes; ++i) {
    if (!core().defined[from + i]) {
      fail("writes a byte to global memory that nobody computed (unified buffer ", from + i, ")");
    }
    // A block may go out once more to round off a share, if it says the same.
    const bool again = range.writer[offset + i] == core().block && to[i] == core().ub[from + i];
    if (range.writer[offset + i] >= 0 && !again) {
      fail("byte ", offset + i, " of an output is written twice, by cores ",
           range.writer[offset + i], " and ", core().block);
    }
    range.writer[offset + i] = static_cast<int16_t>(core().block);
    range.touched[offset + i] |= 2;
  }
  std::memcpy(to, core().ub + from, bytes);
}

}  // namespace detail

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyParams& p) {
  static_assert(detail::copyable<T>);
  const size_t length = p.blockLen * detail::kUnit;
  detail::check_blocks(length, "DataCopy");
  if (p.blockCount == 0 || p.blockCount > 4095) {
    fail("DataCopy: blockCount must be in [1, 4095], got ", p.blockCount);
  }
  if (dst.position() != TPosition::VECIN) {
    fail("DataCopy from global memory goes to a VECIN buffer");
  }
  if (reinterpret_cast<uintptr_t>(src.data()) % sizeof(T) != 0) {
    fail("DataCopy: a global address must be a multiple of the element size");
  }
  detail::check_span(dst, p.blockCount * length + (p.blockCount - 1) * p.dstGap * detail::kUnit,
                     "DataCopy");
  const uint32_t number = core().issue(model::kMTE2);
  core().transfer(model::kMTE2, p.blockCount * length);
  for (size_t i = 0; i < p.blockCount; ++i) {
    detail::load(
        dst.address() + i * (length + p.dstGap * detail::kUnit),
        reinterpret_cast<const uint8_t*>(src.data()) + i * (length + p.srcGap * detail::kUnit),
        length, number);
  }
}

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, uint32_t count) {
  const size_t bytes = count * sizeof(T);
  detail::check_blocks(bytes, "DataCopy");
  DataCopy(dst, src, DataCopyParams{1, static_cast<uint16_t>(bytes / detail::kUnit), 0, 0});
}

template <typename T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count) {
  static_assert(detail::copyable<T>);
  const size_t bytes = count * sizeof(T);
  detail::check_blocks(bytes, "DataCopy");
  detail::check_span(src, bytes, "DataCopy");
  if (src.position() != TPosition::VECOUT) {
    fail("DataCopy to global memory comes from a VECOUT buffer");
  }
  if (reinterpret_cast<uintptr_t>(dst.data()) % sizeof(T) != 0) {
    fail("DataCopy: a global address must be a multiple of the element size");
  }
  core().transfer(model::kMTE3, bytes);
  detail::store(reinterpret_cast<uint8_t*>(dst.data()), src.address(), bytes,
                core().issue(model::kMTE3));
}

// ---------------------------------------------------------------------- vector operations

struct BinaryRepeatParams {
  uint8_t dstBlkStride = 1, src0BlkStride = 1, src1BlkStride = 1;
  uint8_t dstRepStride = 8, src0RepStride = 8, src1RepStride = 8;
};

namespace detail {

// One operand of a vector instruction: 8 blocks of 32 bytes a repeat.
struct Operand {
  size_t address, bytes, element, block_stride, repeat_stride;

  size_t lane(size_t repeat, size_t lane) const {
    const size_t per_block = kUnit / element;
    return address + kUnit * (repeat * repeat_stride + lane / per_block * block_stride) +
           lane % per_block * element;
  }
};

template <typename T>
Operand operand(const LocalTensor<T>& tensor, const char* what, size_t block_stride = 1,
                size_t repeat_stride = 8) {
  check_aligned(tensor.address(), what);
  return {tensor.address(), tensor.bytes(), sizeof(T), block_stride, repeat_stride};
}

// Runs f over the lanes and keeps the books. `lanes` is the mask, the first so many of each repeat,
// of which the last repeat has `last_lanes`. f gets the address of the result, the repeat and the
// lane.
template <class F>
void run_lanes(const char* what, const Operand& dst, std::initializer_list<Operand> sources,
               size_t lanes, size_t repeats, size_t last_lanes, const F& f) {
  static std::vector<size_t> reader(model::kUbSize / kUnit), stamp(model::kUbSize / kUnit);
  static size_t current = 0;
  ++current;
  const uint32_t number = core().issue(kV);
  core().compute(repeats, std::strcmp(what, "Exp") == 0 || std::strcmp(what, "Div") == 0);
  const auto in_buffer = [&](const Operand& o, size_t at) {
    if (at + o.element > o.address + o.bytes) {
      fail(what, " of ", repeats, " repeats leaves a buffer of ", o.bytes, " bytes");
    }
    return at;
  };
  for (size_t r = 0; r < repeats; ++r) {
    for (size_t l = 0; l < (r + 1 < repeats ? lanes : last_lanes); ++l) {
      for (const Operand& source : sources) {
        const size_t at = in_buffer(source, source.lane(r, l));
        if (at % kUnit == 0) {
          core().read(kV, number, at, source.element);
          stamp[at / kUnit] = current;
          reader[at / kUnit] = r;
        }
      }
    }
  }
  for (size_t r = 0; r < repeats; ++r) {
    for (size_t l = 0; l < (r + 1 < repeats ? lanes : last_lanes); ++l) {
      const size_t to = in_buffer(dst, dst.lane(r, l));
      if (to % kUnit == 0) {
        core().write(kV, number, to, dst.element);
        if (stamp[to / kUnit] == current && reader[to / kUnit] > r) {
          fail(what, ": a repeat overwrites what a later repeat reads");
        }
      }
      bool known = true;
      for (const Operand& source : sources) {
        const uint8_t* defined = core().defined + source.lane(r, l);
        known =
            known && std::all_of(defined, defined + source.element, [](uint8_t d) { return d; });
      }
      f(to, r, l);
      std::memset(core().defined + to, known, dst.element);
    }
  }
}

// The form with a mask and repeats.
template <class F>
void repeat_op(const char* what, const Operand& dst, std::initializer_list<Operand> sources,
               uint64_t mask, size_t repeats, const F& f) {
  if (mask == 0 || mask > 256 / dst.element) {
    fail(what, ": mask must be in [1, ", 256 / dst.element, "], got ", mask);
  }
  if (repeats == 0 || repeats > 255) {
    fail(what, ": repeats must be in [1, 255], got ", repeats);
  }
  if (dst.block_stride == 0 || (dst.repeat_stride == 0 && repeats > 1)) {
    fail(what, ": a stride of the destination must not be 0");
  }
  run_lanes(what, dst, sources, mask, repeats, mask, f);
}

// The form with a count. Its widest operand sets how many elements a repeat of 256 bytes holds.
template <class F>
void count_op(const char* what, Operand dst, std::initializer_list<Operand> sources, int64_t count,
              const F& f) {
  if (count <= 0) {
    fail(what, ": count must be positive, got ", count);
  }
  size_t widest = dst.element;
  for (const Operand& source : sources) {
    widest = std::max(widest, source.element);
  }
  const size_t lanes = 256 / widest, repeats = (count + lanes - 1) / lanes;
  const auto dense = [&](Operand o) {
    o.repeat_stride = lanes * o.element / kUnit;
    return o;
  };
  const auto run = [&](std::initializer_list<Operand> from) {
    run_lanes(what, dense(dst), from, lanes, repeats, count - (repeats - 1) * lanes,
              [&](size_t to, size_t r, size_t l) { f(to, r * lanes + l); });
  };
  const Operand* s = sources.begin();
  sources.size() == 0   ? run({})
  : sources.size() == 1 ? run({dense(s[0])})
                        : run({dense(s[0]), dense(s[1])});
}

template <typename T>
T fetch(size_t address) {
  T value;
  std::memcpy(&value, core().ub + address, sizeof(T));
  return value;
}

template <typename T>
void put(size_t address, T value) {
  std::memcpy(core().ub + address, &value, sizeof(T));
}

// This chip has no infinities and NaNs: they saturate, and the launch counts them.
inline float finite(float value) {
  if (std::isfinite(value)) {
    return value;
  }
  ++core().launch->nonfinite;
  return std::isnan(value) ? 0.0f : std::copysign(std::numeric_limits<float>::max(), value);
}

template <typename T>
T arithmetic(T a, T b, float (*f)(float, float)) {
  if constexpr (std::is_same_v<T, half>) {
    return model::to_half(f(model::to_float(a), model::to_float(b)));
  } else {
    return finite(f(a, b));
  }
}

template <typename T>
void binary(const char* what, const LocalTensor<T>& dst, const LocalTensor<T>& a,
            const LocalTensor<T>& b, int32_t count, float (*f)(float, float)) {
  count_op(what, operand(dst, what), {operand(a, what), operand(b, what)}, count,
           [&](size_t to, size_t i) {
             put(to, arithmetic(fetch<T>(a.address() + i * sizeof(T)),
                                fetch<T>(b.address() + i * sizeof(T)), f));
           });
}

template <typename T>
void binary(const char* what, const LocalTensor<T>& dst, const LocalTensor<T>& a,
            const LocalTensor<T>& b, uint64_t mask, uint8_t repeats, const BinaryRepeatParams& p,
            float (*f)(float, float)) {
  const Operand left = operand(a, what, p.src0BlkStride, p.src0RepStride);
  const Operand right = operand(b, what, p.src1BlkStride, p.src1RepStride);
  repeat_op(what, operand(dst, what, p.dstBlkStride, p.dstRepStride), {left, right}, mask, repeats,
            [&](size_t to, size_t r, size_t l) {
              put(to, arithmetic(fetch<T>(left.lane(r, l)), fetch<T>(right.lane(r, l)), f));
            });
}

template <typename T>
void scalar(const char* what, const LocalTensor<T>& dst, const LocalTensor<T>& a, T value,
            int32_t count, float (*f)(float, float)) {
  count_op(what, operand(dst, what), {operand(a, what)}, count, [&](size_t to, size_t i) {
    put(to, arithmetic(fetch<T>(a.address() + i * sizeof(T)), value, f));
  });
}

inline float add(float a, float b) { return a + b; }
inline float subtract(float a, float b) { return a - b; }
inline float multiply(float a, float b) { return a * b; }
inline float divide(float a, float b) { return a / b; }
inline float larger(float a, float b) { return a > b ? a : b; }
inline float smaller(float a, float b) { return a < b ? a : b; }

template <typename T>
constexpr bool real = one_of<T, half, float>;

}  // namespace detail

#define SKIPVIT_MODEL_BINARY(NAME, FUNCTION)                                                   \
  template <typename T>                                                                        \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, \
            int32_t count) {                                                                   \
    static_assert(detail::real<T>, #NAME " is modelled for half and float");                   \
    detail::binary<T>(#NAME, dst, src0, src1, count, FUNCTION);                                \
  }                                                                                            \
  template <typename T>                                                                        \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, \
            uint64_t mask, uint8_t repeats, const BinaryRepeatParams& p) {                     \
    static_assert(detail::real<T>, #NAME " is modelled for half and float");                   \
    detail::binary<T>(#NAME, dst, src0, src1, mask, repeats, p, FUNCTION);                     \
  }
SKIPVIT_MODEL_BINARY(Add, detail::add)
SKIPVIT_MODEL_BINARY(Sub, detail::subtract)
SKIPVIT_MODEL_BINARY(Mul, detail::multiply)
SKIPVIT_MODEL_BINARY(Div, detail::divide)
SKIPVIT_MODEL_BINARY(Max, detail::larger)
SKIPVIT_MODEL_BINARY(Min, detail::smaller)
#undef SKIPVIT_MODEL_BINARY

template <typename T>
void Adds(const LocalTensor<T>& dst, const LocalTensor<T>& src, T value, int32_t count) {
  static_assert(detail::real<T>);
  detail::scalar<T>("Adds", dst, src, value, count, detail::add);
}

template <typename T>
void Muls(const LocalTensor<T>& dst, const LocalTensor<T>& src, T value, int32_t count) {
  static_assert(detail::real<T>);
  detail::scalar<T>("Muls", dst, src, value, count, detail::multiply);
}

#ifdef SKIPVIT_REDUCE_FLOAT
// dst[r] = the sum of the first `mask` lanes of repeat r, as a binary tree. The page documents half
// for the 910A; fold.h says why float is here.
template <typename T>
void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, int32_t mask,
                    int32_t repeats, int32_t dst_stride, int32_t block_stride, int32_t src_stride) {
  static_assert(detail::one_of<T, float>);
  if (mask < 1 || mask > 64 || repeats < 1 || repeats > 255 || dst_stride < 1) {
    fail("WholeReduceSum: mask must be in [1, 64], repeats in [1, 255], the stride not 0");
  }
  const detail::Operand from = detail::operand(src, "WholeReduceSum", block_stride, src_stride);
  const uint32_t number = core().issue(model::kV);
  core().compute(repeats, true);
  for (int32_t r = 0; r < repeats; ++r) {
    float lanes[64] = {};
    bool known = true;
    for (int32_t l = 0; l < mask; ++l) {
      const size_t at = from.lane(r, l);
      if (at + 4 > from.address + from.bytes) {
        fail("WholeReduceSum of ", repeats, " repeats leaves a buffer of ", from.bytes, " bytes");
      }
      core().read(model::kV, number, at, 4);
      known = known && core().defined[at] && core().defined[at + 3];
      lanes[l] = detail::fetch<float>(at);
    }
    for (int step = 32; step > 0; step /= 2) {
      for (int l = 0; l < step; ++l) {
        lanes[l] = detail::finite(lanes[2 * l] + lanes[2 * l + 1]);
      }
    }
    const size_t to = dst.address() + static_cast<size_t>(r * dst_stride) * 4;
    if (to + 4 > dst.address() + dst.bytes()) {
      fail("WholeReduceSum of ", repeats, " repeats leaves a buffer of ", dst.bytes(), " bytes");
    }
    core().write(model::kV, number, to, 4);
    detail::put(to, lanes[0]);
    std::memset(core().defined + to, known, 4);
  }
}
#endif

template <typename T>
void Exp(const LocalTensor<T>& dst, const LocalTensor<T>& src, int32_t count) {
  static_assert(detail::one_of<T, float>, "Exp is modelled for float");
  detail::scalar<T>("Exp", dst, src, T{}, count, [](float a, float) { return std::exp(a); });
}

template <typename T>
void And(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
         uint64_t mask, uint8_t repeats, const BinaryRepeatParams& p) {
  static_assert(detail::one_of<T, int16_t, uint16_t>, "the 910A knows And for 16 bits only");
  const detail::Operand left = detail::operand(src0, "And", p.src0BlkStride, p.src0RepStride);
  const detail::Operand right = detail::operand(src1, "And", p.src1BlkStride, p.src1RepStride);
  detail::repeat_op(
      "And", detail::operand(dst, "And", p.dstBlkStride, p.dstRepStride), {left, right}, mask,
      repeats, [&](size_t to, size_t r, size_t l) {
        detail::put<T>(to, detail::fetch<T>(left.lane(r, l)) & detail::fetch<T>(right.lane(r, l)));
      });
}

template <typename T>
void Duplicate(const LocalTensor<T>& dst, const T& value, const int32_t& count) {
  static_assert(detail::one_of<T, int16_t, uint16_t, half, int32_t, uint32_t, float>);
  detail::count_op("Duplicate", detail::operand(dst, "Duplicate"), {}, count,
                   [&](size_t to, size_t) { detail::put(to, value); });
}

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count) {
  static_assert(detail::copyable<T>);
  detail::check_blocks(count * sizeof(T), "DataCopy");
  detail::count_op("DataCopy", detail::operand(dst, "DataCopy"), {detail::operand(src, "DataCopy")},
                   count, [&](size_t to, size_t i) {
                     detail::put(to, detail::fetch<T>(src.address() + i * sizeof(T)));
                   });
}

template <typename D, typename T>
void Cast(const LocalTensor<D>& dst, const LocalTensor<T>& src, RoundMode, uint32_t count) {
  constexpr bool widen = std::is_same_v<D, float> && detail::one_of<T, half, int32_t>;
  constexpr bool narrow = std::is_same_v<D, half> && std::is_same_v<T, float>;
  static_assert(widen || narrow, "the 910A has no such Cast with CAST_NONE");
  const auto convert = [&](size_t to, size_t i) {
    const T value = detail::fetch<T>(src.address() + i * sizeof(T));
    if constexpr (narrow) {
      detail::put(to, model::to_half(value));
    } else if constexpr (std::is_same_v<T, half>) {
      detail::put(to, detail::finite(model::to_float(value)));
    } else {
      detail::put(to, static_cast<float>(value));
    }
  };
  detail::count_op("Cast", detail::operand(dst, "Cast"), {detail::operand(src, "Cast")}, count,
                   convert);
}

// One bit an element, 64 floats a repeat; the count must fill its repeats.
template <typename U, typename T>
void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
             CMPMODE mode, uint32_t count) {
  static_assert(detail::one_of<T, float> && detail::one_of<U, int8_t, uint8_t>);
  if (count == 0 || count * sizeof(T) % 256 != 0) {
    fail("Compare: count must fill whole repeats of 256 bytes, got ", count);
  }
  detail::check_span(dst, count / 8, "Compare");
  detail::check_span(src0, count * sizeof(T), "Compare");
  detail::check_span(src1, count * sizeof(T), "Compare");
  const uint32_t number = core().issue(model::kV);
  core().compute(count * sizeof(T) / 256, false);
  core().read(model::kV, number, src0.address(), count * sizeof(T));
  core().read(model::kV, number, src1.address(), count * sizeof(T));
  core().write(model::kV, number, dst.address(), count / 8);
  for (size_t byte = 0; byte < count / 8; ++byte) {
    uint8_t bits = 0;
    bool known = true;
    for (size_t bit = 0; bit < 8; ++bit) {
      const size_t at = (byte * 8 + bit) * sizeof(T);
      const T a = detail::fetch<T>(src0.address() + at), b = detail::fetch<T>(src1.address() + at);
      for (size_t i = 0; i < sizeof(T); ++i) {
        known = known && core().defined[src0.address() + at + i] &&
                core().defined[src1.address() + at + i];
      }
      const bool holds = mode == CMPMODE::LT   ? a < b
                         : mode == CMPMODE::GT ? a > b
                         : mode == CMPMODE::EQ ? a == b
                         : mode == CMPMODE::LE ? a <= b
                         : mode == CMPMODE::GE ? a >= b
                                               : a != b;
      bits |= static_cast<uint8_t>(holds) << bit;
    }
    detail::put(dst.address() + byte, bits);
    core().defined[dst.address() + byte] = known;
  }
}

}  // namespace AscendC
