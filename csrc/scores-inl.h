// SPDX-License-Identifier: Apache-2.0
// cls_scores: the logits of the CLS query, and the mean over heads of their softmax. Included
// once per instruction set, by kernels.cpp.
#pragma once

#include "memory-inl.h"

namespace skipvit {
namespace SKIPVIT_ISA {
namespace {

// out[i] = scale * query . key_i, one by one.
template <class T, class A>
__attribute__((noinline)) SKIPVIT_FLATTEN void dot_single_tokens(const A* query, const T* key,
                                                                 int64_t token_step,
                                                                 int64_t channel_step,
                                                                 int64_t width, int64_t count,
                                                                 A scale, A* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = scale * dot(query, contiguous(key + i * token_step, channel_step, width), width);
  }
}

// The same for up to four tokens, together: one dot product of 64 channels is too short to hide the
// latency of its additions.
template <class T, class A>
SKIPVIT_FLATTEN inline void dot_tokens(const A* query, const T* key, int64_t token_step,
                                       int64_t channel_step, int64_t width, int64_t count,
                                       int64_t ahead, A scale, A* out) {
  if (count < 4 || (channel_step != 1 && width > 1)) {
    dot_single_tokens(query, key, token_step, channel_step, width, count, scale, out);
    return;
  }
  const T *k0 = key, *k1 = k0 + token_step, *k2 = k1 + token_step, *k3 = k2 + token_step;
  for (int64_t i = 0; i < width; i += 64 / sizeof(T)) {
    __builtin_prefetch(k0 + ahead * token_step + i);
    __builtin_prefetch(k1 + ahead * token_step + i);
    __builtin_prefetch(k2 + ahead * token_step + i);
    __builtin_prefetch(k3 + ahead * token_step + i);
  }
  Vec<A> s0{}, s1{}, s2{}, s3{};
  for_lanes(width, [&](int64_t i, auto lanes) {
    const Vec<A> q = load<A>(query + i, lanes);
    s0 += q * load<A>(k0 + i, lanes);
    s1 += q * load<A>(k1 + i, lanes);
    s2 += q * load<A>(k2 + i, lanes);
    s3 += q * load<A>(k3 + i, lanes);
  });
  const Four<A> sums = scale * sum_lanes<A>(s0, s1, s2, s3);
  std::memcpy(out, &sums, sizeof(sums));
}

template <class T, class A>
void cls_logits_of(const View& q, const View& k, A scale, A* logits, int64_t begin, int64_t end) {
  const int64_t heads = k.size[1], tokens = k.size[2], width = k.size[3];
  const int64_t blocks = (tokens + kTokenBlock - 1) / kTokenBlock;
  const bool interleaved = k.stride[1] <= k.stride[2];
  // Tokens between a key and the one fetched for later: timm's keys of one token are a piece of a
  // row three times as long, and the hardware does not follow such gaps. Less than 8 tokens slow
  // long rows by 15 %; for B 64, N 577, C 192 in bfloat16 on one thread, 16 take 405 us and 8 590.
  const int64_t near = rows_ahead((interleaved ? heads : 1) * width * k.element_size);
  const int64_t ahead = near < 8 ? 8 : near;
  A* queries = accumulate_scratch.get<A>(heads * width);
  int64_t image = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / blocks;
    if (b != image) {
      image = b;
      for (int64_t h = 0; h < heads; ++h) {
        widen_row(queries + h * width, at<T>(q, b, h), q.stride[2], width);
      }
    }
    const int64_t first = item % blocks * kTokenBlock;
    const int64_t last = first + kTokenBlock < tokens ? first + kTokenBlock : tokens;
    const auto dots = [&](int64_t h, int64_t n) {
      dot_tokens(queries + h * width, at<T>(k, b, h, n), k.stride[2], k.stride[3], width,
                 last - n < 4 ? last - n : 4, ahead, scale, logits + (b * heads + h) * tokens + n);
    };
    // timm's keys are a view of the qkv projection where the heads of one token are neighbours;
    // other models hold the tokens of one head together. Either way the walk follows memory.
    if (interleaved) {
      for (int64_t n = first; n < last; n += 4) {
        for (int64_t h = 0; h < heads; ++h) {
          dots(h, n);
        }
      }
    } else {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t n = first; n < last; n += 4) {
          dots(h, n);
        }
      }
    }
  }
}

void cls_logits(const View& q, const View& k, double scale, void* logits, int64_t begin,
                int64_t end) {
  by_dtype(k.dtype, [&](auto element) {
    using A = typename Type<decltype(element)>::Sum;
    cls_logits_of<decltype(element), A>(q, k, static_cast<A>(scale), static_cast<A*>(logits), begin,
                                        end);
  });
}

template <class A>
SKIPVIT_FLATTEN void cls_softmax_mean_of(const A* logits, int64_t heads, int64_t tokens,
                                         int64_t num_prefix, float* out, int64_t begin,
                                         int64_t end) {
  const int64_t padded = (tokens + kLanes - 1) / kLanes * kLanes;
  A* weight = accumulate_scratch.get<A>(2 * padded);
  A* mean = weight + padded;
  for (int64_t b = begin; b < end; ++b) {
    std::memset(mean, 0, padded * sizeof(A));
    for (int64_t h = 0; h < heads; ++h) {
      const A* row = logits + (b * heads + h) * tokens;
      std::memcpy(weight, row, tokens * sizeof(A));
      for (int64_t j = tokens; j < padded; ++j) {
        weight[j] = -INFINITY;
      }
      Vec<A> largest = load<A>(weight, kLanes);
      for (int64_t j = kLanes; j < padded; j += kLanes) {
        largest = maximum(load<A>(weight + j, kLanes), largest);
      }
      A lanes[kLanes];
      std::memcpy(lanes, &largest, sizeof(lanes));
      A top = lanes[0];
      for (int64_t i = 1; i < kLanes; ++i) {
        top = lanes[i] > top ? lanes[i] : top;
      }
      Vec<A> sums{};
      for (int64_t j = 0; j < padded; j += kLanes) {
        const Vec<A> v = load<A>(weight + j, kLanes);
        const Vec<A> e = zip(v, v, [top](auto a, auto) { return exp(a - top); });
        sums += e;
        store<A>(weight + j, e, kLanes);
      }
      const A share = 1 / sum_lanes<A>(sums);
      for (int64_t j = 0; j < padded; j += kLanes) {
        store<A>(mean + j, load<A>(mean + j, kLanes) + share * load<A>(weight + j, kLanes), kLanes);
      }
    }
    float* row = out + b * (tokens - num_prefix);
    for (int64_t j = num_prefix; j < tokens; ++j) {
      row[j - num_prefix] = static_cast<float>(mean[j] / static_cast<A>(heads));
    }
  }
}

void cls_softmax_mean(const void* logits, bool wide, int64_t heads, int64_t tokens,
                      int64_t num_prefix, float* out, int64_t begin, int64_t end) {
  if (wide) {
    cls_softmax_mean_of(static_cast<const double*>(logits), heads, tokens, num_prefix, out, begin,
                        end);
  } else {
    cls_softmax_mean_of(static_cast<const float*>(logits), heads, tokens, num_prefix, out, begin,
                        end);
  }
}

}  // namespace
}  // namespace SKIPVIT_ISA
}  // namespace skipvit
