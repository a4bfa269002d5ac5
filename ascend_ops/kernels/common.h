// SPDX-License-Identifier: Apache-2.0
// What several kernels share: the core's share of the work, synchronisation, the index, and results
// that are no whole number of 32-byte blocks.
#pragma once

#include "../chip.h"
#include "kernel_operator.h"

namespace skipvit {

using namespace AscendC;

__aicore__ inline uint32_t RoundUp(uint32_t value, uint32_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

template <typename T>
__aicore__ inline T Smaller(T a, T b) {
  return a < b ? a : b;
}

// The target pipe of `event` waits for everything that its source pipe has been given so far.
template <HardEvent event>
__aicore__ inline void Sync(TPipe& pipe) {
  const event_t id = static_cast<event_t>(pipe.FetchEventID(event));
  SetFlag<event>(id);
  WaitFlag<event>(id);
}

// The items of a list of `total` that this core works on.
struct Share {
  uint64_t begin, end;
};

__aicore__ inline Share CoreShare(uint64_t total, uint64_t per_core) {
  const uint64_t begin = static_cast<uint64_t>(GetBlockIdx()) * per_core;
  return {Smaller(begin, total), Smaller(begin + per_core, total)};
}

// Writes a core's consecutive elements of a flat output, from any scalar code. The chip writes
// whole 32-byte blocks only, so every core's share must begin at one; the last share of all may end
// inside one, and the output's allocation must reach to that block's end.
template <typename T>
class FlatWriter {
 public:
  __aicore__ inline void Init(TPipe* pipe, GM_ADDR out, uint64_t first) {
    pipe_ = pipe;
    out_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(out) + first);
    pipe_->InitBuffer(buffer_, kWriterElements * sizeof(T));
    stage_ = buffer_.template Get<T>();
  }

  __aicore__ inline void Append(T value) {
    stage_.SetValue(count_++, value);
    if (count_ == kWriterElements) {
      Flush();
    }
  }

  __aicore__ inline void Finish() {
    while (count_ * sizeof(T) % kBlockBytes != 0) {
      stage_.SetValue(count_++, static_cast<T>(0));
    }
    if (count_ > 0) {
      Flush();
    }
  }

 private:
  __aicore__ inline void Flush() {
    Sync<HardEvent::S_MTE3>(*pipe_);
    DataCopy(out_[written_], stage_, count_);
    Sync<HardEvent::MTE3_S>(*pipe_);
    written_ += count_;
    count_ = 0;
  }

  TPipe* pipe_;
  GlobalTensor<T> out_;
  TBuf<TPosition::VECOUT> buffer_;
  LocalTensor<T> stage_;
  uint64_t written_ = 0;
  uint32_t count_ = 0;
};

// One image's row of an int64 index (B, M), read as pairs of 32 bits: the scalar unit has the value
// in the low word, and anything that is no row of the image in a high word or a large low word.
class IndexRow {
 public:
  __aicore__ inline void Init(TPipe* pipe, GM_ADDR index, uint32_t capacity) {
    pipe_ = pipe;
    index_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(index));
    pipe_->InitBuffer(buffer_, RoundUp(capacity * 8, kBlockBytes));
    row_ = buffer_.Get<int32_t>();
  }

  // Entries [first, first + count) of the whole index; count > 0.
  __aicore__ inline void Load(uint64_t first, uint32_t count) {
    Sync<HardEvent::S_MTE2>(*pipe_);  // the scalar unit has read the row before
    DataCopy(row_, index_[first * 2], RoundUp(count * 8, kBlockBytes) / 4);
    Sync<HardEvent::MTE2_S>(*pipe_);
  }

  // Entry i, or -1 if it is no row in [0, rows).
  __aicore__ inline int32_t Row(uint32_t i, uint32_t rows) const {
    const int32_t low = row_.GetValue(2 * i);
    const bool inside =
        row_.GetValue(2 * i + 1) == 0 && low >= 0 && low < static_cast<int32_t>(rows);
    return inside ? low : -1;
  }

 private:
  TPipe* pipe_;
  GlobalTensor<int32_t> index_;
  TBuf<TPosition::VECIN> buffer_;
  LocalTensor<int32_t> row_;
};

}  // namespace skipvit
