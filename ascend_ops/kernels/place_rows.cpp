// SPDX-License-Identifier: Apache-2.0
// place_rows: rows go to the positions that the index names, and the others are filled.
//   out[b, index[b, j]] = moved[b, j]             or 0 without `moved`
//   out[b, r]           = base[b, r] + update[b]  elsewhere; without `base` 0, without `update`
//   base
// This is scatter_back, the gradient of gather_rows and gather_topk, and scatter_back's gradient to
// x. The cores share the output rows of all images; each inverts the index for its own rows.
#include "common.h"

namespace skipvit {

enum RowKind : int32_t { kZeroRow, kBaseRow, kMovedRow };

template <typename T>
class PlaceRows {
 public:
  __aicore__ inline void Init(TPipe* pipe, GM_ADDR moved, GM_ADDR base, GM_ADDR update,
                              GM_ADDR index, GM_ADDR out, uint32_t num_tokens, uint32_t num_moved,
                              uint32_t channels, uint32_t tile_rows) {
    pipe_ = pipe;
    num_tokens_ = num_tokens;
    num_moved_ = num_moved;
    channels_ = channels;
    tile_rows_ = tile_rows;
    has_moved_ = moved != nullptr;
    has_base_ = base != nullptr;
    has_update_ = update != nullptr;
    moved_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(moved));
    base_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(base));
    update_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(update));
    out_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(out));
    const uint32_t row_bytes = channels * sizeof(T);
    pipe->InitBuffer(in_, 2, tile_rows * row_bytes);
    pipe->InitBuffer(done_, 2, tile_rows * row_bytes);
    pipe->InitBuffer(update_row_, row_bytes);
    pipe->InitBuffer(table_, RoundUp(num_tokens * sizeof(int32_t), kBlockBytes));
    index_.Init(pipe, index, num_moved > 0 ? num_moved : 1);
  }

  __aicore__ inline void Run(uint64_t total_rows, uint64_t rows_per_core) {
    const Share share = CoreShare(total_rows, rows_per_core);
    for (uint64_t row = share.begin; row < share.end;) {
      const uint64_t image = row / num_tokens_;
      const uint32_t first = static_cast<uint32_t>(row % num_tokens_);
      const uint32_t count =
          static_cast<uint32_t>(Smaller<uint64_t>(num_tokens_ - first, share.end - row));
      InvertIndex(image, first, count);
      if (has_update_) {
        Sync<HardEvent::V_MTE2>(*pipe_);  // the additions of the image before are done
        DataCopy(update_row_.template Get<T>(), update_[image * channels_], channels_);
        // The vector pipe waits for each tile, which MTE2 loads after this row.
      }
      for (uint32_t done = 0; done < count; done += tile_rows_) {
        Tile(image, first + done, done, Smaller(tile_rows_, count - done));
      }
      row += count;
    }
  }

 private:
  // table[i] = the j with index[image, j] == first + i, or -1.
  __aicore__ inline void InvertIndex(uint64_t image, uint32_t first, uint32_t count) {
    const LocalTensor<int32_t> table = table_.Get<int32_t>();
    for (uint32_t i = 0; i < count; ++i) {
      table.SetValue(i, -1);
    }
    if (num_moved_ == 0) {
      return;
    }
    index_.Load(image * num_moved_, num_moved_);
    for (uint32_t j = 0; j < num_moved_; ++j) {
      const int32_t i = index_.Row(j, num_tokens_) - static_cast<int32_t>(first);
      if (i >= 0 && i < static_cast<int32_t>(count)) {
        table.SetValue(i, static_cast<int32_t>(j));
      }
    }
  }

  __aicore__ inline RowKind Kind(int32_t entry) const {
    if (entry >= 0) {
      return has_moved_ ? kMovedRow : kZeroRow;
    }
    return has_base_ ? kBaseRow : kZeroRow;
  }

  __aicore__ inline bool Follows(int32_t entry, int32_t source, uint32_t run, RowKind kind) const {
    return Kind(entry) == kind &&
           (kind != kMovedRow || entry == source + static_cast<int32_t>(run));
  }

  // Rows first .. first + rows of the image, whose table entries begin at `entry`.
  __aicore__ inline void Tile(uint64_t image, uint32_t first, uint32_t entry, uint32_t rows) {
    const LocalTensor<int32_t> table = table_.Get<int32_t>();
    LocalTensor<T> in = in_.template AllocTensor<T>();
    for (uint32_t r = 0; r < rows;) {
      const int32_t source = table.GetValue(entry + r);
      const RowKind kind = Kind(source);
      uint32_t run = 1;  // neighbours in the source travel as one copy
      while (r + run < rows && Follows(table.GetValue(entry + r + run), source, run, kind)) {
        ++run;
      }
      if (kind == kMovedRow) {
        DataCopy(in[r * channels_], moved_[(image * num_moved_ + source) * channels_],
                 run * channels_);
      } else if (kind == kBaseRow) {
        DataCopy(in[r * channels_], base_[(image * num_tokens_ + first + r) * channels_],
                 run * channels_);
      }
      r += run;
    }
    in_.EnQue(in);

    in = in_.template DeQue<T>();
    LocalTensor<T> out = done_.template AllocTensor<T>();
    for (uint32_t r = 0; r < rows; ++r) {
      const RowKind kind = Kind(table.GetValue(entry + r));
      if (kind == kZeroRow) {
        Duplicate(out[r * channels_].template ReinterpretCast<int16_t>(), static_cast<int16_t>(0),
                  static_cast<int32_t>(channels_ * sizeof(T) / sizeof(int16_t)));
      } else if (kind == kBaseRow && has_update_) {
        Add(out[r * channels_], in[r * channels_], update_row_.template Get<T>(),
            static_cast<int32_t>(channels_));
      } else {
        DataCopy(out[r * channels_], in[r * channels_], channels_);
      }
    }
    done_.EnQue(out);
    in_.FreeTensor(in);

    out = done_.template DeQue<T>();
    DataCopy(out_[(image * num_tokens_ + first) * channels_], out, rows * channels_);
    done_.FreeTensor(out);
  }

  TPipe* pipe_;
  TQue<TPosition::VECIN, 2> in_;
  TQue<TPosition::VECOUT, 2> done_;
  TBuf<TPosition::VECIN> update_row_;
  TBuf<TPosition::VECCALC> table_;
  IndexRow index_;
  GlobalTensor<T> moved_, base_, update_, out_;
  uint32_t num_tokens_, num_moved_, channels_, tile_rows_;
  bool has_moved_, has_base_, has_update_;
};

}  // namespace skipvit

extern "C" __global__ __aicore__ void skipvit_place_rows(GM_ADDR moved, GM_ADDR base,
                                                         GM_ADDR update, GM_ADDR index, GM_ADDR out,
                                                         uint64_t total_rows,
                                                         uint64_t rows_per_core, uint32_t dtype,
                                                         uint32_t num_tokens, uint32_t num_moved,
                                                         uint32_t channels, uint32_t tile_rows) {
  AscendC::TPipe pipe;
  if (dtype == skipvit::kFloat16) {
    skipvit::PlaceRows<half> kernel;
    kernel.Init(&pipe, moved, base, update, index, out, num_tokens, num_moved, channels, tile_rows);
    kernel.Run(total_rows, rows_per_core);
  } else {
    skipvit::PlaceRows<float> kernel;
    kernel.Init(&pipe, moved, base, update, index, out, num_tokens, num_moved, channels, tile_rows);
    kernel.Run(total_rows, rows_per_core);
  }
}
