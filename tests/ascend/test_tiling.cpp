// SPDX-License-Identifier: Apache-2.0
// Sweeps the tiling: every share covered once, aligned, and every buffer within the chip's.
#include <cstdio>
#include <cstdlib>

#include "../../ascend_ops/host/tiling.h"

using namespace skipvit;

namespace {

uint64_t checked = 0;

#define CHECK(condition)                                                                    \
  if (!(condition)) {                                                                       \
    std::printf(                                                                            \
        "%s:%d: %s fails: cores %u, total %llu, per core %llu, tile rows %u, bytes %llu\n", \
        __FILE__, __LINE__, #condition, t.cores, static_cast<unsigned long long>(t.total),  \
        static_cast<unsigned long long>(t.per_core), t.tile_rows,                           \
        static_cast<unsigned long long>(t.ub_bytes));                                       \
    std::exit(1);                                                                           \
  }

// The cores' shares [c * per_core, (c + 1) * per_core) cover `total` once; none is empty; all but
// the last have at least `least` items, a whole block of the output.
void check_shares(const Tiling& t, uint64_t total, uint64_t least, uint32_t cores) {
  ++checked;
  CHECK(t.total == total && t.cores >= 1 && t.cores <= cores && t.cores <= kMaxCores);
  CHECK(t.per_core >= least);
  CHECK(t.per_core * t.cores >= total && t.per_core * (t.cores - 1) < total);
  CHECK(t.per_core <= total / cores + 1 || t.per_core == least);  // as even as whole items allow
}

void check_budget(const Tiling& t, uint64_t row_bytes, bool must_fit) {
  CHECK(t.tile_rows <= kMaxTileRows);
  CHECK(t.tile_rows == 0 || t.ub_bytes <= 248 * 1024);  // of 256 KB the framework keeps 8
  CHECK(!must_fit || t.tile_rows > 0);
  CHECK(t.tile_rows <= 255);                              // repeats of one instruction
  CHECK(t.tile_rows * row_bytes / kBlockBytes <= 65535);  // blocks of one copy
}

}  // namespace

int main() {
  const uint64_t batches[] = {1, 2, 3, 8, 31, 32, 33, 256};
  const uint64_t widths[] = {16, 48, 192, 384, 768, 1024, 1280, 2048};  // channels
  const uint32_t some_cores[] = {1, 2, 7, 30, 32};

  // Every N up to the limit, several K, all dtypes, the widths of real ViTs.
  for (uint64_t n = 0; n <= kMaxTokens; n += n < 2048 ? 1 : 37) {
    const uint64_t keeps[] = {0, 1, n / 3, n * 45 / 100, n > 0 ? n - 1 : 0, n};
    for (const uint64_t element : {2u, 4u}) {
      for (const uint64_t score : {2u, 4u}) {
        for (const uint64_t c : widths) {
          const bool must_fit = n <= 2048;  // the promise; above, whatever fits
          for (const uint64_t k : keeps) {
            if (k > n) {
              continue;
            }
            const uint64_t b = batches[(n + k) % 8], prefix = (n + c) % 3;
            const uint32_t cores = some_cores[(n + k + c) % 5];
            if (prefix + k > 0) {
              Tiling t = tile_gather_topk(b, prefix, n, k, c * element, score, cores);
              check_shares(t, b * (prefix + k), 4, cores);
              check_budget(t, c * element, must_fit);
              t = tile_gather_rows(b, prefix + k, c * element, cores);
              check_shares(t, b * (prefix + k), 1, cores);
              check_budget(t, c * element, must_fit);
            }
            if (n > 0) {
              Tiling t = tile_place_rows(b, n, k, c * element, cores);
              check_shares(t, b * n, 1, cores);
              check_budget(t, c * element, must_fit);
              t = tile_sum_rows(b, n, k, c, element, n, score, cores);
              CHECK(t.block_channels * element % kBlockBytes == 0 || t.block_channels == c);
              CHECK(t.block_channels >= 1 && t.block_channels <= c);
              check_shares(t, b * ((c + t.block_channels - 1) / t.block_channels), 1, cores);
              check_budget(t, t.block_channels * element, must_fit);
              CHECK(t.tile_rows % kRowSums == 0);
              t = tile_fuse_backward(b, n, k, c, element, n, score, cores);
              check_shares(t, b * std::max<uint64_t>(1, n / kPiecePatches), 1,
                           n * score < kBlockBytes ? 1 : cores);
              check_budget(t, c * element, must_fit);
              CHECK(t.tile_rows <= kBitRows);
            }
          }
        }
      }
      if (n > 0) {
        for (const uint64_t width : {8 * 4 / element, 64 * 1ul, 80 * 1ul, 128 * 1ul, 256 * 1ul}) {
          for (const uint64_t heads : {1, 3, 6, 12, 16, 25}) {
            const uint32_t cores = some_cores[(n + width) % 5];
            const uint64_t patches = std::max<uint64_t>(1, n - std::min(n, heads));
            const Tiling t = tile_cls_scores(batches[n % 8], n, patches, width, element, cores);
            check_shares(t, batches[n % 8], (8 + patches - 1) / patches, cores);
            check_budget(t, width * 4, n <= 2048);
          }
        }
      }
    }
  }

  // Every number of cores, for sizes around every multiple that matters.
  for (uint32_t cores = 1; cores <= kMaxCores; ++cores) {
    for (uint64_t total = 1; total <= 3000; ++total) {
      check_shares(split(total, 1, cores), total, 1, cores);
      check_shares(split(total, 4, cores), total, 4, cores);
      check_shares(split(total, 8, cores), total, 8, cores);
    }
    const uint64_t huge = (1ull << 33) + 5;
    check_shares(split(huge, 4, cores), huge, 4, cores);
  }

  // Rows too wide for what else must be there are refused, not cut.
  Tiling t = tile_fuse_backward(1, kMaxTokens, kMaxTokens, 8192, 4, kMaxTokens, 4, 1);
  CHECK(t.tile_rows == 0);

  std::printf("%llu tilings\n", static_cast<unsigned long long>(checked));
  return 0;
}
