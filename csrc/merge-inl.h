// SPDX-License-Identifier: Apache-2.0
// Patches that merge and come back: how much each is like another, whom most, the means of owners'
// rows, the rows restored. Included once per instruction set, by kernels.cpp.
#pragma once

#include "rows-inl.h"
#include "topk-inl.h"

namespace skipvit {
namespace SKIPVIT_ISA {
namespace {

// ---------------------------------------------------------------------- products with panels

// Rows multiplied at a time with a panel of kept patches, two registers of them: the sums fill half
// of the machine's registers. A sum runs over the channels one by one, whatever the panel.
#if defined(__AVX512F__)
constexpr int64_t kMatchedRows = 8;
#else
constexpr int64_t kMatchedRows = 4;
#endif
template <class A>
constexpr int64_t kPanel = 2 * kRegisterBytes / sizeof(A);

// Bytes of panels that every row passes before the next ones are made: half of a second-level
// cache.
constexpr int64_t kPanelBytes = 256 * 1024;

template <class Reg>
struct Two {
  Reg reg[2];
};

// Features (B, H, N, D) of one token, averaged over the heads as head_mean does.
template <class T, class A>
SKIPVIT_FLATTEN inline const A* feature_row(const View& features, int64_t image, int64_t token,
                                            A* out) {
  const int64_t heads = features.size[1], width = features.size[3], stride = features.stride[3];
  const T* row = at<T>(features, image, 0, token);
  if constexpr (std::is_same_v<T, A>) {
    if (heads == 1 && (stride == 1 || width <= 1)) {
      return row;
    }
  }
  widen_row(out, row, stride, width);
  for (int64_t h = 1; h < heads; ++h) {
    const T* other = contiguous(at<T>(features, image, h, token), stride, width);
    for_lanes(width, [&](int64_t i, auto count) {
      store<A>(out + i, load<A>(out + i, count) + load<A>(other + i, count), count);
    });
  }
  for (int64_t i = 0; heads > 1 && i < width; ++i) {
    out[i] /= static_cast<A>(heads);
  }
  return out;
}

template <class T>
inline void prefetch_feature(const View& features, int64_t image, int64_t token) {
  prefetch_row(reinterpret_cast<const char*>(at<T>(features, image, 0, token)),
               features.size[3] * sizeof(T));
}

// What makes a vector one of length 1; nothing does a vector of zeros.
template <class A>
inline A to_unit(const A* row, int64_t width) {
  const A norm = std::sqrt(dot(row, row, width));
  return norm > 0 ? 1 / norm : 1;
}

// Panels of so many vectors that every row passes before the next ones are made.
template <class A>
inline int64_t vectors_at_a_time(int64_t width) {
  const int64_t panel_bytes = (width + 1) * kPanel<A> * sizeof(A);
  return (kPanelBytes / panel_bytes + 1) * kPanel<A>;
}

// panels[p][d][j] = channel d of the unit vector of token_of(first + p * kPanel + j). Four vectors
// at a time: a store of one float for each cost as much as a fifth of the products.
template <class T, class A, class TokenOf>
void make_panels(const View& features, int64_t image, int64_t first, int64_t last, A* rows,
                 A* panels, TokenOf token_of) {
  using Four = typename Type<A>::Four;
  const int64_t width = features.size[3], ahead = rows_ahead(width * sizeof(T));
  for (int64_t r = first; r < last; r += 4) {
    const int64_t place = (r - first) % kPanel<A>, count = last - r < 4 ? last - r : 4;
    A* out = panels + (r - first - place) * width + place;
    if (place == 0) {  // the last panel may not be full
      std::memset(out, 0, kPanel<A> * width * sizeof(A));
    }
    const A* from[4];
    Four scale{};
    for (int64_t j = 0; j < 4; ++j) {
      if (j < count) {
        const int64_t later = r + j + ahead < last ? r + j + ahead : last - 1;
        prefetch_feature<T>(features, image, token_of(later));
        from[j] = feature_row<T>(features, image, token_of(r + j), rows + j * width);
        scale[j] = to_unit(from[j], width);
      } else {  // by a scale of 0, and so in nobody's sums
        from[j] = from[0];
      }
    }
    for (int64_t d = 0; d < width; ++d) {
      Four values{from[0][d], from[1][d], from[2][d], from[3][d]};
      values *= scale;
      std::memcpy(out + d * kPanel<A>, &values, sizeof(values));
    }
  }
}

// sums[i] = the products of rows[i] with each patch of the panel.
template <class A>
SKIPVIT_FLATTEN inline void multiply_panel(const A* const* rows, const A* panel, int64_t width,
                                           Two<typename Type<A>::Reg> (&sums)[kMatchedRows]) {
  using Pair = Two<typename Type<A>::Reg>;
  const A *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
  Pair s0{}, s1{}, s2{}, s3{};
#if defined(__AVX512F__)
  const A *r4 = rows[4], *r5 = rows[5], *r6 = rows[6], *r7 = rows[7];
  Pair s4{}, s5{}, s6{}, s7{};
#endif
  for (int64_t d = 0; d < width; ++d) {
    // One by one: a pair of them GCC 12 also stores on the stack.
    typename Type<A>::Reg left, right;
    std::memcpy(&left, panel + d * kPanel<A>, sizeof(left));
    std::memcpy(&right, panel + d * kPanel<A> + kPanel<A> / 2, sizeof(right));
    const auto add = [&](Pair& sum, A x) {
      sum.reg[0] += x * left;
      sum.reg[1] += x * right;
    };
    add(s0, r0[d]);
    add(s1, r1[d]);
    add(s2, r2[d]);
    add(s3, r3[d]);
#if defined(__AVX512F__)
    add(s4, r4[d]);
    add(s5, r5[d]);
    add(s6, r6[d]);
    add(s7, r7[d]);
#endif
  }
  sums[0] = s0;
  sums[1] = s1;
  sums[2] = s2;
  sums[3] = s3;
#if defined(__AVX512F__)
  sums[4] = s4;
  sums[5] = s5;
  sums[6] = s6;
  sums[7] = s7;
#endif
}

// A sort key and the place it is from; of equal keys the lower place is the better one.
template <class Reg>
struct Candidates {
  Reg key, place;
};

template <class Reg>
inline void take_better(Candidates<Reg>& best, const Candidates<Reg>& other) {
  const auto better =
      (other.key > best.key) | ((other.key == best.key) & (other.place < best.place));
  best.key = better ? other.key : best.key;
  best.place = better ? other.place : best.place;
}

template <class Key, int64_t kBytes = kRegisterBytes>
inline Candidates<Key> best_lane(const Candidates<typename KeyVector<Key, kBytes>::Reg>& lanes) {
  if constexpr (kBytes > 16) {
    using Half = typename KeyVector<Key, kBytes / 2>::Reg;
    Half keys[2], places[2];
    std::memcpy(keys, &lanes.key, sizeof(keys));
    std::memcpy(places, &lanes.place, sizeof(places));
    Candidates<Half> best{keys[0], places[0]};
    take_better(best, {keys[1], places[1]});
    return best_lane<Key, kBytes / 2>(best);
  } else {
    Candidates<Key> best{lanes.key[0], lanes.place[0]};
    for (int64_t i = 1; i < static_cast<int64_t>(kBytes / sizeof(Key)); ++i) {
      take_better(best, Candidates<Key>{lanes.key[i], lanes.place[i]});
    }
    return best;
  }
}

template <class A>
inline auto sort_keys(typename Type<A>::Reg v) {
  using Key = decltype(sort_key(A{}));
  constexpr Key kLargest = static_cast<Key>(~(Key{1} << (8 * sizeof(Key) - 1)));
  const auto bits = bit_cast<KeyReg<Key>>(v + A{0});
  return v != v ? KeyReg<Key>{} + kLargest : bits ^ ((bits >> (8 * sizeof(Key) - 1)) & kLargest);
}

// The best of the vectors [first, ends[i]) for each of kMatchedRows rows; the ends ascend.
template <class A, class Key>
SKIPVIT_FLATTEN void match_rows(const A* const* rows, const A* panels, int64_t width, int64_t first,
                                const Key* ends, Candidates<Key> (&best)[kMatchedRows]) {
  using Reg = typename Type<A>::Reg;
  using Keys = KeyReg<Key>;
  constexpr int64_t kLaneCount = kPanel<A> / 2;
  Keys lane{};
  for (int64_t i = 0; i < kLaneCount; ++i) {
    lane[i] = static_cast<Key>(i);
  }
  Reg largest[kMatchedRows];
  Keys places[kMatchedRows];
  for (int64_t i = 0; i < kMatchedRows; ++i) {
    largest[i] = Reg{} - std::numeric_limits<A>::infinity();
    places[i] = Keys{} + static_cast<Key>(first);
  }
  for (int64_t r = first; r < ends[kMatchedRows - 1]; r += kPanel<A>) {
    Two<Reg> sums[kMatchedRows];
    multiply_panel(rows, panels + (r - first) * width, width, sums);
    for (int64_t half = 0; half < 2; ++half) {
      const Keys place = lane + static_cast<Key>(r + half * kLaneCount);
      for (int64_t i = 0; i < kMatchedRows; ++i) {
        // A NaN is larger than what is not, and nothing than it; places only ascend.
        const Reg sum = sums[i].reg[half], so_far = largest[i];
        const auto better = (place < Keys{} + ends[i]) & ~(sum <= so_far) & (so_far == so_far);
        largest[i] = better ? sum : so_far;
        places[i] = better ? place : places[i];
      }
    }
  }
  for (int64_t i = 0; i < kMatchedRows; ++i) {
    best[i] = best_lane<Key>({sort_keys<A>(largest[i]), places[i]});
  }
}

// -------------------------------------------------------------------------- match_higher

// The patches of an image by descending rank, the first of equal ones first, and how many rank
// above each of them in that order. `keys` has place for n.
template <class Key>
void order_by_rank(const View& ranks, int64_t image, Key* keys, Key* order, Key* above) {
  const int64_t n = ranks.size[1];
  for (int64_t j = 0; j < n; ++j) {
    keys[j] = sort_key(*at<float>(ranks, image, j));
  }
  for (int64_t i = 0; i < n; ++i) {
    Key higher = 0, before = 0;
    for (int64_t j = 0; j < n; ++j) {
      higher += keys[j] > keys[i];
    }
    for (int64_t j = 0; j < i; ++j) {
      before += keys[j] == keys[i];
    }
    order[higher + before] = static_cast<Key>(i);
    above[higher + before] = higher;
  }
}

template <class T, class A>
void match_higher_of(const View& features, const View& ranks, int64_t num_prefix, float* out,
                     int64_t begin, int64_t end) {
  using Key = decltype(sort_key(A{}));
  constexpr int64_t kSign = 8 * sizeof(Key) - 1;
  constexpr Key kLowest = static_cast<Key>(Key{1} << kSign);
  const int64_t n = ranks.size[1], width = features.size[3], step = vectors_at_a_time<A>(width);
  A* own = accumulate_scratch.get<A>((kMatchedRows + step) * width);
  A* panels = own + kMatchedRows * width;
  Key* best_keys = key_scratch.get<Key>(3 * n);
  Key *order = best_keys + n, *above = order + n;
  for (int64_t item = begin, stop; item < end; item = stop) {
    const int64_t image = item / n, start = image * n;
    stop = start + n < end ? start + n : end;
    order_by_rank(ranks, image, best_keys, order, above);
    const auto token_of = [&](int64_t place) { return num_prefix + order[place]; };
    for (int64_t i = item - start; i < stop - start; ++i) {
      best_keys[i] = kLowest;
    }
    const int64_t most = above[stop - start - 1];
    for (int64_t first = 0; first < most; first += step) {
      const int64_t last = first + step < most ? first + step : most;
      make_panels<T>(features, image, first, last, own, panels, token_of);
      for (int64_t i = item - start; i < stop - start; i += kMatchedRows) {
        const int64_t left = stop - start - i, count = left < kMatchedRows ? left : kMatchedRows;
        if (above[i + count - 1] <= first) {
          continue;
        }
        const A* rows[kMatchedRows];
        Key ends[kMatchedRows];
        for (int64_t j = 0; j < kMatchedRows; ++j) {
          const int64_t place = i + (j < count ? j : count - 1);
          rows[j] = j < count ? feature_row<T>(features, image, token_of(place), own + j * width)
                              : rows[count - 1];
          ends[j] = above[place] < last ? above[place] : static_cast<Key>(last);
        }
        Candidates<Key> best[kMatchedRows];
        match_rows(rows, panels, width, first, ends, best);
        for (int64_t j = 0; j < count; ++j) {
          Key& so_far = best_keys[i + j];
          so_far = best[j].key > so_far ? best[j].key : so_far;
        }
      }
    }
    for (int64_t i = item - start; i < stop - start; ++i) {
      // The product that the key was made of; that of NaN has the bits of one.
      const Key bits = best_keys[i] ^ ((best_keys[i] >> kSign) & ~kLowest);
      const A* row = feature_row<T>(features, image, token_of(i), own);
      const A cosine = bit_cast<A>(bits) * to_unit(row, width);
      out[start + order[i]] = above[i] == 0 ? -INFINITY : static_cast<float>(cosine);
    }
  }
}

void match_higher(const View& features, const View& ranks, int64_t num_prefix, float* out,
                  int64_t begin, int64_t end) {
  by_dtype(features.dtype, [&](auto element) {
    using A = typename Type<decltype(element)>::Sum;
    match_higher_of<decltype(element), A>(features, ranks, num_prefix, out, begin, end);
  });
}

// ---------------------------------------------------------------------------- match_kept

template <class T, class A>
void match_kept_of(const View& features, const View& index, const int32_t* inverse,
                   int64_t num_prefix, int64_t* owner, int64_t begin, int64_t end) {
  using Key = decltype(sort_key(A{}));
  constexpr Key kLowest = static_cast<Key>(Key{1} << (8 * sizeof(Key) - 1));
  const int64_t num_tokens = features.size[2], width = features.size[3];
  const int64_t num_rows = index.size[1], step = vectors_at_a_time<A>(width);
  A* own = accumulate_scratch.get<A>((kMatchedRows + step) * width);
  A* panels = own + kMatchedRows * width;
  // Of the rows outside of the index: the best products so far, and which they are.
  Key* keys = key_scratch.get<Key>(2 * num_tokens);
  Key* dropped = keys + num_tokens;
  for (int64_t item = begin, stop; item < end; item = stop) {
    const int64_t image = item / num_tokens, start = image * num_tokens;
    stop = start + num_tokens < end ? start + num_tokens : end;
    int64_t num_dropped = 0;
    for (int64_t i = item; i < stop; ++i) {
      owner[i] = inverse[i] >= 0 ? inverse[i] : num_prefix;
      keys[num_dropped] = kLowest;
      dropped[num_dropped] = static_cast<Key>(i - start);
      num_dropped += inverse[i] < 0;
    }
    for (int64_t first = num_prefix; num_dropped > 0 && first < num_rows; first += step) {
      const int64_t last = first + step < num_rows ? first + step : num_rows;
      make_panels<T>(features, image, first, last, own, panels,
                     [&](int64_t r) { return *at<int64_t>(index, image, r); });
      Key ends[kMatchedRows];
      for (Key& to : ends) {
        to = static_cast<Key>(last);
      }
      for (int64_t i = 0; i < num_dropped; i += kMatchedRows) {
        const A* rows[kMatchedRows];
        for (int64_t j = 0; j < kMatchedRows; ++j) {
          const int64_t row = i + j < num_dropped ? i + j : num_dropped - 1;
          const int64_t later = row + kMatchedRows < num_dropped ? row + kMatchedRows : row;
          prefetch_feature<T>(features, image, dropped[later]);
          rows[j] = feature_row<T>(features, image, dropped[row], own + j * width);
        }
        Candidates<Key> best[kMatchedRows];
        match_rows(rows, panels, width, first, ends, best);
        for (int64_t j = 0; j < kMatchedRows && i + j < num_dropped; ++j) {
          if (best[j].key > keys[i + j]) {
            keys[i + j] = best[j].key;
            owner[start + dropped[i + j]] = best[j].place;
          }
        }
      }
    }
  }
}

void match_kept(const View& features, const View& index, const int32_t* inverse, int64_t num_prefix,
                int64_t* owner, int64_t begin, int64_t end) {
  by_dtype(features.dtype, [&](auto element) {
    using A = typename Type<decltype(element)>::Sum;
    match_kept_of<decltype(element), A>(features, index, inverse, num_prefix, owner, begin, end);
  });
}

// ---------------------------------------------------------------------------- merge_rows

IndexCheck group_rows(const View& owner, int64_t num_rows, bool every, int32_t* starts,
                      int32_t* rows, int64_t begin, int64_t end) {
  const int64_t num_tokens = owner.size[1], stride = owner.stride[1];
  for (int64_t b = begin; b < end; ++b) {
    const int64_t* owners = at<int64_t>(owner, b);
    int32_t* start = starts + b * (num_rows + 1);
    int32_t* order = rows + b * num_tokens;
    std::memset(start, 0, (num_rows + 1) * sizeof(*start));
    for (int64_t n = 0; n < num_tokens; ++n) {
      const int64_t m = owners[n * stride];
      if (static_cast<uint64_t>(m) >= static_cast<uint64_t>(num_rows)) {
        return {IndexCheck::kOutOfRange, b, m};
      }
      ++start[m];
    }
    int32_t sum = 0;
    for (int64_t m = 0; m < num_rows; ++m) {
      if (every && start[m] == 0) {
        return {IndexCheck::kMissing, b, m};
      }
      sum += start[m];
      start[m] = sum;
    }
    start[num_rows] = sum;
    // From the end of each group to its start, so that its rows ascend.
    for (int64_t n = num_tokens - 1; n >= 0; --n) {
      order[--start[owners[n * stride]]] = static_cast<int32_t>(n);
    }
  }
  return {IndexCheck::kOk, 0, 0};
}

// out = the sum of weight * row, in order, over total.
template <class T, class A>
SKIPVIT_FLATTEN inline void mean_of_rows(T* out, const T* const* rows, const A* weights,
                                         int64_t count, A total, int64_t n) {
  const Vec<A> divisor = broadcast(total);
  for_lanes(n, [&](int64_t i, auto lanes) {
    Vec<A> sum{};
    for (int64_t r = 0; r < count; ++r) {
      sum += weights[r] * load<A>(rows[r] + i, lanes);
    }
    store<A>(out + i, zip(sum, divisor, [](auto a, auto b) { return a / b; }), lanes);
  });
}

// f(image, m, the positions of owner m's rows, how many) for the items [begin, end) of B * M.
template <class F>
inline __attribute__((always_inline)) void for_groups(const int32_t* starts, const int32_t* rows,
                                                      int64_t num_rows, int64_t num_tokens,
                                                      int64_t begin, int64_t end, F f) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / num_rows, m = item % num_rows;
    const int32_t* start = starts + image * (num_rows + 1) + m;
    f(image, m, rows + image * num_tokens + start[0], start[1] - start[0]);
  }
}

// The row that is read `ahead` rows behind the r-th of a group: the groups of an image follow each
// other. At the end of the image its last one.
inline int32_t later_row(const int32_t* group, const int32_t* last, int64_t r, int64_t ahead) {
  return last - group - r > ahead ? group[r + ahead] : *last;
}

template <class T>
void merge_rows_of(const View& x, const View* sizes, const int32_t* starts, const int32_t* rows,
                   const View& out, float* merged_sizes, int64_t begin, int64_t end) {
  using A = typename Type<T>::Sum;
  const int64_t num_tokens = x.size[1], channels = x.size[2], stride = x.stride[2];
  const int64_t num_rows = out.size[1], ahead = rows_ahead(channels * sizeof(T));
  const Rows from(x);
  const T** sources = key_scratch.get<const T*>(num_tokens);
  A* weights = accumulate_scratch.get<A>(num_tokens);
  const auto merge = [&](int64_t image, int64_t m, const int32_t* group, int64_t count) {
    const int32_t* last = rows + (image + 1) * num_tokens - 1;
    float total = 0;
    for (int64_t r = 0; r < count; ++r) {
      const float size = sizes == nullptr ? 1 : *at<float>(*sizes, image, group[r]);
      total += size;
      weights[r] = size;
      sources[r] = reinterpret_cast<const T*>(from(image, group[r]));
      prefetch_row(from(image, later_row(group, last, r, ahead)), channels * sizeof(T));
    }
    merged_sizes[image * num_rows + m] = total;
    T* to = at<T>(out, image, m);
    if (count == 1) {
      copy_row(to, sources[0], stride, channels, sizeof(T));
      return;
    }
    if (stride != 1 && channels > 1) {
      T* copies = row_scratch.get<T>(count * channels);
      for (int64_t r = 0; r < count; ++r) {
        copy_row(copies + r * channels, sources[r], stride, channels, sizeof(T));
        sources[r] = copies + r * channels;
      }
    }
    mean_of_rows(to, sources, weights, count, static_cast<A>(total), channels);
  };
  for_groups(starts, rows, num_rows, num_tokens, begin, end, merge);
}

void merge_rows(const View& x, const View* sizes, const int32_t* starts, const int32_t* rows,
                const View& out, float* merged_sizes, int64_t begin, int64_t end) {
  by_dtype(x.dtype, [&](auto element) {
    merge_rows_of<decltype(element)>(x, sizes, starts, rows, out, merged_sizes, begin, end);
  });
}

template <class T>
SKIPVIT_FLATTEN inline void scale_row(T* out, const T* row, typename Type<T>::Sum weight,
                                      int64_t n) {
  using A = typename Type<T>::Sum;
  for_lanes(n, [&](int64_t i, auto lanes) {
    store<A>(out + i, weight * load<A>(row + i, lanes), lanes);
  });
}

template <class T>
void merge_rows_backward_of(const View& grad, const View& owner, const View* sizes,
                            const View& merged_sizes, const View& grad_x, int64_t begin,
                            int64_t end) {
  using A = typename Type<T>::Sum;
  const int64_t num_tokens = grad_x.size[1], channels = grad.size[2], stride = grad.stride[2];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / num_tokens, n = item % num_tokens;
    const int64_t m = *at<int64_t>(owner, image, n);
    const A size = sizes == nullptr ? 1 : *at<float>(*sizes, image, n);
    const A weight = size / *at<float>(merged_sizes, image, m);
    const T* row = contiguous(at<T>(grad, image, m), stride, channels);
    scale_row(at<T>(grad_x, image, n), row, weight, channels);
  }
}

void merge_rows_backward(const View& grad, const View& owner, const View* sizes,
                         const View& merged_sizes, const View& grad_x, int64_t begin, int64_t end) {
  by_dtype(grad.dtype, [&](auto element) {
    merge_rows_backward_of<decltype(element)>(grad, owner, sizes, merged_sizes, grad_x, begin, end);
  });
}

// -------------------------------------------------------------------------- restore_rows

// map_parts of three registers at once.
template <class F>
inline FloatReg map_three(FloatReg x, FloatReg y, FloatReg z, float, F f) {
  return f(x, y, z);
}
template <class F>
inline DoubleReg map_three(DoubleReg x, DoubleReg y, DoubleReg z, double, F f) {
  return f(x, y, z);
}
template <class T, class F>
inline Bits32 map_three(Bits32 x, Bits32 y, Bits32 z, T, F f) {
  const FloatReg even = f(from_even(x, T{}), from_even(y, T{}), from_even(z, T{}));
  const FloatReg odd = f(from_odd(x, T{}), from_odd(y, T{}), from_odd(z, T{}));
  return interleave(even, odd, T{});
}

// out = x + after - before.
template <class T>
SKIPVIT_FLATTEN inline void restore_row(T* out, const T* x, const T* before, const T* after,
                                        int64_t n) {
  using Packed = typename Type<T>::Packed;
  constexpr int64_t kCount = kRegisterBytes / sizeof(T);
  const auto restore = [&](int64_t i, auto bytes) {
    Packed own{}, was{}, is{};
    std::memcpy(&own, x + i, bytes);
    std::memcpy(&was, before + i, bytes);
    std::memcpy(&is, after + i, bytes);
    own = map_three(own, is, was, T{}, [](auto a, auto b, auto c) { return a + b - c; });
    std::memcpy(out + i, &own, bytes);
  };
  int64_t i = 0;
  for (; i + kCount <= n; i += kCount) {
    restore(i, std::integral_constant<int64_t, kRegisterBytes>{});
  }
  if (i < n) {
    restore(i, static_cast<int64_t>((n - i) * sizeof(T)));
  }
}

template <class T>
void restore_rows_of(const View& x, const View& before, const View& after, const int32_t* starts,
                     const int32_t* rows, const View& out, int64_t begin, int64_t end) {
  const int64_t num_tokens = x.size[1], channels = x.size[2], num_rows = after.size[1];
  const int64_t ahead = rows_ahead(channels * sizeof(T));
  const bool contiguous =
      channels <= 1 || (x.stride[2] == 1 && before.stride[2] == 1 && after.stride[2] == 1);
  T* copies = contiguous ? nullptr : row_scratch.get<T>(3 * channels);
  const auto row_of = [&](const View& v, int64_t image, int64_t row, int64_t copy) {
    const T* from = at<T>(v, image, row);
    if (!contiguous) {
      T* to = copies + copy * channels;
      copy_row(to, from, v.stride[2], channels, sizeof(T));
      from = to;
    }
    return from;
  };
  const auto restore = [&](int64_t image, int64_t m, const int32_t* group, int64_t count) {
    const int32_t* last = rows + (image + 1) * num_tokens - 1;
    const T *was = row_of(before, image, m, 0), *is = row_of(after, image, m, 1);
    for (int64_t r = 0; r < count; ++r) {
      T* to = at<T>(out, image, group[r]);
      prefetch_row(Rows(x)(image, later_row(group, last, r, ahead)), channels * sizeof(T));
      if (count == 1) {
        copy_row(to, is, 1, channels, sizeof(T));
      } else {
        restore_row(to, row_of(x, image, group[r], 2), was, is, channels);
      }
    }
  };
  for_groups(starts, rows, num_rows, num_tokens, begin, end, restore);
}

void restore_rows(const View& x, const View& before, const View& after, const int32_t* starts,
                  const int32_t* rows, const View& out, int64_t begin, int64_t end) {
  by_dtype(x.dtype, [&](auto element) {
    restore_rows_of<decltype(element)>(x, before, after, starts, rows, out, begin, end);
  });
}

template <class T>
void restore_rows_backward_of(const View& grad, const int32_t* starts, const int32_t* rows,
                              const View& grad_x, const View& grad_before, const View& grad_after,
                              int64_t begin, int64_t end) {
  using A = typename Type<T>::Sum;
  const int64_t num_tokens = grad.size[1], channels = grad.size[2], stride = grad.stride[2];
  const T** sources = key_scratch.get<const T*>(num_tokens);
  const auto sum = [&](int64_t image, int64_t m, const int32_t* group,
                       int64_t count) SKIPVIT_FLATTEN {
    T* to_before = at<T>(grad_before, image, m);
    T* to_after = at<T>(grad_after, image, m);
    if (count <= 1) {
      std::memset(to_before, 0, channels * sizeof(T));
    }
    if (count == 1) {
      copy_row(to_after, at<T>(grad, image, group[0]), stride, channels, sizeof(T));
      std::memset(at<T>(grad_x, image, group[0]), 0, channels * sizeof(T));
      return;
    }
    for (int64_t r = 0; r < count; ++r) {
      sources[r] = at<T>(grad, image, group[r]);
      T* to = at<T>(grad_x, image, group[r]);
      copy_row(to, sources[r], stride, channels, sizeof(T));
      sources[r] = to;
    }
    for_lanes(channels, [&](int64_t i, auto lanes) {
      Vec<A> total{};
      for (int64_t r = 0; r < count; ++r) {
        total += load<A>(sources[r] + i, lanes);
      }
      store<A>(to_after + i, total, lanes);
      store<A>(to_before + i, zip(Vec<A>{}, total, [](auto a, auto b) { return a - b; }), lanes);
    });
  };
  for_groups(starts, rows, grad_after.size[1], num_tokens, begin, end, sum);
}

void restore_rows_backward(const View& grad, const int32_t* starts, const int32_t* rows,
                           const View& grad_x, const View& grad_before, const View& grad_after,
                           int64_t begin, int64_t end) {
  by_dtype(grad.dtype, [&](auto element) {
    restore_rows_backward_of<decltype(element)>(grad, starts, rows, grad_x, grad_before, grad_after,
                                                begin, end);
  });
}

}  // namespace
}  // namespace SKIPVIT_ISA
}  // namespace skipvit
