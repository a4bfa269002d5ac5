// SPDX-License-Identifier: Apache-2.0
// Which rows of an image its index names, one bit each.
#pragma once

#include "common.h"

namespace skipvit {

class NamedRows {
 public:
  __aicore__ inline void Init(TPipe* pipe, GM_ADDR index, uint32_t num_tokens, uint32_t num_moved) {
    num_tokens_ = num_tokens;
    num_moved_ = num_moved;
    words_ = num_tokens / 64 + 1;
    index_.Init(pipe, index, num_moved > 0 ? num_moved : 1);
    pipe->InitBuffer(buffer_, RoundUp(words_ * sizeof(uint64_t), kBlockBytes));
    bits_ = buffer_.Get<uint64_t>();
  }

  __aicore__ inline void Load(uint64_t image) {
    for (uint32_t i = 0; i < words_; ++i) {
      bits_.SetValue(i, 0);
    }
    at_ = 0;
    word_ = 0;
    if (num_moved_ > 0) {
      index_.Load(image * num_moved_, num_moved_);
    }
    for (uint32_t j = 0; j < num_moved_; ++j) {
      const int32_t row = index_.Row(j, num_tokens_);
      if (row >= 0) {
        Fetch(static_cast<uint32_t>(row));
        word_ |= uint64_t{1} << (row % 64);
      }
    }
    bits_.SetValue(at_, word_);
  }

  __aicore__ inline bool Has(uint32_t row) {
    if (row / 64 != at_) {
      at_ = row / 64;
      word_ = bits_.GetValue(at_);
    }
    return (word_ >> (row % 64) & 1u) != 0;
  }

 private:
  // The word of `row` in a register; the index mostly ascends, so few are fetched twice.
  __aicore__ inline void Fetch(uint32_t row) {
    if (row / 64 != at_) {
      bits_.SetValue(at_, word_);
      at_ = row / 64;
      word_ = bits_.GetValue(at_);
    }
  }

  IndexRow index_;
  TBuf<TPosition::VECCALC> buffer_;
  LocalTensor<uint64_t> bits_;
  uint32_t num_tokens_, num_moved_, words_, at_;
  uint64_t word_;
};

}  // namespace skipvit
