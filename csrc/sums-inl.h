// SPDX-License-Identifier: Apache-2.0
// Row moves that also sum: the fused row, and the backwards of fuse and scatter. Included once
// per instruction set, by kernels.cpp.
#pragma once

#include "rows-inl.h"

namespace skipvit {
namespace SKIPVIT_ISA {
namespace {

struct Columns {
  int64_t image, first, count;
};

// The item-th of `blocks` pieces per image of C channels, cut at whole vectors.
inline Columns columns_of(int64_t item, int64_t blocks, int64_t channels) {
  const int64_t vectors = (channels + kLanes - 1) / kLanes;
  const int64_t block = item % blocks;
  const int64_t first = vectors * block / blocks * kLanes;
  const int64_t end = vectors * (block + 1) / blocks * kLanes;
  return {item / blocks, first, (end < channels ? end : channels) - first};
}

// sum += weight * row, for up to four rows a pass over the accumulators: in order, as one by one.
template <class T, class A>
SKIPVIT_FLATTEN inline void add_weighted_rows(A* sum, const T* const* rows, const A* weights,
                                              int64_t num_rows, int64_t n) {
  if (num_rows == 4) {
    const T *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
    const A w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];
    for_lanes(n, [&](int64_t i, auto count) {
      Vec<A> v = load<A>(sum + i, count);
      v += w0 * load<A>(r0 + i, count);
      v += w1 * load<A>(r1 + i, count);
      v += w2 * load<A>(r2 + i, count);
      v += w3 * load<A>(r3 + i, count);
      store<A>(sum + i, v, count);
    });
    return;
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    const T* row = rows[r];
    const A weight = weights[r];
    for_lanes(n, [&](int64_t i, auto count) {
      store<A>(sum + i, load<A>(sum + i, count) + weight * load<A>(row + i, count), count);
    });
  }
}

template <class T, class A, class W>
void sum_dropped_of(const View& x, const W* mean, const int64_t* index, int64_t num_index,
                    int64_t num_patches, const View& out, int64_t blocks, int64_t begin,
                    int64_t end) {
  const int64_t num_prefix = x.size[1] - num_patches;
  for (int64_t item = begin; item < end; ++item) {
    const Columns c = columns_of(item, blocks, x.size[2]);
    const int64_t* kept = index + c.image * num_index + num_prefix;
    const int64_t* kept_end = index + (c.image + 1) * num_index;
    A* sum = accumulate_scratch.get<A>(c.count);
    std::memset(sum, 0, c.count * sizeof(A));
    T* copies = x.stride[2] == 1 ? nullptr : row_scratch.get<T>(8 * c.count);
    // The first four are added when there are eight: the others are on their way to the cache.
    const T* rows[8];
    A weights[8];
    int64_t pending = 0, dropped = 0;
    for (int64_t j = 0; j < num_patches; ++j) {
      if (kept != kept_end && *kept == num_prefix + j) {
        ++kept;
        continue;
      }
      rows[pending] = at<T>(x, c.image, num_prefix + j, c.first);
      weights[pending] = static_cast<A>(mean[c.image * num_patches + j]);
      if (copies != nullptr) {
        T* copy = copies + dropped++ % 8 * c.count;
        copy_row(copy, rows[pending], x.stride[2], c.count, sizeof(T));
        rows[pending] = copy;
      } else {
        prefetch_row(reinterpret_cast<const char*>(rows[pending]), c.count * sizeof(T));
      }
      if (++pending == 8) {
        add_weighted_rows(sum, rows, weights, 4, c.count);
        std::memcpy(rows, rows + 4, 4 * sizeof(*rows));
        std::memcpy(weights, weights + 4, 4 * sizeof(*weights));
        pending = 4;
      }
    }
    const int64_t full = pending / 4 * 4;
    add_weighted_rows(sum, rows, weights, full, c.count);
    add_weighted_rows(sum, rows + full, weights + full, pending - full, c.count);
    T* last = at<T>(out, c.image, out.size[1] - 1, c.first);
    for_lanes(c.count,
              [&](int64_t i, auto count) { store<A>(last + i, load<A>(sum + i, count), count); });
  }
}

void sum_dropped(const View& x, const void* mean, bool wide, const int64_t* index,
                 int64_t num_index, int64_t num_patches, const View& out, int64_t blocks,
                 int64_t begin, int64_t end) {
  by_dtype_and_sum(x.dtype, wide, [&](auto element, auto sum) {
    using T = decltype(element);
    using A = decltype(sum);
    if (wide) {
      sum_dropped_of<T, A>(x, static_cast<const double*>(mean), index, num_index, num_patches, out,
                           blocks, begin, end);
    } else {
      sum_dropped_of<T, A>(x, static_cast<const float*>(mean), index, num_index, num_patches, out,
                           blocks, begin, end);
    }
  });
}

// out = copied ? row : weight * grad_fused, split by split_row; returns row . grad_fused.
template <class T, class A>
SKIPVIT_FLATTEN inline A copy_or_scale(T* out, const T* row, const A* grad_fused, A weight,
                                       int64_t n, bool copied, const char* next) {
  Vec<A> sums[2]{};
  copy_or_map(out, row, grad_fused, n, copied, next,
              [&](auto x, auto grad, int64_t part, int64_t reg) {
                sums[part].reg[reg] += x * grad;
                return weight * grad;
              });
  return sum_lanes<A>(sums[0] + sums[1]);
}

// The same with sums, weights and so grad_fused wider than the rows are computed in; not split.
template <class T, class A>
SKIPVIT_FLATTEN inline A copy_or_scale_wide(T* out, const T* row, const A* grad_fused, A weight,
                                            int64_t n, bool copied) {
  if (copied) {
    copy_row(out, row, 1, n, sizeof(T));
  } else {
    for_lanes(n, [&](int64_t i, auto count) {
      store<A>(out + i, weight * load<A>(grad_fused + i, count), count);
    });
  }
  return dot(grad_fused, row, n);
}

// grad_scores (H, n) of the patches [begin, end) of one image: grad_mean / H for every head.
template <class A>
SKIPVIT_FLATTEN void spread_over_heads(const A* grad_mean, const View& grad_scores, int64_t image,
                                       int64_t begin, int64_t end) {
  const int64_t heads = grad_scores.size[1];
  by_dtype(grad_scores.dtype, [&](auto element) {
    using S = decltype(element);
    for (int64_t h = 0; h < heads; ++h) {
      S* out = at<S>(grad_scores, image, h, begin);
      for_lanes(end - begin, [&](int64_t i, auto count) {
        const Vec<A> mean = load<A>(grad_mean + begin + i, count);
        const Vec<A> divisor = broadcast(static_cast<A>(heads));
        store<A>(out + i, zip(mean, divisor, [](auto a, auto b) { return a / b; }), count);
      });
    }
  });
}

template <class T, class A, class W>
void fuse_backward_of(const View& grad, const View& x, const W* mean, const int32_t* inverse,
                      const View& grad_x, const View& grad_scores, int64_t begin, int64_t end) {
  constexpr bool kSplit = std::is_same_v<A, typename Type<T>::Sum>;
  const int64_t num_tokens = x.size[1], channels = x.size[2];
  const int64_t num_patches = grad_scores.size[2], num_prefix = num_tokens - num_patches;
  const int64_t grad_stride = grad.stride[2], x_stride = x.stride[2];
  const bool all_contiguous = grad_stride == 1 && x_stride == 1;
  RowWalk to(Rows(grad_x), num_tokens, begin);
  A* grad_fused = accumulate_scratch.get<A>(channels + 2 * kLanes + num_tokens);
  A* grad_mean = grad_fused + channels + 2 * kLanes + num_prefix;  // of the patches of an image
  const W* weights = mean;
  int64_t image = -1, first = 0;
  const auto finish_image = [&](int64_t last) {
    if (image < 0 || last <= first) {
      return;
    }
    // Here, where it is a mask: in the loop over rows it was a branch on rows kept at random.
    const int32_t* rank = inverse + image * num_tokens + num_prefix;
    for (int64_t j = first; j < last; ++j) {
      grad_mean[j] = rank[j] >= 0 ? A{0} : grad_mean[j];
    }
    spread_over_heads(grad_mean, grad_scores, image, first, last);
  };
  const auto each = [&](int64_t item, const char* from, const char* later) {
    const int64_t patch = num_patches - to.left;
    if (to.image != image) {
      finish_image(num_patches);
      image = to.image;
      first = patch < 0 ? 0 : patch;
      weights = mean + image * num_patches;
      const T* fused = at<T>(grad, image, grad.size[1] - 1);
      if constexpr (kSplit) {
        split_row(grad_fused, fused, grad_stride, channels);
      } else {
        widen_row(grad_fused, fused, grad_stride, channels);
      }
    }
    const bool kept = inverse[item] >= 0;
    T* out = reinterpret_cast<T*>(to.address);
    const T* row = contiguous(reinterpret_cast<const T*>(from),
                              all_contiguous ? 1
                              : kept         ? grad_stride
                                             : x_stride,
                              channels);
    const A weight = static_cast<A>(patch < 0 ? W{0} : weights[patch]);
    A product;
    if constexpr (kSplit) {
      product = copy_or_scale(out, row, grad_fused, weight, channels, kept, later);
    } else {
      product = copy_or_scale_wide(out, row, grad_fused, weight, channels, kept);
    }
    grad_mean[patch] = product;
    if (patch < 0 && !kept) {
      std::memset(out, 0, channels * sizeof(T));
    }
    to.next();
  };
  for_rows(begin, end, rows_ahead(channels * sizeof(T)),
           ChosenRows(grad, x, inverse, num_tokens, begin), each);
  finish_image(begin < end ? num_patches - num_tokens + (end - 1) % num_tokens + 1 : 0);
}

void fuse_backward(const View& grad, const View& x, const void* mean, bool wide,
                   const int32_t* inverse, const View& grad_x, const View& grad_scores,
                   int64_t begin, int64_t end) {
  by_dtype_and_sum(x.dtype, wide, [&](auto element, auto sum) {
    using T = decltype(element);
    using A = decltype(sum);
    if constexpr (std::is_same_v<A, double>) {
      if (wide) {
        fuse_backward_of<T, A>(grad, x, static_cast<const double*>(mean), inverse, grad_x,
                               grad_scores, begin, end);
        return;
      }
    }
    fuse_backward_of<T, A>(grad, x, static_cast<const float*>(mean), inverse, grad_x, grad_scores,
                           begin, end);
  });
}

template <class T>
SKIPVIT_FLATTEN void scatter_back_backward_of(const View& grad, const int32_t* inverse,
                                              const View& grad_x, const View& grad_tokens,
                                              const View* grad_update, int64_t blocks,
                                              int64_t begin, int64_t end) {
  using A = typename Type<T>::Sum;
  const int64_t num_tokens = grad.size[1];
  for (int64_t item = begin; item < end; ++item) {
    const Columns c = columns_of(item, blocks, grad.size[2]);
    const int64_t summed = grad_update == nullptr ? 0 : c.count;
    A* sum = accumulate_scratch.get<A>(summed);
    std::memset(sum, 0, summed * sizeof(A));
    for (int64_t row = 0; row < num_tokens; ++row) {
      const T* from = at<T>(grad, c.image, row, c.first);
      T* to = at<T>(grad_x, c.image, row, c.first);
      const int32_t r = inverse[c.image * num_tokens + row];
      if (r >= 0) {
        copy_row(at<T>(grad_tokens, c.image, r, c.first), from, grad.stride[2], c.count, sizeof(T));
        std::memset(to, 0, c.count * sizeof(T));
        continue;
      }
      if (grad_update == nullptr || grad.stride[2] != 1) {
        copy_row(to, from, grad.stride[2], c.count, sizeof(T));
        from = to;
      }
      if (grad_update != nullptr) {
        for_lanes(c.count, [&](int64_t i, auto count) {
          store<A>(sum + i, load<A>(sum + i, count) + load<A>(from + i, count), count);
          std::memcpy(to + i, from + i, count * sizeof(T));
        });
      }
    }
    if (grad_update != nullptr) {
      T* out = at<T>(*grad_update, c.image, c.first);
      for_lanes(c.count,
                [&](int64_t i, auto count) { store<A>(out + i, load<A>(sum + i, count), count); });
    }
  }
}

void scatter_back_backward(const View& grad, const int32_t* inverse, const View& grad_x,
                           const View& grad_tokens, const View* grad_update, int64_t blocks,
                           int64_t begin, int64_t end) {
  by_dtype(grad.dtype, [&](auto element) {
    scatter_back_backward_of<decltype(element)>(grad, inverse, grad_x, grad_tokens, grad_update,
                                                blocks, begin, end);
  });
}

}  // namespace
}  // namespace SKIPVIT_ISA
}  // namespace skipvit
