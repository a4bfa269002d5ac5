// SPDX-License-Identifier: Apache-2.0
// What kernels and host agree on: the chip's sizes and the kernels' own limits. Plain C++.
#pragma once

#include <cstdint>

namespace skipvit {

constexpr uint32_t kBlockBytes = 32;       // everything moves in these
constexpr uint32_t kVectorBytes = 256;     // one repeat of the vector unit
constexpr uint32_t kUbBytes = 248 * 1024;  // unified buffer; the framework keeps 8 KB of the 256
constexpr uint32_t kMaxCores = 32;
constexpr uint32_t kMaxTokens = 4096;  // of an image; 16 KB for each float per token
constexpr uint32_t kMaxRowBytes = 32 * 1024;
constexpr uint32_t kMaxTileRows = 128;     // rows of one buffer; more gain nothing
constexpr uint32_t kBitRows = 64;          // of a tile of fuse_backward: their kinds are bits
constexpr uint32_t kWriterElements = 512;  // staged by a FlatWriter before it writes them out
constexpr uint32_t kRowSums = 8;           // that sum_rows keeps, and rows of its tile
constexpr uint32_t kMaxHeadWidth = 1024;
constexpr uint32_t kPiecePatches = 32;  // of the pieces that cores share in fuse_backward

enum DType : uint32_t { kFloat32 = 0, kFloat16 = 1 };

}  // namespace skipvit
