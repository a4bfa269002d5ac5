// SPDX-License-Identifier: Apache-2.0
// cls_softmax: out[b, h] = softmax over the N keys of scale * q[b, h] . k[b, h, :], in float32, in
// rows of whole 32-byte blocks. mean_heads then averages the heads. The cores share the (image,
// head) pairs.
#include "fold.h"

namespace skipvit {

struct ClsSoftmaxArgs {
  GM_ADDR q;
  GM_ADDR k;
  GM_ADDR out;
  uint64_t total_items, items_per_core;
  // Strides of k in elements; a key itself is dense, the gap to the next a whole number of blocks.
  uint64_t image_stride, head_stride;
  uint32_t row_stride;
  uint32_t heads, num_tokens, width, tile_rows;
  float scale;
};

template <typename T>
class ClsSoftmax {
 public:
  __aicore__ inline void Init(TPipe* pipe, const ClsSoftmaxArgs& a) {
    pipe_ = pipe;
    num_tokens_ = a.num_tokens;
    width_ = a.width;
    row_stride_ = a.row_stride;
    tile_rows_ = a.tile_rows;
    padded_ = RoundUp(num_tokens_, kBlockFloats);
    q_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.q));
    k_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.k));
    out_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(a.out));
    pipe->InitBuffer(query_in_, width_ * sizeof(T));
    pipe->InitBuffer(query_, width_ * sizeof(float));
    pipe->InitBuffer(keys_in_, 2, tile_rows_ * width_ * sizeof(T));
    pipe->InitBuffer(product_, tile_rows_ * width_ * sizeof(float));
    pipe->InitBuffer(logits_, padded_ * sizeof(float));
    pipe->InitBuffer(scratch_, padded_ * sizeof(float));
    pipe->InitBuffer(weights_, 1, padded_ * sizeof(float));
  }

  __aicore__ inline void Run(const ClsSoftmaxArgs& a) {
    const Share share = CoreShare(a.total_items, a.items_per_core);
    for (uint64_t item = share.begin; item < share.end; ++item) {
      LoadQuery(item, a.scale);
      Softmax(item, Logits(item / a.heads * a.image_stride + item % a.heads * a.head_stride));
    }
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

  // Fills the logits and returns the largest.
  __aicore__ inline float Logits(uint64_t keys) {
    const LocalTensor<float> logits = logits_.Get<float>(), product = product_.Get<float>();
    const uint16_t length = static_cast<uint16_t>(width_ * sizeof(T) / kBlockBytes);
    const uint16_t gap = static_cast<uint16_t>((row_stride_ - width_) * sizeof(T) / kBlockBytes);
    float largest = 0.0f;
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
      FoldRowsOntoBlock(product, rows, width_);
      Sync<HardEvent::V_S>(*pipe_);
      for (uint32_t r = 0; r < rows; ++r) {
        const float logit = SumOfBlock(product[r * width_]);
        largest = first + r == 0 || logit > largest ? logit : largest;
        logits.SetValue(first + r, logit);
      }
    }
    return largest;
  }

  __aicore__ inline void TimesQuery(const LocalTensor<float>& product, uint32_t rows) {
    const uint32_t lanes = kVectorBytes / sizeof(float);
    const uint8_t stride = static_cast<uint8_t>(width_ / kBlockFloats);
    const LocalTensor<float> query = query_.Get<float>();
    for (uint32_t done = 0; done < width_; done += lanes) {
      Mul(product[done], product[done], query[done], Smaller(lanes, width_ - done),
          static_cast<uint8_t>(rows), {1, 1, 1, stride, stride, 0});
    }
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void Softmax(uint64_t item, float largest) {
    const LocalTensor<float> logits = logits_.Get<float>(), scratch = scratch_.Get<float>();
    const int32_t count = static_cast<int32_t>(num_tokens_);
    LocalTensor<float> weights = weights_.AllocTensor<float>();
    Duplicate(weights, 0.0f, static_cast<int32_t>(padded_));  // lanes past the last key
    Sync<HardEvent::S_V>(*pipe_);
    Adds(logits, logits, -largest, count);
    PipeBarrier<PIPE_V>();
    Exp(weights, logits, count);
    PipeBarrier<PIPE_V>();
    DataCopy(scratch, weights, padded_);
    PipeBarrier<PIPE_V>();
    FoldOntoBlock(scratch, padded_);
    Sync<HardEvent::V_S>(*pipe_);
    const float sum = SumOfBlock(scratch);
    Sync<HardEvent::S_V>(*pipe_);
    Duplicate(scratch, sum, count);
    PipeBarrier<PIPE_V>();
    Div(weights, weights, scratch, count);
    PipeBarrier<PIPE_V>();
    weights_.EnQue(weights);
    weights = weights_.DeQue<float>();
    DataCopy(out_[item * padded_], weights, padded_);
    weights_.FreeTensor(weights);
  }

  TPipe* pipe_;
  TQue<TPosition::VECIN, 2> keys_in_;
  TQue<TPosition::VECOUT, 1> weights_;
  TBuf<TPosition::VECIN> query_in_;
  TBuf<TPosition::VECCALC> query_, product_, logits_, scratch_;
  GlobalTensor<T> q_, k_;
  GlobalTensor<float> out_;
  uint32_t num_tokens_, width_, row_stride_, padded_, tile_rows_;
};

template <typename T>
__aicore__ inline void RunClsSoftmax(const ClsSoftmaxArgs& a) {
  TPipe pipe;
  ClsSoftmax<T> kernel;
  kernel.Init(&pipe, a);
  kernel.Run(a);
}

}  // namespace skipvit

extern "C" __global__ __aicore__ void skipvit_cls_softmax(
    GM_ADDR q, GM_ADDR k, GM_ADDR out, uint64_t total_items, uint64_t items_per_core,
    uint64_t image_stride, uint64_t head_stride, uint32_t row_stride, uint32_t dtype,
    uint32_t heads, uint32_t num_tokens, uint32_t width, uint32_t tile_rows, float scale) {
  using namespace skipvit;
  const ClsSoftmaxArgs a{q,           k,          out,   total_items, items_per_core, image_stride,
                         head_stride, row_stride, heads, num_tokens,  width,          tile_rows,
                         scale};
  if (dtype == kFloat16) {
    RunClsSoftmax<half>(a);
  } else {
    RunClsSoftmax<float>(a);
  }
}
