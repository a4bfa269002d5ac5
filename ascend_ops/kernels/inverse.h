// SPDX-License-Identifier: Apache-2.0
// The inverse of one image's index.
#pragma once

#include "common.h"

namespace skipvit {

class InverseIndex {
 public:
  __aicore__ inline void Init(TPipe* pipe, GM_ADDR index, uint32_t num_tokens, uint32_t num_moved) {
    pipe_ = pipe;
    num_tokens_ = num_tokens;
    num_moved_ = num_moved;
    index_.Init(pipe, index, num_moved > 0 ? num_moved : 1);
    pipe->InitBuffer(buffer_, RoundUp(num_tokens * sizeof(int32_t), kBlockBytes));
    table_ = buffer_.Get<int32_t>();
  }

  // For rows [first, first + count) of `image`.
  __aicore__ inline void Load(uint64_t image, uint32_t first, uint32_t count) {
    first_ = first;
    count_ = count;
    Sync<HardEvent::S_V>(*pipe_);  // the scalar unit has read the table before
    Duplicate(table_, static_cast<int32_t>(-1), static_cast<int32_t>(count));
    if (num_moved_ > 0) {
      index_.Load(image * num_moved_, num_moved_);
    }
    Sync<HardEvent::V_S>(*pipe_);
    ascends_ = true;
    int32_t last = -1;
    for (uint32_t j = 0; j < num_moved_; ++j) {
      const int32_t row = index_.Row(j, num_tokens_), i = row - static_cast<int32_t>(first);
      ascends_ = ascends_ && row > last;
      last = row;
      if (i >= 0 && i < static_cast<int32_t>(count)) {
        table_.SetValue(i, static_cast<int32_t>(j));
      }
    }
  }

  // The entry that names row first + i, the last of them if there are several, or -1.
  __aicore__ inline int32_t Entry(uint32_t i) const { return table_.GetValue(i); }

  // Entry j names no row of the image, or one of these rows that a later entry names too. The
  // former are told to the one who has the image's first row.
  __aicore__ inline bool IsLost(uint32_t j) const {
    const int32_t row = index_.Row(j, num_tokens_), i = row - static_cast<int32_t>(first_);
    if (row < 0) {
      return first_ == 0;
    }
    return i >= 0 && i < static_cast<int32_t>(count_) && Entry(i) != static_cast<int32_t>(j);
  }

  // The entries ascend, as those of a selection do: then none is lost.
  __aicore__ inline bool Ascends() const { return ascends_; }

 private:
  TPipe* pipe_;
  IndexRow index_;
  TBuf<TPosition::VECCALC> buffer_;
  LocalTensor<int32_t> table_;
  uint32_t num_tokens_, num_moved_, first_, count_;
  bool ascends_;
};

}  // namespace skipvit
