// SPDX-License-Identifier: Apache-2.0
// Sums of float32 lanes. Additions fold a row onto its first lanes. The last 64 of them a
// WholeReduceSum of float32 would add: the chip has the instruction and Huawei's open headers
// compile it for dav-c100, but its page names half alone for these chips. SKIPVIT_REDUCE_FLOAT
// builds with it, for whoever has seen it give the right sums; without, eight lanes are left to the
// scalar unit.
#pragma once

#include "common.h"

namespace skipvit {

constexpr uint32_t kBlockFloats = kBlockBytes / sizeof(float);
constexpr uint32_t kVectorFloats = kVectorBytes / sizeof(float);
#ifdef SKIPVIT_REDUCE_FLOAT
constexpr uint32_t kFoldedBlocks = kVectorBytes / kBlockBytes;
#else
constexpr uint32_t kFoldedBlocks = 1;
#endif

// Folds the first `count` floats of `row`, a multiple of 8, onto the first `to` blocks of 8 or
// fewer; returns how many. The order is fixed by `count`.
__aicore__ inline uint32_t FoldRow(const LocalTensor<float>& row, uint32_t count, uint32_t to) {
  uint32_t blocks = count / kBlockFloats;
  while (blocks > to) {
    const uint32_t half_up = (blocks + 1) / 2;
    Add(row, row, row[half_up * kBlockFloats],
        static_cast<int32_t>((blocks - half_up) * kBlockFloats));
    PipeBarrier<PIPE_V>();
    blocks = half_up;
  }
  return blocks;
}

// The same for `rows` rows, one instruction for 64 columns of all of them.
__aicore__ inline uint32_t FoldRows(const LocalTensor<float>& tile, uint32_t rows, uint32_t count,
                                    uint32_t to) {
  uint32_t blocks = count / kBlockFloats;
  if (blocks > 255) {  // more than the stride of a repeat reaches
    for (uint32_t r = 0; r < rows; ++r) {
      blocks = FoldRow(tile[r * count], count, to);
    }
    return blocks;
  }
  const uint8_t stride = static_cast<uint8_t>(blocks);
  while (blocks > to) {
    const uint32_t half_up = (blocks + 1) / 2, width = (blocks - half_up) * kBlockFloats;
    for (uint32_t done = 0; done < width; done += kVectorFloats) {
      Add(tile[done], tile[done], tile[half_up * kBlockFloats + done],
          Smaller(kVectorFloats, width - done), static_cast<uint8_t>(rows),
          {1, 1, 1, stride, stride, stride});
    }
    PipeBarrier<PIPE_V>();
    blocks = half_up;
  }
  return blocks;
}

// The scalar unit adds the eight floats of a block that the vector pipe has finished.
__aicore__ inline float SumOfBlock(const LocalTensor<float>& block) {
  float sum = block.GetValue(0);
  for (uint32_t i = 1; i < kBlockFloats; ++i) {
    sum += block.GetValue(i);
  }
  return sum;
}

// sums[r] = the sum of row r of `tile`, which is used up; the scalar unit has them.
__aicore__ inline void SumRowsOf(TPipe& pipe, const LocalTensor<float>& sums,
                                 const LocalTensor<float>& tile, uint32_t rows, uint32_t count) {
  [[maybe_unused]] const uint32_t blocks = FoldRows(tile, rows, count, kFoldedBlocks);
#ifdef SKIPVIT_REDUCE_FLOAT
  WholeReduceSum(sums, tile, static_cast<int32_t>(blocks * kBlockFloats),
                 static_cast<int32_t>(rows), 1, 1, static_cast<int32_t>(count / kBlockFloats));
  PipeBarrier<PIPE_V>();
  Sync<HardEvent::V_S>(pipe);
#else
  Sync<HardEvent::V_S>(pipe);
  for (uint32_t r = 0; r < rows; ++r) {
    sums.SetValue(r, SumOfBlock(tile[r * count]));
  }
#endif
}

}  // namespace skipvit
