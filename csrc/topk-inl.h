// SPDX-License-Identifier: Apache-2.0
// The mean of scores over heads, and the positions of the largest ones. Included once per
// instruction set, by kernels.cpp.
#pragma once

#include "memory-inl.h"

namespace skipvit {
namespace SKIPVIT_ISA {
namespace {

template <class T, class A>
SKIPVIT_FLATTEN void head_mean_of(const View& scores, A* mean, int64_t begin, int64_t end) {
  const int64_t heads = scores.size[1], n = scores.size[2];
  for (int64_t b = begin; b < end; ++b) {
    A* out = mean + b * n;
    for (int64_t h = 0; h < heads; ++h) {
      const T* row = contiguous(at<T>(scores, b, h), scores.stride[2], n);
      for_lanes(n, [&](int64_t i, auto count) {
        const Vec<A> score = load<A>(row + i, count);
        store<A>(out + i, h == 0 ? score : load<A>(out + i, count) + score, count);
      });
    }
    // A true division: the reference divides, and ranks agree only where the bits do.
    for (int64_t i = 0; i < n; ++i) {
      out[i] /= static_cast<A>(heads);
    }
  }
}

void head_mean(const View& scores, void* mean, int64_t begin, int64_t end) {
  by_dtype(scores.dtype, [&](auto element) {
    using A = typename Type<decltype(element)>::Sum;
    head_mean_of<decltype(element), A>(scores, static_cast<A*>(mean), begin, end);
  });
}

// Integers that order as torch.sort orders floats: -0 equals +0, every NaN is the largest.
inline int32_t sort_key(float score) {
  const int32_t bits = bit_cast<int32_t>(score + 0.0f);
  return score != score ? INT32_MAX : bits ^ ((bits >> 31) & INT32_MAX);
}
inline int64_t sort_key(double score) {
  const int64_t bits = bit_cast<int64_t>(score + 0.0);
  return score != score ? INT64_MAX : bits ^ ((bits >> 63) & INT64_MAX);
}

// A key t with at least num_keep keys >= t and, where these are more, less than num_keep > t.
template <class Key>
struct Threshold {
  Key t;
  int64_t at_least, greater;  // keys >= t; keys > t, known where at_least is more than num_keep
};

template <class Key, int64_t kBytes = kRegisterBytes>
struct KeyVector {
  typedef Key Reg __attribute__((vector_size(kBytes)));
};
template <class Key>
using KeyReg = typename KeyVector<Key>::Reg;

// GCC 12 would take the lanes out one by one.
template <class Key, int64_t kBytes = kRegisterBytes>
inline Key sum_keys(typename KeyVector<Key, kBytes>::Reg v) {
  if constexpr (kBytes > 16) {
    typename KeyVector<Key, kBytes / 2>::Reg half[2];
    std::memcpy(half, &v, sizeof(v));
    return sum_keys<Key, kBytes / 2>(half[0] + half[1]);
  } else {
    Key sum = v[0];
    for (int64_t i = 1; i < static_cast<int64_t>(kBytes / sizeof(Key)); ++i) {
      sum += v[i];
    }
    return sum;
  }
}

// How many of n keys, a multiple of kLanes, are at least each limit. The lanes count in Key: n <
// 2**31 is checked by the binding.
template <class Key>
SKIPVIT_FLATTEN inline void count_at_least(const Key* keys, int64_t n, const Key (&limits)[3],
                                           int64_t (&counts)[3]) {
  using Reg = KeyReg<Key>;
  const Reg limit0 = Reg{} + limits[0], limit1 = Reg{} + limits[1], limit2 = Reg{} + limits[2];
  Reg minus0{}, minus1{}, minus2{};
  for (int64_t i = 0; i < n; i += sizeof(Reg) / sizeof(Key)) {
    Reg v;
    std::memcpy(&v, keys + i, sizeof(v));
    minus0 += v >= limit0;
    minus1 += v >= limit1;
    minus2 += v >= limit2;
  }
  counts[0] = -static_cast<int64_t>(sum_keys<Key>(minus0));
  counts[1] = -static_cast<int64_t>(sum_keys<Key>(minus1));
  counts[2] = -static_cast<int64_t>(sum_keys<Key>(minus2));
}

// Two bits a pass over keys that sit in L1, from [low, high], which holds them all; the padding to
// a whole vector is below. About 5 passes for 196 scores, where a sort takes ten times as long. No
// branch on a count: it would be mispredicted every second time.
template <class Key>
inline Threshold<Key> threshold(const Key* keys, int64_t n, Key low, Key high, int64_t num_keep) {
  using Distance = std::make_unsigned_t<Key>;
  const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
  int64_t at_least_low = n, above_high = 0;
  while (at_least_low > num_keep && low < high) {
    const Distance first = static_cast<Distance>(low), last = static_cast<Distance>(high);
    const Distance width = last - first;
    const Key limits[3] = {static_cast<Key>(first + width / 4 + 1),
                           static_cast<Key>(first + width / 2 + 1),
                           static_cast<Key>(last - width / 4)};
    int64_t counts[3];
    count_at_least(keys, padded, limits, counts);
    for (int64_t i = 0; i < 3; ++i) {
      const bool enough = counts[i] >= num_keep;
      low = enough ? limits[i] : low;
      at_least_low = enough ? counts[i] : at_least_low;
    }
    for (int64_t i = 2; i >= 0; --i) {
      const bool enough = counts[i] >= num_keep;
      high = enough ? high : static_cast<Key>(limits[i] - 1);
      above_high = enough ? above_high : counts[i];
    }
  }
  return {low, at_least_low, above_high};
}

#if defined(__AVX512F__)
// out = first + the positions of the keys >= t; the padding is below.
inline void compress_positions(const int32_t* keys, int64_t n, int32_t t, int64_t first,
                               int64_t* out) {
  const __m512i limit = _mm512_set1_epi32(t);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t j = 0; j < n; j += kLanes) {
    const __mmask16 kept = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(keys + j), limit);
    const __m512i places = _mm512_maskz_compress_epi32(kept, lanes);
    const __m512i base = _mm512_set1_epi64(first + j);
    __m256i half[2];
    std::memcpy(half, &places, sizeof(half));
    const __m512i low = _mm512_maskz_cvtepi32_epi64(-1, half[0]) + base;
    const __m512i high = _mm512_maskz_cvtepi32_epi64(-1, half[1]) + base;
    const uint32_t valid = (1u << __builtin_popcount(kept)) - 1;
    _mm512_mask_storeu_epi64(out, valid, low);
    _mm512_mask_storeu_epi64(out + 8, valid >> 8, high);
    out += __builtin_popcount(kept);
  }
}
#endif

template <class A>
void select_topk_of(const A* mean, int64_t n, int64_t num_keep, int64_t num_prefix, int64_t* index,
                    int64_t begin, int64_t end) {
  using Key = decltype(sort_key(A{}));
  constexpr Key kLowest = static_cast<Key>(Key{1} << (8 * sizeof(Key) - 1));  // of no score
  Key* keys = key_scratch.get<Key>(n + kLanes);
  for (int64_t b = begin; b < end; ++b) {
    int64_t* out = index + b * (num_prefix + num_keep);
    for (int64_t p = 0; p < num_prefix; ++p) {
      out[p] = p;
    }
    if (num_keep == 0) {
      continue;
    }
    out += num_prefix;
    for (int64_t j = 0; j < n; ++j) {
      keys[j] = sort_key(mean[b * n + j]);
    }
    Key low = keys[0], high = keys[0];
    for (int64_t j = 0; j < n; ++j) {
      low = keys[j] < low ? keys[j] : low;
      high = keys[j] > high ? keys[j] : high;
    }
    for (int64_t j = n; j % kLanes != 0; ++j) {
      keys[j] = kLowest;
    }
    const auto [t, at_least, greater] = threshold(keys, n, low, high, num_keep);
    // Every step writes, only a kept one advances: no branch that the scores could mispredict.
    int64_t kept = 0;
    if (at_least == num_keep) {
#if defined(__AVX512F__)
      if constexpr (sizeof(Key) == 4) {
        compress_positions(keys, n, t, num_prefix, out);
        continue;
      }
#endif
      for (int64_t j = 0; kept < num_keep; ++j) {
        out[kept] = num_prefix + j;
        kept += keys[j] >= t;
      }
      continue;
    }
    // More equal keys than places: the first ones win.
    int64_t places = num_keep - greater;
    for (int64_t j = 0; kept < num_keep; ++j) {
      const bool tie = keys[j] == t;
      out[kept] = num_prefix + j;
      kept += (keys[j] > t) | (tie & (places > 0));
      places -= tie;
    }
  }
}

void select_topk(const void* mean, bool wide, int64_t num_patches, int64_t num_keep,
                 int64_t num_prefix, int64_t* index, int64_t begin, int64_t end) {
  if (wide) {
    select_topk_of(static_cast<const double*>(mean), num_patches, num_keep, num_prefix, index,
                   begin, end);
  } else {
    select_topk_of(static_cast<const float*>(mean), num_patches, num_keep, num_prefix, index, begin,
                   end);
  }
}

}  // namespace
}  // namespace SKIPVIT_ISA
}  // namespace skipvit
