// SPDX-License-Identifier: Apache-2.0
// mean_heads: out[b, o, j] = (sum over i of in[b, i, offset + j]) / divisor for j < n, the same for
// every o. `in` holds float32 rows of a padded stride; `out` is dense. It averages the softmaxes of
// cls_scores (many rows to one) and spreads the gradient of a mean over its heads (one row to
// many). The cores share the flat output in whole 32-byte blocks.
#include "common.h"

namespace skipvit {

struct MeanHeadsArgs {
  GM_ADDR in;
  GM_ADDR out;
  uint64_t total, elements_per_core;
  uint32_t rows_in, rows_out, in_stride, offset, count;
  float divisor;
};

template <typename T,
          typename Bits>  // of the output; of its elements as the scalar unit moves them
class MeanHeads {
 public:
  __aicore__ inline void Init(TPipe* pipe, const MeanHeadsArgs& a) {
    pipe_ = pipe;
    share_ = CoreShare(a.total, a.elements_per_core);
    rows_in_ = a.rows_in;
    rows_out_ = a.rows_out;
    in_stride_ = a.in_stride;
    offset_ = a.offset;
    count_ = a.count;
    divisor_ = a.divisor;
    in_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(a.in));
    writer_.Init(pipe, a.out, share_.begin);
    pipe->InitBuffer(queue_, 2, kMeanElements * sizeof(float));
    pipe->InitBuffer(mean_, kMeanElements * sizeof(float));
    pipe->InitBuffer(scratch_, kMeanElements * sizeof(float));
    pipe->InitBuffer(result_, kMeanElements * sizeof(T));
  }

  __aicore__ inline void Run() {
    const LocalTensor<Bits> result = result_.template Get<Bits>();
    for (uint64_t element = share_.begin; element < share_.end;) {
      const uint64_t image = element / count_ / rows_out_;
      const uint32_t first = static_cast<uint32_t>(element % count_);
      uint32_t length = Smaller(count_ - first, kMeanElements);
      length = static_cast<uint32_t>(Smaller<uint64_t>(length, share_.end - element));
      Sync<HardEvent::S_V>(*pipe_);  // the result before has been read
      Mean(image, first, length);
      Sync<HardEvent::V_S>(*pipe_);
      for (uint32_t i = 0; i < length; ++i) {
        writer_.Append(result.GetValue(i));
      }
      element += length;
    }
    writer_.Finish();
  }

 private:
  __aicore__ inline void Mean(uint64_t image, uint32_t first, uint32_t length) {
    const LocalTensor<float> mean = mean_.Get<float>(), scratch = scratch_.Get<float>();
    const uint32_t lanes = RoundUp(length, kBlockBytes / sizeof(float));
    for (uint32_t i = 0; i < rows_in_; ++i) {
      LocalTensor<float> row = queue_.AllocTensor<float>();
      DataCopy(row, in_[(image * rows_in_ + i) * in_stride_ + offset_ + first], lanes);
      queue_.EnQue(row);
      row = queue_.DeQue<float>();
      if (i == 0) {
        DataCopy(mean, row, lanes);
      } else {
        Add(mean, mean, row, static_cast<int32_t>(lanes));
      }
      PipeBarrier<PIPE_V>();
      queue_.FreeTensor(row);
    }
    Duplicate(scratch, divisor_, static_cast<int32_t>(lanes));
    PipeBarrier<PIPE_V>();
    if constexpr (sizeof(T) == sizeof(half)) {
      Div(mean, mean, scratch, static_cast<int32_t>(lanes));
      PipeBarrier<PIPE_V>();
      Cast(result_.template Get<T>(), mean, RoundMode::CAST_NONE, lanes);
    } else {
      Div(result_.template Get<T>(), mean, scratch, static_cast<int32_t>(lanes));
    }
    PipeBarrier<PIPE_V>();
  }

  TPipe* pipe_;
  Share share_;
  FlatWriter<Bits> writer_;
  TQue<TPosition::VECIN, 2> queue_;
  TBuf<TPosition::VECCALC> mean_, scratch_, result_;
  GlobalTensor<float> in_;
  uint32_t rows_in_, rows_out_, in_stride_, offset_, count_;
  float divisor_;
};

template <typename T, typename Bits>
__aicore__ inline void RunMeanHeads(const MeanHeadsArgs& a) {
  TPipe pipe;
  MeanHeads<T, Bits> kernel;
  kernel.Init(&pipe, a);
  kernel.Run();
}

}  // namespace skipvit

extern "C" __global__ __aicore__ void skipvit_mean_heads(GM_ADDR in, GM_ADDR out, uint64_t total,
                                                         uint64_t elements_per_core, uint32_t dtype,
                                                         uint32_t rows_in, uint32_t rows_out,
                                                         uint32_t in_stride, uint32_t offset,
                                                         uint32_t count, float divisor) {
  using namespace skipvit;
  const MeanHeadsArgs a{in,     out,   total,  elements_per_core, rows_in, rows_out, in_stride,
                        offset, count, divisor};
  if (dtype == kFloat16) {
    RunMeanHeads<half, int16_t>(a);
  } else {
    RunMeanHeads<float, float>(a);
  }
}
