// SPDX-License-Identifier: Apache-2.0
// sum_rows: out[b] = sum of weight * x[b, r] over the rows r >= prefix that the index does not
// name, in float32: eight sums of every eighth of them, then the eight. With scores the weight is
// their mean over the heads (the fused row of gather_topk_fuse), without them it is 1 (the gradient
// of scatter_back to its update). The work is shared by image and block of columns; a block's sums
// depend on nothing else. A tile is eight rows.
#include "named.h"
#include "scores.h"

namespace skipvit {

struct SumRowsArgs {
  GM_ADDR x;
  GM_ADDR scores;
  GM_ADDR index;
  GM_ADDR out;
  uint64_t total_items, items_per_core;
  uint32_t num_tokens, num_moved, channels, heads, prefix, out_stride, block_channels;
};

template <typename T, typename TS>  // of the rows, of the scores
class SumRows {
 public:
  __aicore__ inline void Init(TPipe* pipe, const SumRowsArgs& a) {
    pipe_ = pipe;
    num_tokens_ = a.num_tokens;
    channels_ = a.channels;
    prefix_ = a.prefix;
    out_stride_ = a.out_stride;
    block_channels_ = a.block_channels;
    weighted_ = a.scores != nullptr && a.num_tokens > a.prefix;
    x_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.x));
    out_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.out));
    if (weighted_) {
      mean_.Init(pipe, a.scores, a.heads, a.num_tokens - a.prefix);
    }
    named_.Init(pipe, a.index, a.num_tokens, a.num_moved);
    pipe->InitBuffer(in_, 3, kRowSums * a.block_channels * sizeof(T));
    pipe->InitBuffer(done_, 1, a.block_channels * sizeof(T));
    pipe->InitBuffer(sums_, kRowSums * a.block_channels * sizeof(float));
    if constexpr (sizeof(T) == sizeof(half)) {
      pipe->InitBuffer(wide_, kRowSums * a.block_channels * sizeof(float));
    }
  }

  __aicore__ inline void Run(const SumRowsArgs& a) {
    const uint32_t blocks = (channels_ + block_channels_ - 1) / block_channels_;
    const Share share = CoreShare(a.total_items, a.items_per_core);
    for (uint64_t item = share.begin; item < share.end; ++item) {
      const uint64_t image = item / blocks;
      const uint32_t first = static_cast<uint32_t>(item % blocks) * block_channels_;
      Block(image, first, Smaller(block_channels_, channels_ - first));
    }
  }

 private:
  __aicore__ inline void Block(uint64_t image, uint32_t first, uint32_t count) {
    LocalTensor<float> weights;
    if (weighted_) {
      Sync<HardEvent::S_V>(*pipe_);  // the weights of the block before have been read
      weights = mean_.Load(image);
    }
    named_.Load(image);
    if (weighted_) {
      Sync<HardEvent::V_S>(*pipe_);
    }
    const LocalTensor<float> sums = sums_.Get<float>();
    Duplicate(sums, 0.0f, static_cast<int32_t>(kRowSums * count));
    PipeBarrier<PIPE_V>();
    for (uint32_t next = prefix_; next < num_tokens_;) {
      const uint32_t start = next;
      LocalTensor<T> in = in_.template AllocTensor<T>();
      const uint32_t rows = LoadTile(in, image, first, count, next);
      in_.EnQue(in);
      in = in_.template DeQue<T>();
      if (rows > 0) {
        AddTile(Widen(in, rows * count), weights, start, rows, count);
      }
      in_.FreeTensor(in);
    }
    for (uint32_t left = kRowSums / 2; left > 0; left /= 2) {
      Add(sums, sums, sums[left * count], static_cast<int32_t>(left * count));
      PipeBarrier<PIPE_V>();
    }
    LocalTensor<T> out = done_.template AllocTensor<T>();
    if constexpr (sizeof(T) == sizeof(half)) {
      Cast(out, sums, RoundMode::CAST_NONE, count);
    } else {
      DataCopy(out, sums, count);
    }
    PipeBarrier<PIPE_V>();
    done_.EnQue(out);
    out = done_.template DeQue<T>();
    DataCopy(out_[image * out_stride_ + first], out, count);
    done_.FreeTensor(out);
  }

  // Up to eight rows from `next` on that the index does not name; returns how many.
  __aicore__ inline uint32_t LoadTile(const LocalTensor<T>& in, uint64_t image, uint32_t first,
                                      uint32_t count, uint32_t& next) {
    const uint16_t length = static_cast<uint16_t>(count * sizeof(T) / kBlockBytes);
    const uint16_t gap = static_cast<uint16_t>((channels_ - count) * sizeof(T) / kBlockBytes);
    uint32_t loaded = 0;
    while (next < num_tokens_ && loaded < kRowSums) {
      if (named_.Has(next)) {
        ++next;
        continue;
      }
      uint32_t run = 1;
      while (next + run < num_tokens_ && loaded + run < kRowSums && !named_.Has(next + run)) {
        ++run;
      }
      DataCopy(in[loaded * count], x_[(image * num_tokens_ + next) * channels_ + first],
               DataCopyParams{static_cast<uint16_t>(run), length, gap, 0});
      loaded += run;
      next += run;
    }
    return loaded;
  }

  __aicore__ inline LocalTensor<float> Widen(const LocalTensor<half>& in, uint32_t count) {
    const LocalTensor<float> wide = wide_.Get<float>();
    Cast(wide, in, RoundMode::CAST_NONE, count);
    PipeBarrier<PIPE_V>();
    return wide;
  }

  __aicore__ inline LocalTensor<float> Widen(const LocalTensor<float>& in, uint32_t) { return in; }

  // Adds `rows` rows that begin with the first from `start` on that the index does not name.
  __aicore__ inline void AddTile(const LocalTensor<float>& tile, const LocalTensor<float>& weights,
                                 uint32_t start, uint32_t rows, uint32_t count) {
    const LocalTensor<float> sums = sums_.Get<float>();
    if (weighted_) {
      uint32_t row = start;
      for (uint32_t i = 0; i < rows; ++i, ++row) {
        while (named_.Has(row)) {
          ++row;
        }
        Muls(tile[i * count], tile[i * count], weights.GetValue(row - prefix_),
             static_cast<int32_t>(count));
      }
      PipeBarrier<PIPE_V>();
    }
    Add(sums, sums, tile, static_cast<int32_t>(rows * count));
    PipeBarrier<PIPE_V>();
  }

  TPipe* pipe_;
  HeadMean<TS, 1> mean_;
  NamedRows named_;
  TQue<TPosition::VECIN, 3> in_;
  TQue<TPosition::VECOUT, 1> done_;
  TBuf<TPosition::VECCALC> sums_, wide_;
  GlobalTensor<T> x_, out_;
  uint32_t num_tokens_, channels_, prefix_, out_stride_, block_channels_;
  bool weighted_;
};

template <typename T, typename TS>
__aicore__ inline void RunSumRows(const SumRowsArgs& a) {
  TPipe pipe;
  SumRows<T, TS> kernel;
  kernel.Init(&pipe, a);
  kernel.Run(a);
}

}  // namespace skipvit

extern "C" __global__ __aicore__ void skipvit_sum_rows(
    GM_ADDR x, GM_ADDR scores, GM_ADDR index, GM_ADDR out, uint64_t total_items,
    uint64_t items_per_core, uint32_t dtype, uint32_t scores_dtype, uint32_t num_tokens,
    uint32_t num_moved, uint32_t channels, uint32_t heads, uint32_t prefix, uint32_t out_stride,
    uint32_t block_channels) {
  using namespace skipvit;
  const SumRowsArgs a{x,         scores,   index, out,    total_items, items_per_core, num_tokens,
                      num_moved, channels, heads, prefix, out_stride,  block_channels};
  if (dtype == kFloat16 && scores_dtype == kFloat16) {
    RunSumRows<half, half>(a);
  } else if (dtype == kFloat16) {
    RunSumRows<half, float>(a);
  } else if (scores_dtype == kFloat16) {
    RunSumRows<float, half>(a);
  } else {
    RunSumRows<float, float>(a);
  }
}
