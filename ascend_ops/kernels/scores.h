// SPDX-License-Identifier: Apache-2.0
// One image's scores as float32: the heads are added in order, then divided by their number.
#pragma once

#include "common.h"

namespace skipvit {

// `depth` buffers for loading: each costs one of the four vector-to-MTE2 events.
template <typename T, int depth>  // of the scores
class HeadMean {
 public:
  __aicore__ inline void Init(TPipe* pipe, GM_ADDR scores, uint32_t heads, uint32_t patches) {
    heads_ = heads;
    patches_ = patches;
    padded_ = RoundUp(patches, kVectorBytes / sizeof(float));
    scores_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(scores));
    pipe->InitBuffer(queue_, depth, padded_ * sizeof(T));
    pipe->InitBuffer(mean_, padded_ * sizeof(float));
    pipe->InitBuffer(scratch_, padded_ * sizeof(float));
    Duplicate(mean_.Get<float>(), 0.0f, static_cast<int32_t>(padded_));
    PipeBarrier<PIPE_V>();
  }

  // The vector pipe has the mean in the first `patches` lanes; the lanes after them hold whatever
  // follows in memory, up to the next multiple of 64. Only for patches > 0.
  __aicore__ inline LocalTensor<float> Load(uint64_t image) {
    LocalTensor<float> mean = mean_.Get<float>();
    LocalTensor<float> scratch = scratch_.Get<float>();
    const uint32_t count = RoundUp(patches_, kBlockBytes / sizeof(T));
    for (uint32_t h = 0; h < heads_; ++h) {
      LocalTensor<T> row = queue_.template AllocTensor<T>();
      DataCopy(row, scores_[(image * heads_ + h) * patches_], count);
      queue_.EnQue(row);
      row = queue_.template DeQue<T>();
      Accumulate(mean, row, scratch, h, count);
      queue_.FreeTensor(row);
    }
    if (heads_ > 1) {
      Duplicate(scratch, static_cast<float>(heads_), static_cast<int32_t>(padded_));
      PipeBarrier<PIPE_V>();
      Div(mean, mean, scratch, static_cast<int32_t>(count));
      PipeBarrier<PIPE_V>();
    }
    return mean;
  }

  __aicore__ inline LocalTensor<float> Mean() { return mean_.Get<float>(); }
  __aicore__ inline LocalTensor<float> Scratch() { return scratch_.Get<float>(); }
  __aicore__ inline uint32_t Padded() const { return padded_; }

 private:
  __aicore__ inline void Accumulate(const LocalTensor<float>& mean, const LocalTensor<half>& row,
                                    const LocalTensor<float>& scratch, uint32_t head,
                                    uint32_t count) {
    Cast(head == 0 ? mean : scratch, row, RoundMode::CAST_NONE, count);
    PipeBarrier<PIPE_V>();
    if (head > 0) {
      Add(mean, mean, scratch, static_cast<int32_t>(count));
      PipeBarrier<PIPE_V>();
    }
  }

  __aicore__ inline void Accumulate(const LocalTensor<float>& mean, const LocalTensor<float>& row,
                                    const LocalTensor<float>&, uint32_t head, uint32_t count) {
    if (head == 0) {
      DataCopy(mean, row, count);  // bit for bit: no arithmetic touches scores without heads
    } else {
      Add(mean, mean, row, static_cast<int32_t>(count));
    }
    PipeBarrier<PIPE_V>();
  }

  TQue<TPosition::VECIN, depth> queue_;
  TBuf<TPosition::VECCALC> mean_, scratch_;
  GlobalTensor<T> scores_;
  uint32_t heads_, patches_, padded_;
};

}  // namespace skipvit
