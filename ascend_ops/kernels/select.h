// SPDX-License-Identifier: Apache-2.0
// The K best of an image's patches, in the exact order of the specification, NaN included.
//
// The chip sorts half only, and has no NaN or infinity to compare with. So nothing is sorted and no
// score is compared: its 32 bits become two whole numbers, high and low, that order the scores
// lexicographically and that float32 holds exactly. A search over the high numbers, then one over
// the low numbers of those that tie, finds the K-th largest: each round trip between vector and
// scalar unit compares with three thresholds and leaves a quarter of the range, and the search ends
// as soon as one of them has exactly the patches wanted above it. Scalar code then walks the bits
// upwards, which settles ties by position and gives the kept patches in order.
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
constexpr int32_t kLowestLow = -65535, kHighestLow = 65535, kHalfOfLow = 1 << 15;

constexpr uint32_t kThresholds = 3;  // of a round trip; 2 of their 3 bit sets are counted
// The first three high keys that are tried: 2^-13, 2^-8, 2^-3. A softmax over 8 to 8,000 patches
// has its K-th largest between them, which saves four round trips; other scores lose one.
constexpr int32_t kLikelyHigh = (127 - 13) << 7, kLikelyStep = 5 << 7;

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
    pipe->InitBuffer(above_, bit_bytes);
    pipe->InitBuffer(equal_, bit_bytes);
    for (uint32_t i = 0; i < kThresholds; ++i) {
      pipe->InitBuffer(reach_[i], bit_bytes);
    }
    pipe->InitBuffer(masks_, 3 * kVectorBytes);
    const LocalTensor<uint32_t> masks = masks_.Get<uint32_t>();
    Duplicate(masks, 0x7FFF0000u, kLanes);
    Duplicate(masks[kLanes], 0x0000FFFFu, kLanes);
    Duplicate(masks[2 * kLanes], 0x80000000u, kLanes);
    PipeBarrier<PIPE_V>();
  }

  // Finds the kept patches of `image`, which Next then gives.
  __aicore__ inline void Select(uint64_t image) {
    if (keep_ == 0) {
      return;
    }
    word_ = 0;
    lanes_ = 0;
    ties_ = 0;
    const LocalTensor<float> score = mean_.Load(image);
    SplitIntoKeys(score);
    const LocalTensor<float> high = high_.Get<float>(), low = low_.Get<float>();

    const Threshold best =
        Search(high, kLowestHigh, kHighestHigh, kLikelyHigh, kLikelyStep, keep_, false);
    of_equal_ = best.set < 0;
    sure_ = best.set;
    if (!of_equal_) {
      return;
    }
    CompareWith(above_, high, best.value, CMPMODE::GT);
    CompareWith(equal_, high, best.value, CMPMODE::EQ);
    const uint32_t left = keep_ - CountLanes(above_, false);
    const Threshold tie = Search(low, kLowestLow, kHighestLow, -kHalfOfLow, kHalfOfLow, left, true);
    sure_ = tie.set;
    if (sure_ < 0) {
      sure_ = 0;
      CompareWith(reach_[0], low, tie.value, CMPMODE::GT);
      CompareWith(reach_[1], low, tie.value, CMPMODE::EQ);
      ties_ = left - CountLanes(reach_[0], true);
    }
  }

  // The kept patches upwards, one a call, `keep` calls.
  __aicore__ inline uint32_t Next() {
    while (lanes_ == 0) {
      LoadWord();
    }
    for (; (lanes_ & 1u) == 0; lanes_ >>= 1) {
      ++patch_;
    }
    lanes_ >>= 1;
    return patch_++;
  }

 private:
  struct Threshold {
    int32_t value;
    int32_t set;  // of reach_: the wanted patches and no others; -1: more than those reach value
  };

  // The kept ones of the next 64 patches: those of reach_[sure_], or, where patches tie on the high
  // key, all above it and of those that tie the ones of reach_[sure_] and the first ties_ of
  // reach_[1].
  __aicore__ inline void LoadWord() {
    patch_ = word_ * 64;
    lanes_ = reach_[sure_].Get<uint64_t>().GetValue(word_);
    if (of_equal_) {
      const uint64_t equal = equal_.Get<uint64_t>().GetValue(word_);
      lanes_ = above_.Get<uint64_t>().GetValue(word_) | (lanes_ & equal);
      uint64_t tied = 0;
      if (ties_ > 0) {
        tied = reach_[1].Get<uint64_t>().GetValue(word_) & equal & ValidLanes(word_);
      }
      for (; tied != 0 && ties_ > 0; --ties_) {
        lanes_ |= tied & (~tied + 1);
        tied &= tied - 1;
      }
    }
    lanes_ &= ValidLanes(word_);
    ++word_;
  }

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

  __aicore__ inline uint64_t ValidLanes(uint32_t word) const {
    const uint32_t lanes = patches_ - word * 64;
    return lanes >= 64 ? ~uint64_t{0} : (uint64_t{1} << lanes) - 1;
  }

  // Patches whose bit is set, of all or of those that tie on the high key.
  __aicore__ inline uint32_t CountLanes(TBuf<TPosition::VECCALC>& bits, bool of_equal) {
    const LocalTensor<uint64_t> words = bits.Get<uint64_t>(), equal = equal_.Get<uint64_t>();
    uint32_t count = 0;
    for (uint32_t word = 0; word * 64 < patches_; ++word) {
      uint64_t lanes = words.GetValue(word) & ValidLanes(word);
      if (of_equal) {
        lanes &= equal.GetValue(word);
      }
      count += CountBits(lanes);
    }
    return count;
  }

  // reach_[i] = the keys that reach value + i * step. The thresholds lie in buffers that are free
  // once the keys are made.
  __aicore__ inline void CompareWithThree(const LocalTensor<float>& key, int32_t value,
                                          int32_t step) {
    const LocalTensor<float> thresholds[kThresholds] = {mean_.Scratch(), mean_.Mean(),
                                                        sign_.Get<float>()};
    Sync<HardEvent::S_V>(*pipe_);  // the scalar unit has counted the bits before
    for (uint32_t i = 0; i < kThresholds; ++i) {
      Duplicate(thresholds[i], static_cast<float>(value + static_cast<int32_t>(i) * step),
                static_cast<int32_t>(padded_));
    }
    PipeBarrier<PIPE_V>();
    for (uint32_t i = 0; i < kThresholds; ++i) {
      Compare(reach_[i].Get<uint8_t>(), key, thresholds[i], CMPMODE::GE, padded_);
    }
    PipeBarrier<PIPE_V>();  // the thresholds' buffers are written next
    Sync<HardEvent::V_S>(*pipe_);
  }

  // The largest value in [lowest, highest] that at least `wanted` keys reach, or any that exactly
  // `wanted` keys reach. Fewer than `wanted` keys reach highest + 1, at least as many lowest.
  // `value` and `step` are those of the first three thresholds.
  __aicore__ inline Threshold Search(const LocalTensor<float>& key, int32_t lowest, int32_t highest,
                                     int32_t value, int32_t step, uint32_t wanted, bool of_equal) {
    while (lowest < highest) {
      CompareWithThree(key, value, step);
      // The middle one first: the counts fall from one to the next, so two are enough.
      const uint32_t middle = CountLanes(reach_[1], of_equal);
      if (middle == wanted) {
        return {value + step, 1};
      }
      const int32_t other = middle > wanted ? 2 : 0;
      const uint32_t count = CountLanes(reach_[other], of_equal);
      if (count == wanted) {
        return {value + other * step, other};
      }
      const int32_t reached =
          other + (count > wanted ? 1 : 0);  // thresholds that enough keys reach
      if (reached < static_cast<int32_t>(kThresholds)) {
        highest = Smaller(highest, value + reached * step - 1);
      }
      if (reached > 0) {
        lowest = value + (reached - 1) * step;
      }
      step = (highest - lowest + 3) / 4;
      value = lowest + step;
    }
    return {lowest, -1};
  }

  TPipe* pipe_;
  HeadMean<T, 2> mean_;
  TBuf<TPosition::VECCALC> high_, low_, sign_, masks_;
  TBuf<TPosition::VECCALC> above_, equal_, reach_[kThresholds];
  uint32_t patches_, keep_, padded_;
  // What Next goes through.
  int32_t sure_;
  bool of_equal_;
  uint32_t ties_, word_, patch_;
  uint64_t lanes_;
};

}  // namespace skipvit
