// SPDX-License-Identifier: Apache-2.0
// gather_rows: out[b, r] = x[b, index[b, r]]. The cores share the output rows of all images.
#include "gather.h"

extern "C" __global__ __aicore__ void skipvit_gather_rows(GM_ADDR x, GM_ADDR index, GM_ADDR out,
                                                          uint64_t total_rows,
                                                          uint64_t rows_per_core,
                                                          uint32_t num_tokens, uint32_t moved,
                                                          uint32_t row_bytes, uint32_t tile_rows) {
  using namespace skipvit;
  const Share share = CoreShare(total_rows, rows_per_core);
  TPipe pipe;
  IndexRow index_row;
  RowGather gather;
  TBuf<TPosition::VECCALC> table_buffer;
  index_row.Init(&pipe, index, moved);
  gather.Init(&pipe, x, out, row_bytes, tile_rows);
  pipe.InitBuffer(table_buffer, RoundUp(moved * sizeof(int32_t), kBlockBytes));
  const LocalTensor<int32_t> table = table_buffer.Get<int32_t>();

  for (uint64_t row = share.begin; row < share.end;) {
    const uint64_t image = row / moved;
    const uint32_t first = static_cast<uint32_t>(row % moved);
    const uint32_t count = static_cast<uint32_t>(Smaller<uint64_t>(moved - first, share.end - row));
    index_row.Load(row, count);
    for (uint32_t i = 0; i < count; ++i) {
      const int32_t from = index_row.Row(i, num_tokens);
      table.SetValue(i, from < 0 ? 0 : from);  // a row out of range must not leave the tensor
    }
    gather.Move(table, count, image * num_tokens, row);
    row += count;
  }
}
