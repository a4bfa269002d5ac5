// SPDX-License-Identifier: Apache-2.0
// cls_scores: out[b, j] = mean over h of softmax over the N keys of scale * q[b, h] . k[b, h, :],
// at key prefix + j, in float32. The cores share the images.
#include "fold.h"

namespace skipvit {

constexpr float kLowest = -3.0e38f;  // below every logit; the chip has no infinity

struct ClsScoresArgs {
  GM_ADDR q;
  GM_ADDR k;
  GM_ADDR out;
  uint64_t total_images, images_per_core;
  // Strides of k in elements; a key itself is dense, the gap to the next a whole number of blocks.
  uint64_t image_stride, head_stride;
  uint32_t row_stride;
  uint32_t heads, num_tokens, prefix, width, tile_rows;
  float scale;
};

template <typename T>
class ClsScores {
 public:
  __aicore__ inline void Init(TPipe* pipe, const ClsScoresArgs& a) {
    pipe_ = pipe;
    share_ = CoreShare(a.total_images, a.images_per_core);
    heads_ = a.heads;
    num_tokens_ = a.num_tokens;
    prefix_ = a.prefix;
    width_ = a.width;
    row_stride_ = a.row_stride;
    tile_rows_ = a.tile_rows;
    padded_ = RoundUp(num_tokens_, kBlockFloats);
    q_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.q));
    k_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.k));
    writer_.Init(pipe, a.out, share_.begin * (num_tokens_ - prefix_));
    pipe->InitBuffer(query_in_, width_ * sizeof(T));
    pipe->InitBuffer(query_, width_ * sizeof(float));
    pipe->InitBuffer(keys_in_, 2, tile_rows_ * width_ * sizeof(T));
    pipe->InitBuffer(product_, tile_rows_ * width_ * sizeof(float));
    pipe->InitBuffer(logits_, padded_ * sizeof(float));
    pipe->InitBuffer(scratch_, padded_ * sizeof(float));
    pipe->InitBuffer(mean_, padded_ * sizeof(float));
  }

  __aicore__ inline void Run(const ClsScoresArgs& a) {
    const LocalTensor<float> mean = mean_.Get<float>(), scratch = scratch_.Get<float>();
    const int32_t count = static_cast<int32_t>(num_tokens_);
    for (uint64_t image = share_.begin; image < share_.end; ++image) {
      Sync<HardEvent::S_V>(*pipe_);  // the mean before has been read
      Duplicate(mean, 0.0f, count);
      for (uint32_t h = 0; h < heads_; ++h) {
        LoadQuery(image * heads_ + h, a.scale);
        Logits(image * a.image_stride + h * a.head_stride);
        AddSoftmax();
      }
      Duplicate(scratch, static_cast<float>(heads_), count);
      PipeBarrier<PIPE_V>();
      Div(mean, mean, scratch, count);
      Sync<HardEvent::V_S>(*pipe_);
      for (uint32_t i = prefix_; i < num_tokens_; ++i) {
        writer_.Append(mean.GetValue(i));
      }
    }
    writer_.Finish();
  }

 private:
  __aicore__ inline void ToFloat(const LocalTensor<float>& to, const LocalTensor<T>& from,
                                 uint32_t count) {
    if constexpr (sizeof(T) == sizeof(half)) {
      Cast(to, from, RoundMode::CAST_NONE, count);
    } else {
      DataCopy(to, from, count);
    }
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void LoadQuery(uint64_t item, float scale) {
    const LocalTensor<float> query = query_.Get<float>();
    Sync<HardEvent::V_MTE2>(*pipe_);
    DataCopy(query_in_.Get<T>(), q_[item * width_], width_);
    Sync<HardEvent::MTE2_V>(*pipe_);
    ToFloat(query, query_in_.Get<T>(), width_);
    Muls(query, query, scale, static_cast<int32_t>(width_));
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void Logits(uint64_t keys) {
    const LocalTensor<float> logits = logits_.Get<float>(), product = product_.Get<float>();
    const uint16_t length = static_cast<uint16_t>(width_ * sizeof(T) / kBlockBytes);
    const uint16_t gap = static_cast<uint16_t>((row_stride_ - width_) * sizeof(T) / kBlockBytes);
    for (uint32_t first = 0; first < num_tokens_; first += tile_rows_) {
      const uint32_t rows = Smaller(tile_rows_, num_tokens_ - first);
      LocalTensor<T> in = keys_in_.template AllocTensor<T>();
      DataCopy(in, k_[keys + static_cast<uint64_t>(first) * row_stride_],
               DataCopyParams{static_cast<uint16_t>(rows), length, gap, 0});
      keys_in_.EnQue(in);
      in = keys_in_.template DeQue<T>();
      Sync<HardEvent::S_V>(*pipe_);  // the sums of the tile before have been read
      ToFloat(product, in, rows * width_);
      keys_in_.FreeTensor(in);
      TimesQuery(product, rows);
      SumRowsOf(*pipe_, logits[first], product, rows, width_);
    }
  }

  __aicore__ inline void TimesQuery(const LocalTensor<float>& product, uint32_t rows) {
    const uint8_t stride = static_cast<uint8_t>(width_ / kBlockFloats);
    const LocalTensor<float> query = query_.Get<float>();
    for (uint32_t done = 0; done < width_; done += kVectorFloats) {
      Mul(product[done], product[done], query[done], Smaller(kVectorFloats, width_ - done),
          static_cast<uint8_t>(rows), {1, 1, 1, stride, stride, 0});
    }
    PipeBarrier<PIPE_V>();
  }

  // scratch = the logits, with `fill` in the lanes past the last key.
  __aicore__ inline void CopyPadded(float fill) {
    const LocalTensor<float> scratch = scratch_.Get<float>();
    Duplicate(scratch, fill, static_cast<int32_t>(padded_));
    PipeBarrier<PIPE_V>();
    Adds(scratch, logits_.Get<float>(), 0.0f, static_cast<int32_t>(num_tokens_));
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline float Largest() {
    const LocalTensor<float> scratch = scratch_.Get<float>();
    CopyPadded(kLowest);
    for (uint32_t blocks = padded_ / kBlockFloats; blocks > 1;) {
      const uint32_t half_up = (blocks + 1) / 2;
      Max(scratch, scratch, scratch[half_up * kBlockFloats],
          static_cast<int32_t>((blocks - half_up) * kBlockFloats));
      PipeBarrier<PIPE_V>();
      blocks = half_up;
    }
    Sync<HardEvent::V_S>(*pipe_);
    float largest = scratch.GetValue(0);
    for (uint32_t i = 1; i < kBlockFloats; ++i) {
      const float value = scratch.GetValue(i);
      largest = value > largest ? value : largest;
    }
    Sync<HardEvent::S_V>(*pipe_);
    return largest;
  }

  // mean += softmax of the logits.
  __aicore__ inline void AddSoftmax() {
    const LocalTensor<float> logits = logits_.Get<float>(), scratch = scratch_.Get<float>(),
                             mean = mean_.Get<float>();
    const int32_t count = static_cast<int32_t>(num_tokens_);
    Sync<HardEvent::S_V>(*pipe_);
    Adds(logits, logits, -Largest(), count);
    PipeBarrier<PIPE_V>();
    Exp(logits, logits, count);
    PipeBarrier<PIPE_V>();
    CopyPadded(0.0f);
    FoldRow(scratch, padded_, 1);
    Sync<HardEvent::V_S>(*pipe_);
    const float sum = SumOfBlock(scratch);
    Sync<HardEvent::S_V>(*pipe_);
    Duplicate(scratch, sum, count);
    PipeBarrier<PIPE_V>();
    Div(logits, logits, scratch, count);
    PipeBarrier<PIPE_V>();
    Add(mean, mean, logits, count);
    PipeBarrier<PIPE_V>();
  }

  TPipe* pipe_;
  Share share_;
  FlatWriter<float> writer_;
  TQue<TPosition::VECIN, 2> keys_in_;
  TBuf<TPosition::VECIN> query_in_;
  TBuf<TPosition::VECCALC> query_, product_, logits_, scratch_, mean_;
  GlobalTensor<T> q_, k_;
  uint32_t heads_, num_tokens_, prefix_, width_, row_stride_, padded_, tile_rows_;
};

template <typename T>
__aicore__ inline void RunClsScores(const ClsScoresArgs& a) {
  TPipe pipe;
  ClsScores<T> kernel;
  kernel.Init(&pipe, a);
  kernel.Run(a);
}

}  // namespace skipvit

extern "C" __global__ __aicore__ void skipvit_cls_scores(
    GM_ADDR q, GM_ADDR k, GM_ADDR out, uint64_t total_images, uint64_t images_per_core,
    uint64_t image_stride, uint64_t head_stride, uint32_t row_stride, uint32_t dtype,
    uint32_t heads, uint32_t num_tokens, uint32_t prefix, uint32_t width, uint32_t tile_rows,
    float scale) {
  using namespace skipvit;
  const ClsScoresArgs a{q,           k,          out,   total_images, images_per_core, image_stride,
                        head_stride, row_stride, heads, num_tokens,   prefix,          width,
                        tile_rows,   scale};
  if (dtype == kFloat16) {
    RunClsScores<half>(a);
  } else {
    RunClsScores<float>(a);
  }
}
