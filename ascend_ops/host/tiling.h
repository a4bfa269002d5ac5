// SPDX-License-Identifier: Apache-2.0
// How each kernel's work is cut: cores, the share of each, rows of a tile, bytes of unified buffer.
// Plain C++, no CANN: the tests sweep it. Every number here must agree with the InitBuffer calls of
// the kernel of the same name, and the tests hold it against the model's count.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../chip.h"

namespace skipvit {

struct Tiling {
  uint32_t cores;           // to launch on; each has something to do
  uint64_t total;           // items of the list that the cores share
  uint64_t per_core;        // items of each core but the last
  uint32_t tile_rows;       // rows of a buffer; 0: they do not fit
  uint32_t block_channels;  // sum_rows: columns of a block
  uint64_t ub_bytes;        // unified buffer in use
};

inline uint64_t round_up(uint64_t value, uint64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Shares as even as whole items allow, but of at least `least`, the last excepted; total > 0.
inline Tiling split(uint64_t total, uint64_t least, uint32_t cores) {
  const uint64_t per_core = std::max((total + cores - 1) / cores, least);
  return {static_cast<uint32_t>((total + per_core - 1) / per_core), total, per_core, 0, 0, 0};
}

// A buffer of 32 KB moves at full speed and leaves room for its double.
constexpr uint64_t kTileBytes = 32 * 1024;

// Rows per tile, at most `most` and a multiple of `unit`, given the bytes in use without tiles and
// for each row of all buffers of a tile.
inline void fit_tile(Tiling& tiling, uint64_t fixed, uint64_t row_bytes, uint64_t all_row_bytes,
                     uint64_t most = kMaxTileRows, uint64_t unit = 1) {
  uint64_t rows = std::min<uint64_t>(kTileBytes / row_bytes, most);
  rows = fixed > kUbBytes ? 0 : std::min(rows, (kUbBytes - fixed) / all_row_bytes);
  rows = rows / unit * unit;
  tiling.tile_rows = static_cast<uint32_t>(rows);
  tiling.ub_bytes = fixed + rows * all_row_bytes;
}

// HeadMean: `depth` buffers of scores, their mean and a scratch in float32.
inline uint64_t head_mean_bytes(uint64_t patches, uint64_t score_size, uint64_t depth) {
  return round_up(patches, 64) * (depth * score_size + 4 + 4);
}

// Selection: HeadMean, three keys, five bit sets, three masks.
inline uint64_t selection_bytes(uint64_t patches, uint64_t keep, uint64_t score_size) {
  const uint64_t padded = round_up(patches, 64);
  return keep == 0 ? 0
                   : head_mean_bytes(patches, score_size, 2) + 3 * 4 * padded +
                         5 * round_up(padded / 8, kBlockBytes) + 3 * kVectorBytes;
}

inline uint64_t index_row_bytes(uint64_t moved) {
  return round_up(std::max<uint64_t>(moved, 1) * 8, kBlockBytes);
}

// FlatWriter: what it stages, and a block.
inline uint64_t writer_bytes(uint64_t element_size) {
  return kWriterElements * element_size + kBlockBytes;
}

inline uint64_t table_bytes(uint64_t entries) { return round_up(entries * 4, kBlockBytes); }

// Shares of at least four rows: four int64 of the index are a block.
inline Tiling tile_gather_topk(uint64_t batch, uint64_t prefix, uint64_t patches, uint64_t keep,
                               uint64_t row_bytes, uint64_t score_size, uint32_t cores) {
  Tiling t = split(batch * (prefix + keep), 4, cores);
  fit_tile(t, selection_bytes(patches, keep, score_size) + writer_bytes(8), row_bytes,
           2 * row_bytes);
  return t;
}

inline Tiling tile_gather_rows(uint64_t batch, uint64_t moved, uint64_t row_bytes, uint32_t cores) {
  Tiling t = split(batch * moved, 1, cores);
  fit_tile(t, index_row_bytes(moved), row_bytes, 2 * row_bytes);
  return t;
}

inline Tiling tile_place_rows(uint64_t batch, uint64_t tokens, uint64_t moved, uint64_t row_bytes,
                              uint32_t cores) {
  Tiling t = split(batch * tokens, 1, cores);
  fit_tile(t, index_row_bytes(moved) + table_bytes(tokens) + row_bytes, row_bytes, 2 * row_bytes);
  return t;
}

// Items are (image, block of columns): as many blocks as it takes to give every core one, of at
// least 64 columns and at most 1024, fewer where tiles of eight rows do not fit.
// `patches` is 0 where all weights are 1.
inline Tiling tile_sum_rows(uint64_t batch, uint64_t tokens, uint64_t moved, uint64_t channels,
                            uint64_t element_size, uint64_t patches, uint64_t score_size,
                            uint32_t cores) {
  const uint64_t wanted = std::max<uint64_t>(1, cores / batch);
  uint64_t block = std::min({std::max<uint64_t>(64, round_up((channels + wanted - 1) / wanted, 16)),
                             channels, uint64_t{1024}});
  const uint64_t wide = element_size == 2 ? 4 : 0;
  for (;; block = round_up(block / 2, 16)) {
    Tiling t = split(batch * ((channels + block - 1) / block), 1, cores);
    t.block_channels = static_cast<uint32_t>(block);
    fit_tile(t,
             head_mean_bytes(patches, score_size, 1) + index_row_bytes(moved) +
                 round_up((tokens / 64 + 1) * 8, kBlockBytes) +
                 block * (element_size + kRowSums * 4),
             block * element_size, block * (3 * element_size + wide), kRowSums, kRowSums);
    if (t.tile_rows > 0 || block <= 64) {
      return t;
    }
  }
}

// Items are pieces of an image's patches. Those of one block or less of gradients to the scores are
// left to one core, which writes them one after the other.
inline Tiling tile_fuse_backward(uint64_t batch, uint64_t tokens, uint64_t moved, uint64_t channels,
                                 uint64_t element_size, uint64_t patches, uint64_t score_size,
                                 uint32_t cores) {
  const bool few = patches > 0 && patches * score_size < kBlockBytes;
  Tiling t = split(batch * std::max<uint64_t>(1, patches / kPiecePatches), 1, few ? 1 : cores);
  const uint64_t scores = patches == 0 ? 0
                                       : head_mean_bytes(patches, score_size, 1) +
                                             round_up(patches, 64) * (4 + score_size) +
                                             kBlockBytes + writer_bytes(score_size);
  const uint64_t fixed = scores + index_row_bytes(moved) + table_bytes(tokens) +
                         channels * (element_size + 4) + table_bytes(kBitRows);
  fit_tile(t, fixed, channels * element_size, channels * (4 * element_size + 4), kBitRows);
  return t;
}

// Items are images; a share has at least a block of scores.
inline Tiling tile_cls_scores(uint64_t batch, uint64_t tokens, uint64_t patches, uint64_t width,
                              uint64_t element_size, uint32_t cores) {
  const uint64_t block = kBlockBytes / 4;
  Tiling t = split(batch, (block + patches - 1) / patches, cores);
  fit_tile(t, writer_bytes(4) + width * (element_size + 4) + 3 * 4 * round_up(tokens, 8), width * 4,
           width * (2 * element_size + 4));
  return t;
}

}  // namespace skipvit
