// SPDX-License-Identifier: Apache-2.0
// sum_rows: out[b] = sum of weight * x[b, r] over the rows r >= prefix that the index does not
// name, in float32 and in ascending r. With scores the weight is their mean over the heads (the
// fused row of gather_topk_fuse), without them it is 1 (the gradient of scatter_back to its
// update). The work is shared by image and block of columns; a block's sums depend on nothing else.
#include "scores.h"

namespace skipvit {

struct SumRowsArgs {
  GM_ADDR x;
  GM_ADDR scores;
  GM_ADDR index;
  GM_ADDR out;
  uint64_t total_items, items_per_core;
  uint32_t num_tokens, num_moved, channels, heads, prefix, out_stride, block_channels, tile_rows;
};

template <typename T>
__aicore__ inline void AddRow(const LocalTensor<float>& sum, const LocalTensor<T>& row,
                              const LocalTensor<float>& scratch, bool weighted, float weight,
                              int32_t count) {
  if constexpr (sizeof(T) == sizeof(half)) {
    Cast(scratch, row, RoundMode::CAST_NONE, static_cast<uint32_t>(count));
  } else {
    DataCopy(scratch, row, static_cast<uint32_t>(count));
  }
  PipeBarrier<PIPE_V>();
  if (weighted) {
    Muls(scratch, scratch, weight, count);
    PipeBarrier<PIPE_V>();
  }
  Add(sum, sum, scratch, count);
  PipeBarrier<PIPE_V>();
}

template <typename T, typename TS>  // of the rows, of the scores
class SumRows {
 public:
  __aicore__ inline void Init(TPipe* pipe, const SumRowsArgs& a) {
    pipe_ = pipe;
    num_tokens_ = a.num_tokens;
    num_moved_ = a.num_moved;
    channels_ = a.channels;
    prefix_ = a.prefix;
    out_stride_ = a.out_stride;
    block_channels_ = a.block_channels;
    tile_rows_ = a.tile_rows;
    weighted_ = a.scores != nullptr && a.num_tokens > a.prefix;
    x_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.x));
    out_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.out));
    if (weighted_) {
      mean_.Init(pipe, a.scores, a.heads, a.num_tokens - a.prefix);
    }
    index_.Init(pipe, a.index, a.num_moved > 0 ? a.num_moved : 1);
    // A buffer of no bytes is none: where there are no rows the sum is 0 all the same.
    const uint32_t named = a.num_tokens > 0 ? a.num_tokens : 1;
    pipe->InitBuffer(named_, RoundUp(named * sizeof(int32_t), kBlockBytes));
    pipe->InitBuffer(rows_, RoundUp(a.tile_rows * sizeof(int32_t), kBlockBytes));
    pipe->InitBuffer(in_, 2, a.tile_rows * a.block_channels * sizeof(T));
    pipe->InitBuffer(done_, 1, a.block_channels * sizeof(T));
    pipe->InitBuffer(sum_, RoundUp(a.block_channels * sizeof(float), kBlockBytes));
    pipe->InitBuffer(scratch_, RoundUp(a.block_channels * sizeof(float), kBlockBytes));
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
  __aicore__ inline void MarkNamed(uint64_t image) {
    const LocalTensor<int32_t> named = named_.Get<int32_t>();
    for (uint32_t r = 0; r < num_tokens_; ++r) {
      named.SetValue(r, 0);
    }
    if (num_moved_ == 0) {
      return;
    }
    index_.Load(image * num_moved_, num_moved_);
    for (uint32_t j = 0; j < num_moved_; ++j) {
      const int32_t row = index_.Row(j, num_tokens_);
      if (row >= 0) {
        named.SetValue(row, 1);
      }
    }
  }

  __aicore__ inline void Block(uint64_t image, uint32_t first, uint32_t count) {
    MarkNamed(image);
    LocalTensor<float> weights;
    if (weighted_) {
      Sync<HardEvent::S_V>(*pipe_);  // the weights of the block before have been read
      weights = mean_.Load(image);
      Sync<HardEvent::V_S>(*pipe_);
    }
    const LocalTensor<float> sum = sum_.Get<float>(), scratch = scratch_.Get<float>();
    Duplicate(sum, 0.0f, static_cast<int32_t>(count));
    PipeBarrier<PIPE_V>();
    for (uint32_t next = prefix_; next < num_tokens_;) {
      LocalTensor<T> in = in_.template AllocTensor<T>();
      const uint32_t rows = LoadTile(in, image, first, count, next);
      in_.EnQue(in);
      in = in_.template DeQue<T>();
      for (uint32_t i = 0; i < rows; ++i) {
        const int32_t row = rows_.Get<int32_t>().GetValue(i);
        const float weight = weighted_ ? weights.GetValue(row - prefix_) : 1.0f;
        AddRow(sum, in[i * count], scratch, weighted_, weight, static_cast<int32_t>(count));
      }
      in_.FreeTensor(in);
    }
    LocalTensor<T> out = done_.template AllocTensor<T>();
    if constexpr (sizeof(T) == sizeof(half)) {
      Cast(out, sum, RoundMode::CAST_NONE, count);
    } else {
      DataCopy(out, sum, count);
    }
    PipeBarrier<PIPE_V>();
    done_.EnQue(out);
    out = done_.template DeQue<T>();
    DataCopy(out_[image * out_stride_ + first], out, count);
    done_.FreeTensor(out);
  }

  // Up to tile_rows rows from `next` on that the index does not name; returns how many.
  __aicore__ inline uint32_t LoadTile(const LocalTensor<T>& in, uint64_t image, uint32_t first,
                                      uint32_t count, uint32_t& next) {
    const LocalTensor<int32_t> named = named_.Get<int32_t>(), rows = rows_.Get<int32_t>();
    const uint16_t length = static_cast<uint16_t>(count * sizeof(T) / kBlockBytes);
    const uint16_t gap = static_cast<uint16_t>((channels_ - count) * sizeof(T) / kBlockBytes);
    uint32_t loaded = 0;
    while (next < num_tokens_ && loaded < tile_rows_) {
      if (named.GetValue(next) != 0) {
        ++next;
        continue;
      }
      uint32_t run = 0;
      while (next + run < num_tokens_ && loaded + run < tile_rows_ &&
             named.GetValue(next + run) == 0) {
        rows.SetValue(loaded + run, static_cast<int32_t>(next + run));
        ++run;
      }
      DataCopy(in[loaded * count], x_[(image * num_tokens_ + next) * channels_ + first],
               DataCopyParams{static_cast<uint16_t>(run), length, gap, 0});
      loaded += run;
      next += run;
    }
    return loaded;
  }

  TPipe* pipe_;
  HeadMean<TS, 2> mean_;
  IndexRow index_;
  TQue<TPosition::VECIN, 2> in_;
  TQue<TPosition::VECOUT, 1> done_;
  TBuf<TPosition::VECCALC> named_, rows_, sum_, scratch_;
  GlobalTensor<T> x_, out_;
  uint32_t num_tokens_, num_moved_, channels_, prefix_, out_stride_, block_channels_, tile_rows_;
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
    uint32_t block_channels, uint32_t tile_rows) {
  using namespace skipvit;
  const SumRowsArgs a{x,         scores,   index, out,    total_items, items_per_core, num_tokens,
                      num_moved, channels, heads, prefix, out_stride,  block_channels, tile_rows};
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
