// SPDX-License-Identifier: Apache-2.0
// Sums of float32 lanes. The chip documents reductions for half alone, so additions fold a row onto
// its first 32-byte block, and the scalar unit adds the eight floats that are left.
#pragma once

#include "common.h"

namespace skipvit {

constexpr uint32_t kBlockFloats = kBlockBytes / sizeof(float);

// Folds the first `count` floats, a multiple of 8, onto the first 8. The order is fixed by `count`.
__aicore__ inline void FoldOntoBlock(const LocalTensor<float>& row, uint32_t count) {
  for (uint32_t blocks = count / kBlockFloats; blocks > 1;) {
    const uint32_t half_up = (blocks + 1) / 2;
    Add(row, row, row[half_up * kBlockFloats],
        static_cast<int32_t>((blocks - half_up) * kBlockFloats));
    PipeBarrier<PIPE_V>();
    blocks = half_up;
  }
}

// The same for `rows` rows of `count` floats, one instruction for 64 columns of all of them.
__aicore__ inline void FoldRowsOntoBlock(const LocalTensor<float>& tile, uint32_t rows,
                                         uint32_t count) {
  const uint32_t lanes = kVectorBytes / sizeof(float);
  const uint8_t stride = static_cast<uint8_t>(count / kBlockFloats);
  for (uint32_t blocks = count / kBlockFloats; blocks > 1;) {
    const uint32_t half_up = (blocks + 1) / 2, width = (blocks - half_up) * kBlockFloats;
    for (uint32_t done = 0; done < width; done += lanes) {
      Add(tile[done], tile[done], tile[half_up * kBlockFloats + done], Smaller(lanes, width - done),
          static_cast<uint8_t>(rows), {1, 1, 1, stride, stride, stride});
    }
    PipeBarrier<PIPE_V>();
    blocks = half_up;
  }
}

// The scalar unit adds the eight floats of a block that the vector pipe has finished.
__aicore__ inline float SumOfBlock(const LocalTensor<float>& block) {
  float sum = block.GetValue(0);
  for (uint32_t i = 1; i < kBlockFloats; ++i) {
    sum += block.GetValue(i);
  }
  return sum;
}

}  // namespace skipvit
