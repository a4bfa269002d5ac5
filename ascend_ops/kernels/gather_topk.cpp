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

// The rows of an image that come out, in order; each is written to the index when it is asked for.
template <typename T>
struct SelectedRows {
  Selection<T> selection;
  FlatWriter<int64_t> writer;
  uint32_t prefix, done;

  __aicore__ inline int32_t Pass() {
    const uint32_t row = done < prefix ? done : prefix + selection.Next();
    ++done;
    return static_cast<int32_t>(row);
  }

  __aicore__ inline int32_t Next() {
    const int32_t row = Pass();
    writer.Append(row);
    return row;
  }
};

template <typename T>  // of the scores
__aicore__ inline void GatherTopk(const GatherTopkArgs& a) {
  const Share share = CoreShare(a.total_rows, a.rows_per_core);
  const uint32_t prefix = a.num_tokens - a.patches, rows = prefix + a.keep;
  TPipe pipe;
  SelectedRows<T> selected;
  RowGather gather;
  selected.prefix = prefix;
  selected.selection.Init(&pipe, a.scores, a.heads, a.patches, a.keep);
  selected.writer.Init(&pipe, a.index, share.begin);
  gather.Init(&pipe, a.x, a.tokens, a.row_bytes, a.tile_rows);

  for (uint64_t row = share.begin; row < share.end;) {
    const uint64_t image = row / rows;
    const uint32_t first = static_cast<uint32_t>(row % rows);
    const uint32_t count = static_cast<uint32_t>(Smaller<uint64_t>(rows - first, share.end - row));
    selected.selection.Select(image);
    for (selected.done = 0; selected.done < first;) {  // rows of another core's share
      selected.Pass();
    }
    gather.Move(selected, count, image * a.num_tokens, image * a.out_stride + first);
    row += count;
  }
  selected.writer.Finish();
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
