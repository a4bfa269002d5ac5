// SPDX-License-Identifier: Apache-2.0
// gather_rows: out[b, r] = x[b, index[b, r]]. The cores share the output rows of all images.
#include "gather.h"

namespace skipvit {

struct IndexedRows {
  IndexRow index;
  uint32_t num_tokens, next;

  __aicore__ inline int32_t Next() {
    const int32_t row = index.Row(next++, num_tokens);
    return row < 0 ? 0 : row;  // a row out of range must not leave the tensor
  }
};

}  // namespace skipvit

extern "C" __global__ __aicore__ void skipvit_gather_rows(GM_ADDR x, GM_ADDR index, GM_ADDR out,
                                                          uint64_t total_rows,
                                                          uint64_t rows_per_core,
                                                          uint32_t num_tokens, uint32_t moved,
                                                          uint32_t row_bytes, uint32_t tile_rows) {
  using namespace skipvit;
  const Share share = CoreShare(total_rows, rows_per_core);
  TPipe pipe;
  IndexedRows rows;
  RowGather gather;
  rows.num_tokens = num_tokens;
  rows.index.Init(&pipe, index, moved);
  gather.Init(&pipe, x, out, row_bytes, tile_rows);

  for (uint64_t row = share.begin; row < share.end;) {
    const uint64_t image = row / moved;
    const uint32_t first = static_cast<uint32_t>(row % moved);
    const uint32_t count = static_cast<uint32_t>(Smaller<uint64_t>(moved - first, share.end - row));
    rows.index.Load(row, count);
    rows.next = 0;
    gather.Move(rows, count, image * num_tokens, row);
    row += count;
  }
}
