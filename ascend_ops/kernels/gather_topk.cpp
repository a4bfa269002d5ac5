// SPDX-License-Identifier: Apache-2.0
// gather_topk: select the best patches of each image, write their index, copy their rows.
//
// The output rows of all images form one list that the cores share evenly, so one image can keep
// all of them busy. Each core repeats the selection of the images that its rows belong to: that
// costs microseconds, needs no synchronisation between cores, and gives the same bits everywhere.
#include "gather.h"
#include "select.h"

namespace skipvit {

struct GatherTopkArgs {
  GM_ADDR x;
  GM_ADDR scores;
  GM_ADDR tokens;
  GM_ADDR index;
  uint64_t total_rows, rows_per_core;
  uint32_t num_tokens, row_bytes, heads, patches, keep, out_stride, tile_rows;
};

template <typename T>  // of the scores
__aicore__ inline void GatherTopk(const GatherTopkArgs& a) {
  const Share share = CoreShare(a.total_rows, a.rows_per_core);
  const uint32_t prefix = a.num_tokens - a.patches, rows = prefix + a.keep;
  TPipe pipe;
  Selection<T> selection;
  RowGather gather;
  FlatWriter<int32_t> writer;
  TBuf<TPosition::VECCALC> table_buffer;
  selection.Init(&pipe, a.scores, a.heads, a.patches, a.keep);
  gather.Init(&pipe, a.x, a.tokens, a.row_bytes, a.tile_rows);
  writer.Init(&pipe, a.index, share.begin * 2);
  pipe.InitBuffer(table_buffer, RoundUp(rows * sizeof(int32_t), kBlockBytes));
  const LocalTensor<int32_t> table = table_buffer.Get<int32_t>();
  for (uint32_t r = 0; r < prefix; ++r) {
    table.SetValue(r, static_cast<int32_t>(r));
  }

  for (uint64_t row = share.begin; row < share.end;) {
    const uint64_t image = row / rows;
    const uint32_t first = static_cast<uint32_t>(row % rows);
    const uint32_t count = static_cast<uint32_t>(Smaller<uint64_t>(rows - first, share.end - row));
    selection.Select(image, prefix, table);
    // Move reads the table element by element, so its slice may start anywhere.
    for (uint32_t i = 0; i < count; ++i) {
      const int32_t from = table.GetValue(first + i);
      writer.Append(from);  // an int64 below 2**31: low word, high word
      writer.Append(0);
    }
    gather.Move(table[first], count, image * a.num_tokens, image * a.out_stride + first);
    row += count;
  }
  writer.Finish();
}

}  // namespace skipvit

extern "C" __global__ __aicore__ void skipvit_gather_topk(
    GM_ADDR x, GM_ADDR scores, GM_ADDR tokens, GM_ADDR index, uint64_t total_rows,
    uint64_t rows_per_core, uint32_t scores_dtype, uint32_t num_tokens, uint32_t row_bytes,
    uint32_t heads, uint32_t patches, uint32_t keep, uint32_t out_stride, uint32_t tile_rows) {
  using namespace skipvit;
  const GatherTopkArgs a{x,         scores, tokens,  index, total_rows, rows_per_core, num_tokens,
                         row_bytes, heads,  patches, keep,  out_stride, tile_rows};
  if (scores_dtype == kFloat16) {
    GatherTopk<half>(a);
  } else {
    GatherTopk<float>(a);
  }
}
