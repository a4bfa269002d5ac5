// SPDX-License-Identifier: Apache-2.0
// fuse_backward, for gather_topk_fuse. With g the gradient of the fused row:
//   grad_x[b, index[b, j]] = grad[b, j];  of a dropped patch: score * g;  of another prefix row: 0
//   grad_scores[b, h, p]   = x[b, prefix + p] . g / heads for a dropped patch, 0 for a kept one
// The patches of all images, in pieces of 32 (an image's last has the rest, its first the prefix
// rows too), form one list that the cores share.
#include "fold.h"
#include "inverse.h"
#include "scores.h"

namespace skipvit {

struct FuseBackwardArgs {
  GM_ADDR grad;
  GM_ADDR x;
  GM_ADDR scores;
  GM_ADDR index;
  GM_ADDR grad_x;
  GM_ADDR grad_scores;
  uint64_t total_pieces, pieces_per_core;
  uint32_t num_tokens, num_moved, channels, heads, prefix, tile_rows;
};

template <typename T, typename TS,
          typename Bits>  // of the rows; of the scores, and as scalars move
class FuseBackward {
 public:
  __aicore__ inline void Init(TPipe* pipe, const FuseBackwardArgs& a) {
    pipe_ = pipe;
    share_ = CoreShare(a.total_pieces, a.pieces_per_core);
    num_tokens_ = a.num_tokens;
    num_moved_ = a.num_moved;
    channels_ = a.channels;
    heads_ = a.heads;
    prefix_ = a.prefix;
    patches_ = a.num_tokens - a.prefix;
    pieces_ = patches_ < kPiecePatches ? 1 : patches_ / kPiecePatches;
    tile_rows_ = a.tile_rows;
    grad_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.grad));
    x_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.x));
    grad_x_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.grad_x));
    grad_scores_.SetGlobalBuffer(reinterpret_cast<__gm__ Bits*>(a.grad_scores));
    inverse_.Init(pipe, a.index, num_tokens_, num_moved_);
    pipe->InitBuffer(in_, 2, tile_rows_ * channels_ * sizeof(T));
    pipe->InitBuffer(out_, 2, tile_rows_ * channels_ * sizeof(T));
    pipe->InitBuffer(wide_, tile_rows_ * channels_ * sizeof(float));
    pipe->InitBuffer(sums_, kBitRows * sizeof(float));
    pipe->InitBuffer(fused_in_, channels_ * sizeof(T));
    pipe->InitBuffer(fused_, channels_ * sizeof(float));
    if (patches_ > 0) {
      mean_.Init(pipe, a.scores, heads_, patches_);
      pipe->InitBuffer(dots_, mean_.Padded() * sizeof(float));
      pipe->InitBuffer(result_, mean_.Padded() * sizeof(TS));
      pipe->InitBuffer(last_, kBlockBytes);
      writer_.Init(pipe, a.grad_scores, share_.begin / pieces_ * heads_ * patches_);
    }
  }

  __aicore__ inline void Run() {
    for (uint64_t piece = share_.begin; piece < share_.end;) {
      const uint64_t image = piece / pieces_;
      const uint32_t begin = static_cast<uint32_t>(piece % pieces_);
      const uint32_t count =
          static_cast<uint32_t>(Smaller<uint64_t>(pieces_ - begin, share_.end - piece));
      const uint32_t first = FirstRow(begin), end = FirstRow(begin + count);
      LoadImage(image, first, end - first);
      Rows rows = LoadTile(image, first, first, Smaller(tile_rows_, end - first));
      for (uint32_t r = first + rows.count; r < end; r += tile_rows_) {
        // The next tile is on its way before the scalar unit waits for this one's sums.
        const Rows next = LoadTile(image, first, r, Smaller(tile_rows_, end - r));
        Compute(image, rows);
        rows = next;
      }
      Compute(image, rows);
      if (patches_ > 0) {
        StoreDots(image, first > prefix_ ? first - prefix_ : 0, end - prefix_);
      }
      piece += count;
    }
    if (patches_ > 0) {
      writer_.Finish();
    }
  }

 private:
  __aicore__ inline uint32_t FirstRow(uint32_t piece) const {
    return piece == 0 ? 0 : piece == pieces_ ? num_tokens_ : prefix_ + piece * kPiecePatches;
  }

  // The inverse of the index, the weights and, in float32, the gradient of the fused row.
  __aicore__ inline void LoadImage(uint64_t image, uint32_t first, uint32_t rows) {
    inverse_.Load(image, first, rows);
    const LocalTensor<T> fused_in = fused_in_.template Get<T>();
    Sync<HardEvent::V_MTE2>(*pipe_);
    DataCopy(fused_in, grad_[(image * (num_moved_ + 1) + num_moved_) * channels_], channels_);
    Sync<HardEvent::MTE2_V>(*pipe_);
    if constexpr (sizeof(T) == sizeof(half)) {
      Cast(fused_.Get<float>(), fused_in, RoundMode::CAST_NONE, channels_);
    } else {
      DataCopy(fused_.Get<float>(), fused_in, channels_);
    }
    PipeBarrier<PIPE_V>();
    if (patches_ > 0) {
      Duplicate(dots_.Get<float>(), 0.0f, static_cast<int32_t>(mean_.Padded()));  // of kept patches
      weights_ = mean_.Load(image);
    }
    Sync<HardEvent::V_S>(*pipe_);
  }

  // A tile on its way: its dropped rows, and the prefix rows that the index does not name, as bits.
  struct Rows {
    uint32_t first, count;
    uint64_t dropped, zero;
  };

  // Kept rows go to `out_` and need nothing more, dropped ones one after the other to `in_`.
  // `first` is the row that the inverse begins with.
  __aicore__ inline Rows LoadTile(uint64_t image, uint32_t first, uint32_t row, uint32_t count) {
    const LocalTensor<T> out = out_.template AllocTensor<T>(), in = in_.template AllocTensor<T>();
    Rows rows{row, count, 0, 0};
    uint32_t dropped = 0;
    int32_t next = inverse_.Entry(row - first);
    for (uint32_t r = 0; r < count;) {
      const int32_t entry = next;
      uint32_t run = 1;
      for (; r + run < count; ++run) {
        next = inverse_.Entry(row - first + r + run);
        if (entry >= 0 ? next != entry + static_cast<int32_t>(run)
                       : next >= 0 || row + r + run == prefix_) {
          break;
        }
      }
      const uint64_t bits = (~uint64_t{0} >> (64 - run)) << r;
      if (entry >= 0) {
        DataCopy(out[r * channels_], grad_[(image * (num_moved_ + 1) + entry) * channels_],
                 run * channels_);
      } else if (row + r < prefix_) {
        rows.zero |= bits;
      } else {
        DataCopy(in[dropped * channels_], x_[(image * num_tokens_ + row + r) * channels_],
                 run * channels_);
        rows.dropped |= bits;
        dropped += run;
      }
      r += run;
    }
    out_.EnQue(out);
    in_.EnQue(in);
    return rows;
  }

  __aicore__ inline void Compute(uint64_t image, const Rows& rows) {
    LocalTensor<T> in = in_.template DeQue<T>();
    const LocalTensor<T> out = out_.template DeQue<T>();
    // The queue waits for its loads; where the vector unit writes, the tile before must have left.
    Sync<HardEvent::MTE3_V>(*pipe_);
    if (rows.dropped != 0) {
      Dots(in, CountBits(rows.dropped));
      Spread(out, rows);
    }
    in_.FreeTensor(in);
    for (uint32_t r = 0; rows.zero >> r != 0 && r < rows.count; ++r) {
      if ((rows.zero >> r & 1u) != 0) {
        Duplicate(out[r * channels_].template ReinterpretCast<int16_t>(), static_cast<int16_t>(0),
                  static_cast<int32_t>(channels_ * sizeof(T) / sizeof(int16_t)));
      }
    }
    Sync<HardEvent::V_MTE3>(*pipe_);
    DataCopy(grad_x_[(image * num_tokens_ + rows.first) * channels_], out, rows.count * channels_);
    out_.FreeTensor(out);
  }

  // The products of `dropped` rows with the gradient of the fused row, in sums_.
  __aicore__ inline void Dots(const LocalTensor<T>& in, uint32_t dropped) {
    const LocalTensor<float> wide = wide_.Get<float>();
    Sync<HardEvent::S_V>(*pipe_);  // the sums of the tile before have been read
    if constexpr (sizeof(T) == sizeof(half)) {
      Cast(wide, in, RoundMode::CAST_NONE, dropped * channels_);
      PipeBarrier<PIPE_V>();
      TimesFused(wide, wide, dropped);
    } else {
      TimesFused(wide, in, dropped);
    }
    SumRowsOf(*pipe_, sums_.Get<float>(), wide, dropped, channels_);
    Sync<HardEvent::S_V>(*pipe_);
  }

  __aicore__ inline void TimesFused(const LocalTensor<float>& to, const LocalTensor<float>& rows,
                                    uint32_t count) {
    const LocalTensor<float> fused = fused_.Get<float>();
    for (uint32_t r = 0; r < count; ++r) {
      Mul(to[r * channels_], rows[r * channels_], fused, static_cast<int32_t>(channels_));
    }
    PipeBarrier<PIPE_V>();
  }

  // weight * g into the dropped rows of `out`, their sums to where their patches are.
  __aicore__ inline void Spread(const LocalTensor<T>& out, const Rows& rows) {
    const LocalTensor<float> wide = wide_.Get<float>(), fused = fused_.Get<float>(),
                             sums = sums_.Get<float>(), dots = dots_.Get<float>();
    const int32_t count = static_cast<int32_t>(channels_);
    uint32_t dropped = 0;
    for (uint32_t r = 0; r < rows.count; ++r) {
      if ((rows.dropped >> r & 1u) == 0) {
        continue;
      }
      const uint32_t patch = rows.first + r - prefix_;
      const float weight = weights_.GetValue(patch);
      if constexpr (sizeof(T) == sizeof(half)) {
        Muls(wide[r * channels_], fused, weight, count);
      } else {
        Muls(out[r * channels_], fused, weight, count);
      }
      dots.SetValue(patch, sums.GetValue(dropped));
      ++dropped;
    }
    PipeBarrier<PIPE_V>();
    if constexpr (sizeof(T) == sizeof(half)) {
      for (uint32_t r = 0; r < rows.count;) {
        const uint32_t run = RunOfOnes(rows.dropped >> r);
        if (run > 0) {
          Cast(out[r * channels_], wide[r * channels_], RoundMode::CAST_NONE, run * channels_);
        }
        r += run + 1;
      }
      PipeBarrier<PIPE_V>();
    }
  }

  __aicore__ inline uint32_t RunOfOnes(uint64_t bits) const {
    uint32_t run = 0;
    for (; (bits & 1u) != 0; bits >>= 1) {
      ++run;
    }
    return run;
  }

  // The dots of patches [first, end), divided by the heads, to each head.
  __aicore__ inline void StoreDots(uint64_t image, uint32_t first, uint32_t end) {
    const LocalTensor<float> dots = dots_.Get<float>()[first], divisor = mean_.Scratch();
    const LocalTensor<TS> result = result_.template Get<TS>()[first];
    const LocalTensor<Bits> bits = result_.template Get<Bits>()[first],
                            last = last_.template Get<Bits>();
    const uint32_t block = kBlockBytes / sizeof(TS), count = end - first, rest = count % block;
    Sync<HardEvent::S_V>(*pipe_);
    Sync<HardEvent::MTE3_V>(*pipe_);  // the result before has left
    Duplicate(divisor, static_cast<float>(heads_), static_cast<int32_t>(count));
    PipeBarrier<PIPE_V>();
    Div(dots, dots, divisor, static_cast<int32_t>(count));
    PipeBarrier<PIPE_V>();
    if constexpr (sizeof(TS) == sizeof(half)) {
      Cast(result, dots, RoundMode::CAST_NONE, count);
    } else {
      DataCopy(result, dots, RoundUp(count, kBlockFloats));
    }
    PipeBarrier<PIPE_V>();
    Sync<HardEvent::V_S>(*pipe_);
    if (count < block) {  // the host gives these to one core
      for (uint32_t i = 0; i < heads_ * count; ++i) {
        writer_.Append(bits.GetValue(i % count));
      }
      return;
    }
    Sync<HardEvent::MTE3_S>(*pipe_);
    for (uint32_t i = 0; i < block && rest > 0; ++i) {
      last.SetValue(i, bits.GetValue(count - block + i));
    }
    Sync<HardEvent::S_MTE3>(*pipe_);  // the scalar unit has waited for the vector unit
    for (uint32_t h = 0; h < heads_; ++h) {
      const uint64_t to = (image * heads_ + h) * patches_ + first;
      DataCopy(grad_scores_[to], bits, count - rest);
      if (rest > 0) {  // the last block once more, so that nothing is written past the piece
        DataCopy(grad_scores_[to + count - block], last, block);
      }
    }
  }

  TPipe* pipe_;
  Share share_;
  HeadMean<TS, 1> mean_;
  InverseIndex inverse_;
  FlatWriter<Bits> writer_;
  TQue<TPosition::VECIN, 2> in_;
  TQueBind<TPosition::VECIN, TPosition::VECOUT, 2> out_;
  TBuf<TPosition::VECIN> fused_in_;
  TBuf<TPosition::VECOUT> result_, last_;
  TBuf<TPosition::VECCALC> fused_, wide_, sums_, dots_;
  LocalTensor<float> weights_;
  GlobalTensor<T> grad_, x_, grad_x_;
  GlobalTensor<Bits> grad_scores_;
  uint32_t num_tokens_, num_moved_, channels_, heads_, prefix_, patches_, pieces_, tile_rows_;
};

template <typename T, typename TS, typename Bits>
__aicore__ inline void RunFuseBackward(const FuseBackwardArgs& a) {
  TPipe pipe;
  FuseBackward<T, TS, Bits> kernel;
  kernel.Init(&pipe, a);
  kernel.Run();
}

}  // namespace skipvit

extern "C" __global__ __aicore__ void skipvit_fuse_backward(
    GM_ADDR grad, GM_ADDR x, GM_ADDR scores, GM_ADDR index, GM_ADDR grad_x, GM_ADDR grad_scores,
    uint64_t total_pieces, uint64_t pieces_per_core, uint32_t dtype, uint32_t scores_dtype,
    uint32_t num_tokens, uint32_t num_moved, uint32_t channels, uint32_t heads, uint32_t prefix,
    uint32_t tile_rows) {
  using namespace skipvit;
  const FuseBackwardArgs a{
      grad,       x,         scores,   index, grad_x, grad_scores, total_pieces, pieces_per_core,
      num_tokens, num_moved, channels, heads, prefix, tile_rows};
  if (dtype == kFloat16 && scores_dtype == kFloat16) {
    RunFuseBackward<half, half, int16_t>(a);
  } else if (dtype == kFloat16) {
    RunFuseBackward<half, float, float>(a);
  } else if (scores_dtype == kFloat16) {
    RunFuseBackward<float, half, int16_t>(a);
  } else {
    RunFuseBackward<float, float, float>(a);
  }
}
