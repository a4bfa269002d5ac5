// SPDX-License-Identifier: Apache-2.0
// Copies rows of x that are named one by one, double-buffered, untouched by the vector unit.
#pragma once

#include "common.h"

namespace skipvit {

class RowGather {
 public:
  __aicore__ inline void Init(TPipe* pipe, GM_ADDR x, GM_ADDR out, uint32_t row_bytes,
                              uint32_t tile_rows) {
    width_ = row_bytes / sizeof(int16_t);
    tile_rows_ = tile_rows;
    x_.SetGlobalBuffer(reinterpret_cast<__gm__ int16_t*>(x));
    out_.SetGlobalBuffer(reinterpret_cast<__gm__ int16_t*>(out));
    pipe->InitBuffer(queue_, 2, tile_rows * row_bytes);
  }

  // out[out_row + i] = x[x_row + the i-th of rows.Next()] for i < count. Neighbours in x travel as
  // one copy.
  template <typename Rows>
  __aicore__ inline void Move(Rows& rows, uint32_t count, uint64_t x_row, uint64_t out_row) {
    for (uint32_t done = 0; done < count; done += tile_rows_) {
      const uint32_t end = Smaller(tile_rows_, count - done);
      LocalTensor<int16_t> tile = queue_.AllocTensor<int16_t>();
      int32_t next = rows.Next();
      for (uint32_t r = 0; r < end;) {
        const int32_t first = next;
        uint32_t run = 1;
        for (; r + run < end; ++run) {
          next = rows.Next();
          if (next != first + static_cast<int32_t>(run)) {
            break;
          }
        }
        DataCopy(tile[r * width_], x_[(x_row + first) * width_], run * width_);
        r += run;
      }
      queue_.EnQue(tile);
      tile = queue_.DeQue<int16_t>();
      DataCopy(out_[(out_row + done) * width_], tile, end * width_);
      queue_.FreeTensor(tile);
    }
  }

 private:
  TQueBind<TPosition::VECIN, TPosition::VECOUT, 2> queue_;
  GlobalTensor<int16_t> x_, out_;
  uint32_t width_, tile_rows_;
};

}  // namespace skipvit
