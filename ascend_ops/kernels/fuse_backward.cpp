// SPDX-License-Identifier: Apache-2.0
// fuse_backward, for gather_topk_fuse. With g the gradient of the fused row:
//   grad_x[b, index[b, j]] = grad[b, j];  of a dropped patch: score * g;  of another prefix row: 0
//   dots[b, r]             = x[b, r] . g for a dropped patch, 0 for every other row
// dots has a stride of whole 32-byte blocks and becomes the gradient to the scores in mean_heads.
// The rows of all images, each image's number rounded up to 8, form one list that the cores share.
#include "fold.h"
#include "scores.h"

namespace skipvit {

struct FuseBackwardArgs {
  GM_ADDR grad;
  GM_ADDR x;
  GM_ADDR scores;
  GM_ADDR index;
  GM_ADDR grad_x;
  GM_ADDR dots;
  uint64_t total_rows, rows_per_core;
  uint32_t num_tokens, num_moved, channels, heads, prefix, tile_rows;
};

template <typename T, typename TS>
class FuseBackward {
 public:
  __aicore__ inline void Init(TPipe* pipe, const FuseBackwardArgs& a) {
    pipe_ = pipe;
    share_ = CoreShare(a.total_rows, a.rows_per_core);
    num_tokens_ = a.num_tokens;
    num_moved_ = a.num_moved;
    channels_ = a.channels;
    prefix_ = a.prefix;
    tile_rows_ = a.tile_rows;
    grad_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.grad));
    x_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.x));
    grad_x_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.grad_x));
    if (num_tokens_ > prefix_) {
      mean_.Init(pipe, a.scores, a.heads, num_tokens_ - prefix_);
    }
    index_.Init(pipe, a.index, num_moved_ > 0 ? num_moved_ : 1);
    dots_.Init(pipe, a.dots, share_.begin);
    pipe->InitBuffer(table_, RoundUp(num_tokens_ * sizeof(int32_t), kBlockBytes));
    pipe->InitBuffer(in_, 2, tile_rows_ * channels_ * sizeof(T));
    pipe->InitBuffer(done_, 2, tile_rows_ * channels_ * sizeof(T));
    pipe->InitBuffer(fused_in_, channels_ * sizeof(T));
    pipe->InitBuffer(fused_, channels_ * sizeof(float));
    pipe->InitBuffer(product_, channels_ * sizeof(float));
    pipe->InitBuffer(partial_, tile_rows_ * kBlockBytes);
  }

  __aicore__ inline void Run() {
    const uint32_t stride = RoundUp(num_tokens_, kBlockFloats);
    for (uint64_t row = share_.begin; row < share_.end;) {
      const uint64_t image = row / stride;
      const uint32_t first = static_cast<uint32_t>(row % stride);
      const uint32_t count =
          static_cast<uint32_t>(Smaller<uint64_t>(stride - first, share_.end - row));
      LoadImage(image);
      const uint32_t last = Smaller(first + count, num_tokens_);
      for (uint32_t r = first; r < last; r += tile_rows_) {
        Tile(image, r, Smaller(tile_rows_, last - r));
      }
      for (uint32_t r = last; r < first + count; ++r) {
        dots_.Append(0.0f);
      }
      row += count;
    }
    dots_.Finish();
  }

 private:
  // The inverse of the index, the weights and, in float32, the gradient of the fused row.
  __aicore__ inline void LoadImage(uint64_t image) {
    const LocalTensor<int32_t> table = table_.Get<int32_t>();
    for (uint32_t r = 0; r < num_tokens_; ++r) {
      table.SetValue(r, -1);
    }
    if (num_moved_ > 0) {
      index_.Load(image * num_moved_, num_moved_);
    }
    for (uint32_t j = 0; j < num_moved_; ++j) {
      const int32_t row = index_.Row(j, num_tokens_);
      if (row >= 0) {
        table.SetValue(row, static_cast<int32_t>(j));
      }
    }
    const LocalTensor<T> fused_in = fused_in_.Get<T>();
    Sync<HardEvent::V_MTE2>(*pipe_);
    DataCopy(fused_in, grad_[(image * (num_moved_ + 1) + num_moved_) * channels_], channels_);
    Sync<HardEvent::MTE2_V>(*pipe_);
    ToFloat(fused_.Get<float>(), fused_in);
    Sync<HardEvent::S_V>(*pipe_);  // the weights of the image before have been read
    if (num_tokens_ > prefix_) {
      weights_ = mean_.Load(image);
    }
    Sync<HardEvent::V_S>(*pipe_);
  }

  __aicore__ inline bool IsDropped(uint32_t row) {
    return row >= prefix_ && table_.Get<int32_t>().GetValue(row) < 0;
  }

  __aicore__ inline void Tile(uint64_t image, uint32_t first, uint32_t rows) {
    const LocalTensor<int32_t> table = table_.Get<int32_t>();
    LocalTensor<T> in = in_.template AllocTensor<T>();
    for (uint32_t r = 0; r < rows; ++r) {
      const int32_t j = table.GetValue(first + r);
      if (j >= 0) {
        DataCopy(in[r * channels_], grad_[(image * (num_moved_ + 1) + j) * channels_], channels_);
      } else if (IsDropped(first + r)) {
        DataCopy(in[r * channels_], x_[(image * num_tokens_ + first + r) * channels_], channels_);
      }
    }
    in_.EnQue(in);

    in = in_.template DeQue<T>();
    LocalTensor<T> out = done_.template AllocTensor<T>();
    const LocalTensor<float> partial = partial_.Get<float>();
    Sync<HardEvent::S_V>(*pipe_);  // the sums of the tile before have been read
    for (uint32_t r = 0; r < rows; ++r) {
      const LocalTensor<T> from = in[r * channels_], to = out[r * channels_];
      if (IsDropped(first + r)) {
        Dropped(to, from, partial[r * kBlockFloats], weights_.GetValue(first + r - prefix_));
      } else if (table.GetValue(first + r) >= 0) {
        DataCopy(to, from, channels_);
      } else {
        Duplicate(to.template ReinterpretCast<int16_t>(), static_cast<int16_t>(0),
                  static_cast<int32_t>(channels_ * sizeof(T) / sizeof(int16_t)));
      }
    }
    done_.EnQue(out);
    in_.FreeTensor(in);
    out = done_.template DeQue<T>();
    DataCopy(grad_x_[(image * num_tokens_ + first) * channels_], out, rows * channels_);
    done_.FreeTensor(out);

    Sync<HardEvent::V_S>(*pipe_);
    for (uint32_t r = 0; r < rows; ++r) {
      dots_.Append(IsDropped(first + r) ? SumOfBlock(partial[r * kBlockFloats]) : 0.0f);
    }
  }

  // to = weight * g; partial = x . g, folded onto 8 floats.
  __aicore__ inline void Dropped(const LocalTensor<T>& to, const LocalTensor<T>& x,
                                 const LocalTensor<float>& partial, float weight) {
    const LocalTensor<float> product = product_.Get<float>(), fused = fused_.Get<float>();
    const int32_t count = static_cast<int32_t>(channels_);
    ToFloat(product, x);
    Mul(product, product, fused, count);
    PipeBarrier<PIPE_V>();
    FoldOntoBlock(product, channels_);
    DataCopy(partial, product, kBlockFloats);
    PipeBarrier<PIPE_V>();
    Muls(product, fused, weight, count);
    PipeBarrier<PIPE_V>();
    if constexpr (sizeof(T) == sizeof(half)) {
      Cast(to, product, RoundMode::CAST_NONE, channels_);
    } else {
      DataCopy(to, product, channels_);
    }
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void ToFloat(const LocalTensor<float>& to, const LocalTensor<T>& from) {
    if constexpr (sizeof(T) == sizeof(half)) {
      Cast(to, from, RoundMode::CAST_NONE, channels_);
    } else {
      DataCopy(to, from, channels_);
    }
    PipeBarrier<PIPE_V>();
  }

  TPipe* pipe_;
  Share share_;
  HeadMean<TS, 1> mean_;
  IndexRow index_;
  FlatWriter<float> dots_;
  TQue<TPosition::VECIN, 2> in_;
  TQue<TPosition::VECOUT, 2> done_;
  TBuf<TPosition::VECIN> fused_in_;
  TBuf<TPosition::VECCALC> table_, fused_, product_, partial_;
  LocalTensor<float> weights_;
  GlobalTensor<T> grad_, x_, grad_x_;
  uint32_t num_tokens_, num_moved_, channels_, prefix_, tile_rows_;
};

template <typename T, typename TS>
__aicore__ inline void RunFuseBackward(const FuseBackwardArgs& a) {
  TPipe pipe;
  FuseBackward<T, TS> kernel;
  kernel.Init(&pipe, a);
  kernel.Run();
}

}  // namespace skipvit

extern "C" __global__ __aicore__ void skipvit_fuse_backward(
    GM_ADDR grad, GM_ADDR x, GM_ADDR scores, GM_ADDR index, GM_ADDR grad_x, GM_ADDR dots,
    uint64_t total_rows, uint64_t rows_per_core, uint32_t dtype, uint32_t scores_dtype,
    uint32_t num_tokens, uint32_t num_moved, uint32_t channels, uint32_t heads, uint32_t prefix,
    uint32_t tile_rows) {
  using namespace skipvit;
  const FuseBackwardArgs a{grad,     x,          scores,        index,      grad_x,
                           dots,     total_rows, rows_per_core, num_tokens, num_moved,
                           channels, heads,      prefix,        tile_rows};
  if (dtype == kFloat16 && scores_dtype == kFloat16) {
    RunFuseBackward<half, half>(a);
  } else if (dtype == kFloat16) {
    RunFuseBackward<half, float>(a);
  } else if (scores_dtype == kFloat16) {
    RunFuseBackward<float, half>(a);
  } else {
    RunFuseBackward<float, float>(a);
  }
}
