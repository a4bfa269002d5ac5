// SPDX-License-Identifier: Apache-2.0
// The K best of an image's patches, in the exact order of the specification, NaN included.
//
// The chip sorts half only, and has no NaN or infinity to compare with. So nothing is sorted and no
// score is compared: its 32 bits become two whole numbers, high and low, that order the scores
// lexicographically and that float32 holds exactly. Two searches by halves over those numbers, 17
// steps each of one vector comparison, find the K-th largest; scalar code then walks the patches
// upwards, which settles ties by position and gives the kept ones in order.
//
//   score bits      high             low
//   sign 0, m       m >> 16          m & 0xFFFF      (m: the 31 bits below the sign)
//   sign 1, m       -(m >> 16)       -(m & 0xFFFF)   (so -0 equals +0)
//   NaN             32768            0               (above every number, all of them equal)
#pragma once

#include "scores.h"

namespace skipvit {

constexpr int32_t kLanes = kVectorBytes / sizeof(float);
constexpr int32_t kLowestHigh = -32767, kHighestHigh = 32768;
constexpr int32_t kLowestLow = -65535, kHighestLow = 65535;

__aicore__ inline uint32_t CountBits(uint32_t v) {
  v -= (v >> 1) & 0x55555555u;
  v = (v & 0x33333333u) + ((v >> 2) & 0x33333333u);
  return (((v + (v >> 4)) & 0x0F0F0F0Fu) * 0x01010101u) >> 24;
}

template <typename T>  // of the scores
class Selection {
 public:
  __aicore__ inline void Init(TPipe* pipe, GM_ADDR scores, uint32_t heads, uint32_t patches,
                              uint32_t keep) {
    pipe_ = pipe;
    patches_ = patches;
    keep_ = keep;
    if (keep == 0) {
      return;
    }
    mean_.Init(pipe, scores, heads, patches);
    padded_ = mean_.Padded();
    pipe->InitBuffer(high_, padded_ * sizeof(float));
    pipe->InitBuffer(low_, padded_ * sizeof(float));
    pipe->InitBuffer(sign_, padded_ * sizeof(float));
    const uint32_t bit_bytes = RoundUp(padded_ / 8, kBlockBytes);
    pipe->InitBuffer(high_above_, bit_bytes);
    pipe->InitBuffer(high_equal_, bit_bytes);
    pipe->InitBuffer(low_above_, bit_bytes);
    pipe->InitBuffer(low_equal_, bit_bytes);
    pipe->InitBuffer(masks_, 3 * kVectorBytes);
    const LocalTensor<uint32_t> masks = masks_.Get<uint32_t>();
    Duplicate(masks, 0x7FFF0000u, kLanes);
    Duplicate(masks[kLanes], 0x0000FFFFu, kLanes);
    Duplicate(masks[2 * kLanes], 0x80000000u, kLanes);
    PipeBarrier<PIPE_V>();
  }

  // rows[prefix + i] = prefix + the i-th kept patch of `image`, for i < keep.
  __aicore__ inline void Select(uint64_t image, uint32_t prefix, const LocalTensor<int32_t>& rows) {
    if (keep_ == 0) {
      return;
    }
    SplitIntoKeys(mean_.Load(image));
    const LocalTensor<float> high = high_.Get<float>(), low = low_.Get<float>();

    const int32_t best_high = LargestWithCount(high, kLowestHigh, kHighestHigh, keep_, false);
    CompareWith(high_above_, high, best_high, CMPMODE::GT);
    CompareWith(high_equal_, high, best_high, CMPMODE::EQ);
    const uint32_t left = keep_ - CountLanes(high_above_, false);

    const int32_t best_low = LargestWithCount(low, kLowestLow, kHighestLow, left, true);
    CompareWith(low_above_, low, best_low, CMPMODE::GT);
    CompareWith(low_equal_, low, best_low, CMPMODE::EQ);
    uint32_t ties = left - CountLanes(low_above_, true);

    const LocalTensor<uint32_t> high_above = high_above_.Get<uint32_t>(),
                                high_equal = high_equal_.Get<uint32_t>(),
                                low_above = low_above_.Get<uint32_t>(),
                                low_equal = low_equal_.Get<uint32_t>();
    uint32_t row = prefix;
    for (uint32_t word = 0; word * 32 < patches_; ++word) {
      const uint32_t equal = high_equal.GetValue(word);
      const uint32_t above = high_above.GetValue(word) | (equal & low_above.GetValue(word));
      const uint32_t tie = equal & low_equal.GetValue(word);
      uint32_t bit = 0;
      for (uint32_t lanes = (above | tie) & ValidLanes(word); lanes != 0; lanes >>= 1, ++bit) {
        const bool is_tie = (tie >> bit & 1u) != 0;
        if ((lanes & 1u) == 0 || (is_tie && ties == 0)) {
          continue;
        }
        ties -= is_tie ? 1 : 0;
        rows.SetValue(row++, static_cast<int32_t>(prefix + word * 32 + bit));
      }
    }
  }

 private:
  // dst = the bits of `value` under mask i, as a whole number in float32.
  __aicore__ inline void MaskedToFloat(const LocalTensor<float>& dst,
                                       const LocalTensor<float>& value, int32_t i) {
    const uint8_t repeats = static_cast<uint8_t>(padded_ / kLanes);
    And(dst.ReinterpretCast<uint16_t>(), value.ReinterpretCast<uint16_t>(),
        masks_.Get<uint16_t>()[i * 2 * kLanes], 2 * kLanes, repeats, {1, 1, 1, 8, 8, 0});
    PipeBarrier<PIPE_V>();
    Cast(dst, dst.ReinterpretCast<int32_t>(), RoundMode::CAST_NONE, padded_);
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void SplitIntoKeys(const LocalTensor<float>& score) {
    const LocalTensor<float> high = high_.Get<float>(), low = low_.Get<float>(),
                             sign = sign_.Get<float>(), scratch = mean_.Scratch();
    const int32_t n = static_cast<int32_t>(padded_);
    MaskedToFloat(high, score, 0);
    MaskedToFloat(low, score, 1);
    MaskedToFloat(sign, score, 2);
    Muls(high, high, 0x1p-16f, n);  // 0 .. 32767
    Muls(sign, sign, 0x1p-30f, n);  // 0 or -2
    PipeBarrier<PIPE_V>();
    Adds(sign, sign, 1.0f, n);  // 1 or -1

    // nan = 1 where the 31 bits exceed infinity's, 0x7F80:0000, else 0. `score` is free from here.
    const LocalTensor<float>& nan = score;
    Duplicate(scratch, 1.0f, n);
    PipeBarrier<PIPE_V>();
    Min(nan, low, scratch, n);  // 1 where low > 0
    PipeBarrier<PIPE_V>();
    Mul(low, low, sign, n);
    PipeBarrier<PIPE_V>();
    Add(nan, nan, high, n);
    PipeBarrier<PIPE_V>();
    Mul(high, high, sign, n);
    PipeBarrier<PIPE_V>();
    Adds(nan, nan, -32640.0f, n);  // 0x7F80: above 0 for a NaN alone
    PipeBarrier<PIPE_V>();
    Min(nan, nan, scratch, n);
    PipeBarrier<PIPE_V>();
    Duplicate(scratch, 0.0f, n);
    PipeBarrier<PIPE_V>();
    Max(nan, nan, scratch, n);
    PipeBarrier<PIPE_V>();
    Muls(scratch, nan, -1.0f, n);
    PipeBarrier<PIPE_V>();
    Muls(nan, nan, static_cast<float>(kHighestHigh), n);
    PipeBarrier<PIPE_V>();
    Adds(scratch, scratch, 1.0f, n);  // 0 for a NaN
    PipeBarrier<PIPE_V>();
    Mul(high, high, scratch, n);
    Mul(low, low, scratch, n);
    PipeBarrier<PIPE_V>();
    Add(high, high, nan, n);
    PipeBarrier<PIPE_V>();
  }

  // One bit a lane: key (mode) value.
  __aicore__ inline void CompareWith(TBuf<TPosition::VECCALC>& bits, const LocalTensor<float>& key,
                                     int32_t value, CMPMODE mode) {
    Sync<HardEvent::S_V>(*pipe_);  // the scalar unit has read the bits before
    const LocalTensor<float> threshold = mean_.Scratch();
    Duplicate(threshold, static_cast<float>(value), static_cast<int32_t>(padded_));
    PipeBarrier<PIPE_V>();
    Compare(bits.Get<uint8_t>(), key, threshold, mode, padded_);
    PipeBarrier<PIPE_V>();
    Sync<HardEvent::V_S>(*pipe_);
  }

  __aicore__ inline uint32_t ValidLanes(uint32_t word) const {
    const uint32_t lanes = patches_ - word * 32;
    return lanes >= 32 ? 0xFFFFFFFFu : (1u << lanes) - 1;
  }

  // Patches whose bit is set, of all or of those that tie on the high key.
  __aicore__ inline uint32_t CountLanes(TBuf<TPosition::VECCALC>& bits, bool of_equal) {
    const LocalTensor<uint32_t> words = bits.Get<uint32_t>(), equal = high_equal_.Get<uint32_t>();
    uint32_t count = 0;
    for (uint32_t word = 0; word * 32 < patches_; ++word) {
      uint32_t lanes = words.GetValue(word) & ValidLanes(word);
      if (of_equal) {
        lanes &= equal.GetValue(word);
      }
      count += CountBits(lanes);
    }
    return count;
  }

  // The largest value in [lowest, highest] that at least `wanted` keys reach.
  __aicore__ inline int32_t LargestWithCount(const LocalTensor<float>& key, int32_t lowest,
                                             int32_t highest, uint32_t wanted, bool of_equal) {
    while (lowest < highest) {
      const int32_t middle = lowest + (highest - lowest + 1) / 2;
      CompareWith(low_above_, key, middle, CMPMODE::GE);
      if (CountLanes(low_above_, of_equal) >= wanted) {
        lowest = middle;
      } else {
        highest = middle - 1;
      }
    }
    return lowest;
  }

  TPipe* pipe_;
  HeadMean<T, 2> mean_;
  TBuf<TPosition::VECCALC> high_, low_, sign_, masks_;
  TBuf<TPosition::VECCALC> high_above_, high_equal_, low_above_, low_equal_;
  uint32_t patches_, keep_, padded_;
};

}  // namespace skipvit
