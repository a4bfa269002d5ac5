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

__aicore__ inline uint32_t CountBits(uint64_t v) {
  v -= (v >> 1) & 0x5555555555555555u;
  v = (v & 0x3333333333333333u) + ((v >> 2) & 0x3333333333333333u);
  return static_cast<uint32_t>((((v + (v >> 4)) & 0x0F0F0F0F0F0F0F0Fu) * 0x0101010101010101u) >>
                               56);
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
// whole 32-byte blocks to any element; what is left at the end goes as the share's last block once
// more, so a share may begin and end anywhere if it has a block. Only the last share of all may
// have less: it writes past its end, and the output's allocation must have a block more.
template <typename T>
class FlatWriter {
 public:
  __aicore__ inline void Init(TPipe* pipe, GM_ADDR out, uint64_t first) {
    pipe_ = pipe;
    out_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(out) + first);
    pipe_->InitBuffer(buffer_, kWriterElements * sizeof(T));
    pipe_->InitBuffer(last_, kBlockBytes);
    stage_ = buffer_.template Get<T>();
  }

  __aicore__ inline void Append(T value) {
    stage_.SetValue(count_++, value);
    if (count_ == kWriterElements) {
      Flush(count_);
      written_ += count_;
      count_ = 0;
    }
  }

  __aicore__ inline void Finish() {
    const uint32_t block = kBlockBytes / sizeof(T);
    if (count_ >= block) {
      Flush(count_ / block * block);
    }
    if (count_ % block == 0) {
      return;
    }
    const LocalTensor<T> last = last_.template Get<T>();
    const uint32_t missing = written_ + count_ < block ? block - count_ : 0;
    for (uint32_t i = 0; i < block; ++i) {  // what was staged before the last flush is still there
      const uint32_t from = (kWriterElements + count_ + missing - block + i) % kWriterElements;
      last.SetValue(i, i < block - missing ? stage_.GetValue(from) : static_cast<T>(0));
    }
    Sync<HardEvent::S_MTE3>(*pipe_);
    DataCopy(out_[written_ + count_ + missing - block], last, block);
  }

 private:
  __aicore__ inline void Flush(uint32_t count) {
    Sync<HardEvent::S_MTE3>(*pipe_);
    DataCopy(out_[written_], stage_, count);
    Sync<HardEvent::MTE3_S>(*pipe_);
  }

  TPipe* pipe_;
  GlobalTensor<T> out_;
  TBuf<TPosition::VECOUT> buffer_, last_;
  LocalTensor<T> stage_;
  uint64_t written_ = 0;
  uint32_t count_ = 0;
};

// One image's row of an int64 index (B, M).
class IndexRow {
 public:
  __aicore__ inline void Init(TPipe* pipe, GM_ADDR index, uint32_t capacity) {
    pipe_ = pipe;
    index_.SetGlobalBuffer(reinterpret_cast<__gm__ int64_t*>(index));
    pipe_->InitBuffer(buffer_, RoundUp(capacity * sizeof(int64_t), kBlockBytes));
    row_ = buffer_.Get<int64_t>();
  }

  // Entries [first, first + count) of the whole index; count > 0.
  __aicore__ inline void Load(uint64_t first, uint32_t count) {
    Sync<HardEvent::S_MTE2>(*pipe_);  // the scalar unit has read the row before
    DataCopy(row_, index_[first], RoundUp(count, kBlockBytes / sizeof(int64_t)));
    Sync<HardEvent::MTE2_S>(*pipe_);
  }

  // Entry i, or -1 if it is no row in [0, rows).
  __aicore__ inline int32_t Row(uint32_t i, uint32_t rows) const {
    const int64_t row = row_.GetValue(i);
    return row >= 0 && row < static_cast<int64_t>(rows) ? static_cast<int32_t>(row) : -1;
  }

 private:
  TPipe* pipe_;
  GlobalTensor<int64_t> index_;
  TBuf<TPosition::VECIN> buffer_;
  LocalTensor<int64_t> row_;
};

}  // namespace skipvit
