// SPDX-License-Identifier: Apache-2.0
// place_rows: rows go to the positions that the index names, and the others are filled.
//   out[b, index[b, j]] = moved[b, j]             with `taken` instead 0, and
//   taken[b, j]         = base[b, index[b, j]]
//   out[b, r]           = base[b, r] + update[b]  elsewhere; without `base` 0, without `update`
//   base
// This is scatter_back, the gradient of gather_rows and gather_topk, and scatter_back's gradients
// to x and tokens. The cores share the output rows of all images; each inverts the index for its
// own rows. The vector unit touches only rows that are cleared or added to.
#include "inverse.h"

namespace skipvit {

struct PlaceRowsArgs {
  GM_ADDR moved;
  GM_ADDR base;
  GM_ADDR update;
  GM_ADDR index;
  GM_ADDR out;
  GM_ADDR taken;
  uint64_t total_rows, rows_per_core;
  uint32_t num_tokens, num_moved, channels, tile_rows;
};

template <typename T>
class PlaceRows {
 public:
  __aicore__ inline void Init(TPipe* pipe, const PlaceRowsArgs& a) {
    pipe_ = pipe;
    num_tokens_ = a.num_tokens;
    num_moved_ = a.num_moved;
    channels_ = a.channels;
    tile_rows_ = a.tile_rows;
    takes_ = a.taken != nullptr;
    has_base_ = a.base != nullptr;
    has_update_ = a.update != nullptr;
    moved_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.moved));
    base_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.base));
    update_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.update));
    out_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.out));
    taken_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.taken));
    const uint32_t row_bytes = channels_ * sizeof(T);
    pipe->InitBuffer(queue_, 2, tile_rows_ * row_bytes);
    pipe->InitBuffer(update_row_, row_bytes);
    inverse_.Init(pipe, a.index, num_tokens_, num_moved_);
  }

  __aicore__ inline void Run(const PlaceRowsArgs& a) {
    const Share share = CoreShare(a.total_rows, a.rows_per_core);
    for (uint64_t row = share.begin; row < share.end;) {
      const uint64_t image = row / num_tokens_;
      const uint32_t first = static_cast<uint32_t>(row % num_tokens_);
      const uint32_t count =
          static_cast<uint32_t>(Smaller<uint64_t>(num_tokens_ - first, share.end - row));
      inverse_.Load(image, first, count);
      if (has_update_) {
        Sync<HardEvent::V_MTE2>(*pipe_);  // the additions of the image before are done
        DataCopy(update_row_.template Get<T>(), update_[image * channels_], channels_);
        // The vector pipe waits for each tile, which MTE2 loads after this row.
      }
      for (uint32_t done = 0; done < count; done += tile_rows_) {
        const uint32_t rows = Smaller(tile_rows_, count - done);
        if (takes_) {
          Take(image, first, done, rows);
        } else {
          Place(image, first, done, rows);
        }
      }
      if (takes_) {
        ClearUntaken(image);
      }
      row += count;
    }
  }

 private:
  // How many rows from i on, whose entry is `entry`, are named one after the other or not at all;
  // `next` is the entry of the row after them.
  __aicore__ inline uint32_t RunOf(int32_t entry, uint32_t i, uint32_t end, int32_t& next) {
    uint32_t run = 1;
    for (; i + run < end; ++run) {
      next = inverse_.Entry(i + run);
      if (next != (entry < 0 ? entry : entry + static_cast<int32_t>(run))) {
        break;
      }
    }
    return run;
  }

  __aicore__ inline void Clear(const LocalTensor<T>& rows, uint32_t count) {
    Duplicate(rows.template ReinterpretCast<int16_t>(), static_cast<int16_t>(0),
              static_cast<int32_t>(count * channels_ * sizeof(T) / sizeof(int16_t)));
  }

  // Rows done .. done + rows of the share: neighbours in the source travel as one copy.
  __aicore__ inline void Place(uint64_t image, uint32_t first, uint32_t done, uint32_t rows) {
    LocalTensor<T> tile = queue_.template AllocTensor<T>();
    if (!has_base_) {
      Sync<HardEvent::MTE2_V>(*pipe_);  // the tile before has left this buffer
    }
    int32_t next = inverse_.Entry(done);
    for (uint32_t r = 0; r < rows;) {
      const int32_t entry = next;
      const uint32_t run = RunOf(entry, done + r, done + rows, next);
      if (entry >= 0) {
        DataCopy(tile[r * channels_], moved_[(image * num_moved_ + entry) * channels_],
                 run * channels_);
      } else if (has_base_) {
        DataCopy(tile[r * channels_], base_[(image * num_tokens_ + first + done + r) * channels_],
                 run * channels_);
      } else {
        Clear(tile[r * channels_], run);
      }
      r += run;
    }
    if (has_update_) {
      Sync<HardEvent::MTE2_V>(*pipe_);
      for (uint32_t r = 0; r < rows; ++r) {
        if (inverse_.Entry(done + r) < 0) {
          Add(tile[r * channels_], tile[r * channels_], update_row_.template Get<T>(),
              static_cast<int32_t>(channels_));
        }
      }
    }
    if (has_update_ || !has_base_) {
      Sync<HardEvent::V_MTE3>(*pipe_);
    }
    queue_.EnQue(tile);
    tile = queue_.template DeQue<T>();
    DataCopy(out_[(image * num_tokens_ + first + done) * channels_], tile, rows * channels_);
    queue_.FreeTensor(tile);
  }

  // The same where named rows go to `taken` and are cleared.
  __aicore__ inline void Take(uint64_t image, uint32_t first, uint32_t done, uint32_t rows) {
    const uint64_t row = image * num_tokens_ + first + done;
    LocalTensor<T> tile = queue_.template AllocTensor<T>();
    DataCopy(tile, base_[row * channels_], rows * channels_);
    queue_.EnQue(tile);
    tile = queue_.template DeQue<T>();
    for (uint32_t pass = 0; pass < 2; ++pass) {
      int32_t next = inverse_.Entry(done);
      for (uint32_t r = 0; r < rows;) {
        const int32_t entry = next;
        const uint32_t run = RunOf(entry, done + r, done + rows, next);
        if (entry >= 0 && pass == 0) {
          DataCopy(taken_[(image * num_moved_ + entry) * channels_], tile[r * channels_],
                   run * channels_);
        } else if (entry >= 0) {
          Clear(tile[r * channels_], run);
        }
        r += run;
      }
      if (pass == 0) {
        Sync<HardEvent::MTE3_V>(*pipe_);  // the rows have left
      }
    }
    Sync<HardEvent::V_MTE3>(*pipe_);
    DataCopy(out_[row * channels_], tile, rows * channels_);
    queue_.FreeTensor(tile);
  }

  // An entry that names no row, or a row that another entry names too, takes nothing: its row of
  // `taken` is 0, written by the core of the row, or of the image's first.
  __aicore__ inline void ClearUntaken(uint64_t image) {
    for (uint32_t j = 0; j < num_moved_ && !inverse_.Ascends(); ++j) {
      if (!inverse_.IsLost(j)) {
        continue;
      }
      LocalTensor<T> tile = queue_.template AllocTensor<T>();
      Sync<HardEvent::MTE2_V>(*pipe_);
      Clear(tile, 1);
      Sync<HardEvent::V_MTE3>(*pipe_);
      queue_.EnQue(tile);
      tile = queue_.template DeQue<T>();
      DataCopy(taken_[(image * num_moved_ + j) * channels_], tile, channels_);
      queue_.FreeTensor(tile);
    }
  }

  TPipe* pipe_;
  TQueBind<TPosition::VECIN, TPosition::VECOUT, 2> queue_;
  TBuf<TPosition::VECIN> update_row_;
  InverseIndex inverse_;
  GlobalTensor<T> moved_, base_, update_, out_, taken_;
  uint32_t num_tokens_, num_moved_, channels_, tile_rows_;
  bool has_base_, has_update_, takes_;
};

template <typename T>
__aicore__ inline void RunPlaceRows(const PlaceRowsArgs& a) {
  TPipe pipe;
  PlaceRows<T> kernel;
  kernel.Init(&pipe, a);
  kernel.Run(a);
}

}  // namespace skipvit

extern "C" __global__ __aicore__ void skipvit_place_rows(GM_ADDR moved, GM_ADDR base,
                                                         GM_ADDR update, GM_ADDR index, GM_ADDR out,
                                                         GM_ADDR taken, uint64_t total_rows,
                                                         uint64_t rows_per_core, uint32_t dtype,
                                                         uint32_t num_tokens, uint32_t num_moved,
                                                         uint32_t channels, uint32_t tile_rows) {
  using namespace skipvit;
  const PlaceRowsArgs a{moved,      base,          update,     index,     out,      taken,
                        total_rows, rows_per_core, num_tokens, num_moved, channels, tile_rows};
  if (dtype == kFloat16) {
    RunPlaceRows<half>(a);
  } else {
    RunPlaceRows<float>(a);
  }
}
