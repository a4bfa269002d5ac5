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

// Shares of whole `unit`s, as even as those allow; total > 0.
inline Tiling split(uint64_t total, uint64_t unit, uint32_t cores) {
  const uint64_t units = (total + unit - 1) / unit;
  const uint64_t per_core = (units + cores - 1) / cores * unit;
  return {static_cast<uint32_t>((total + per_core - 1) / per_core), total, per_core, 0, 0, 0};
}

// A buffer of 32 KB moves at full speed and leaves room for its double.
constexpr uint64_t kTileBytes = 32 * 1024;

// Rows per tile, given the bytes in use without tiles and for each row of all buffers of a tile.
inline void fit_tile(Tiling& tiling, uint64_t fixed, uint64_t row_bytes, uint64_t all_row_bytes) {
  uint64_t rows = std::min<uint64_t>(kTileBytes / row_bytes, kMaxTileRows);
  rows = fixed > kUbBytes ? 0 : std::min(rows, (kUbBytes - fixed) / all_row_bytes);
  tiling.tile_rows = static_cast<uint32_t>(rows);
  tiling.ub_bytes = fixed + rows * all_row_bytes;
}

// HeadMean: `depth` buffers of scores, their mean and a scratch in float32.
inline uint64_t head_mean_bytes(uint64_t patches, uint64_t score_size, uint64_t depth) {
  return round_up(patches, 64) * (depth * score_size + 4 + 4);
}

// Selection: HeadMean, three keys, four bit sets, three masks.
inline uint64_t selection_bytes(uint64_t patches, uint64_t keep, uint64_t score_size) {
  const uint64_t padded = round_up(patches, 64);
  return keep == 0 ? 0
                   : head_mean_bytes(patches, score_size, 2) + 3 * 4 * padded +
                         4 * round_up(padded / 8, kBlockBytes) + 3 * kVectorBytes;
}

inline uint64_t index_row_bytes(uint64_t moved) {
  return round_up(std::max<uint64_t>(moved, 1) * 8, kBlockBytes);
}

inline uint64_t table_bytes(uint64_t entries) { return round_up(entries * 4, kBlockBytes); }

// Shares of four rows: four int64 of the index are a block.
inline Tiling tile_gather_topk(uint64_t batch, uint64_t prefix, uint64_t patches, uint64_t keep,
                               uint64_t row_bytes, uint64_t score_size, uint32_t cores) {
  Tiling t = split(batch * (prefix + keep), 4, cores);
  fit_tile(
      t,
      selection_bytes(patches, keep, score_size) + kWriterElements * 4 + table_bytes(prefix + keep),
      row_bytes, 2 * row_bytes);
  return t;
}

inline Tiling tile_gather_rows(uint64_t batch, uint64_t moved, uint64_t row_bytes, uint32_t cores) {
  Tiling t = split(batch * moved, 1, cores);
  fit_tile(t, index_row_bytes(moved) + table_bytes(moved), row_bytes, 2 * row_bytes);
  return t;
}

inline Tiling tile_place_rows(uint64_t batch, uint64_t tokens, uint64_t moved, uint64_t row_bytes,
                              uint32_t cores) {
  Tiling t = split(batch * tokens, 1, cores);
  fit_tile(t, index_row_bytes(moved) + table_bytes(tokens) + row_bytes, row_bytes, 4 * row_bytes);
  return t;
}

// Items are (image, block of columns): as many blocks as it takes to give every core one, of at
// least 64 columns and at most 2048. `patches` is 0 where all weights are 1.
inline Tiling tile_sum_rows(uint64_t batch, uint64_t tokens, uint64_t moved, uint64_t channels,
                            uint64_t element_size, uint64_t patches, uint64_t score_size,
                            uint32_t cores) {
  const uint64_t wanted = std::max<uint64_t>(1, cores / batch);
  const uint64_t block =
      std::min({std::max<uint64_t>(64, round_up((channels + wanted - 1) / wanted, 16)), channels,
                uint64_t{2048}});
  Tiling t = split(batch * ((channels + block - 1) / block), 1, cores);
  t.block_channels = static_cast<uint32_t>(block);
  const uint64_t fixed = head_mean_bytes(patches, score_size, 2) + index_row_bytes(moved) +
                         table_bytes(std::max<uint64_t>(1, tokens)) + block * element_size +
                         2 * round_up(block * 4, kBlockBytes) + table_bytes(kMaxTileRows);
  fit_tile(t, fixed, block * element_size, 2 * block * element_size);
  t.ub_bytes += table_bytes(t.tile_rows) - table_bytes(kMaxTileRows);
  return t;
}

// Shares of eight rows: eight float32 dots are a block.
inline Tiling tile_fuse_backward(uint64_t batch, uint64_t tokens, uint64_t moved, uint64_t channels,
                                 uint64_t element_size, uint64_t patches, uint64_t score_size,
                                 uint32_t cores) {
  Tiling t = split(batch * round_up(tokens, 8), 8, cores);
  const uint64_t fixed = head_mean_bytes(patches, score_size, 1) + index_row_bytes(moved) +
                         kWriterElements * 4 + table_bytes(tokens) + channels * (element_size + 8);
  fit_tile(t, fixed, channels * element_size, 4 * channels * element_size + kBlockBytes);
  return t;
}

// Items are (image, head) pairs.
inline Tiling tile_cls_softmax(uint64_t batch, uint64_t heads, uint64_t tokens, uint64_t width,
                               uint64_t element_size, uint32_t cores) {
  Tiling t = split(batch * heads, 1, cores);
  fit_tile(t, width * (element_size + 4) + 3 * 4 * round_up(tokens, 8), width * 4,
           width * (2 * element_size + 4));
  return t;
}

// Items are elements of the output.
inline Tiling tile_mean_heads(uint64_t total, uint64_t element_size, uint32_t cores) {
  Tiling t = split(total, kBlockBytes / element_size, cores);
  t.ub_bytes = kWriterElements * element_size + kMeanElements * (4 * 4 + element_size);
  return t;
}

}  // namespace skipvit
