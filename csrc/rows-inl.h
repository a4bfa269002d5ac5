// SPDX-License-Identifier: Apache-2.0
// Rows moved by an index: gather, scatter and the checks of the index. Included once per
// instruction set, by kernels.cpp.
#pragma once

#include "memory-inl.h"

namespace skipvit {
namespace SKIPVIT_ISA {
namespace {

IndexCheck check_range(const View& index, int64_t num_rows) {
  for (int64_t b = 0; b < index.size[0]; ++b) {
    // The sign of `outside` says that some row is negative or beyond the last: one test an image.
    uint64_t outside = 0;
    for (int64_t r = 0; r < index.size[1]; ++r) {
      const uint64_t row = static_cast<uint64_t>(*at<int64_t>(index, b, r));
      outside |= row | (static_cast<uint64_t>(num_rows) - 1 - row);
    }
    for (int64_t r = 0; static_cast<int64_t>(outside) < 0 && r < index.size[1]; ++r) {
      const int64_t row = *at<int64_t>(index, b, r);
      if (row < 0 || row >= num_rows) {
        return {IndexCheck::kOutOfRange, b, row};
      }
    }
  }
  return {IndexCheck::kOk, 0, 0};
}

IndexCheck invert_index(const View& index, int64_t num_tokens, int32_t* inverse, int64_t begin,
                        int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    int32_t* rank = inverse + b * num_tokens;
    std::memset(rank, -1, num_tokens * sizeof(int32_t));
    for (int64_t r = 0; r < index.size[1]; ++r) {
      const int64_t row = *at<int64_t>(index, b, r);
      if (row < 0 || row >= num_tokens) {
        return {IndexCheck::kOutOfRange, b, row};
      }
      if (rank[row] >= 0) {
        return {IndexCheck::kRepeated, b, row};
      }
      rank[row] = static_cast<int32_t>(r);
    }
  }
  return {IndexCheck::kOk, 0, 0};
}

void gather_rows(const View& x, const View& index, const View& out, int64_t begin, int64_t end) {
  const int64_t rows = index.size[1];
  const int64_t channels = x.size[2], stride = x.stride[2], element_size = x.element_size;
  const Rows from(x);
  RowWalk indices(Rows(index), rows, begin), to(Rows(out), rows, begin);
  const auto next_source = [&] {
    int64_t row;
    std::memcpy(&row, indices.address, sizeof(row));
    const char* source = from(indices.image, row);
    indices.next();
    return source;
  };
  for_rows(begin, end, rows_ahead(channels * element_size), next_source,
           [&](int64_t, const char* row, const char* later) {
             copy_row(to.address, row, stride, channels, element_size, later);
             to.next();
           });
}

// A row as the parts of map_parts, in their order; out takes whole registers.
template <class T>
SKIPVIT_FLATTEN inline void split_row(typename Type<T>::Sum* out, const T* row, int64_t stride,
                                      int64_t n) {
  using Packed = typename Type<T>::Packed;
  const T* from = contiguous(row, stride, n);
  for (int64_t i = 0; i < n; i += sizeof(Packed) / sizeof(T)) {
    const int64_t left = (n - i) * sizeof(T);
    Packed v{};
    std::memcpy(&v, from + i, left < kRegisterBytes ? left : kRegisterBytes);
    map_parts(v, T{}, [&](auto part, int64_t) {
      std::memcpy(out, &part, sizeof(part));
      out += sizeof(part) / sizeof(*out);
      return part;
    });
  }
}

template <class Reg>
inline Reg choose_register(bool first, Reg x, Reg y) {
#if defined(__AVX512F__)
  const __mmask16 mask = first ? 0xffff : 0;
  return bit_cast<Reg>(_mm512_mask_mov_epi32(bit_cast<__m512i>(y), mask, bit_cast<__m512i>(x)));
#else
  const Bits32 mask = Bits32{} - static_cast<uint32_t>(first);
  return bit_cast<Reg>((bit_cast<Bits32>(x) & mask) | (bit_cast<Bits32>(y) & ~mask));
#endif
}

// out = copied ? row : f(row, other, part, register), other from split_row; `part` is that of
// map_parts, `register` the number within 64 bytes. Both are computed and one is chosen: a branch
// on rows kept at random costs 4 ns a row, where 384 bytes are copied in 8. Sorting the rows by
// kind, 16 at a time, costs more at the memory. Fetches as copy_bytes does.
template <class T, class F>
SKIPVIT_FLATTEN inline void copy_or_map(T* out, const T* row, const typename Type<T>::Sum* other,
                                        int64_t n, bool copied, const char* next, F f) {
  using Packed = typename Type<T>::Packed;
  constexpr int64_t kCount = kRegisterBytes / sizeof(T);
  constexpr int64_t kRegs = 64 / kRegisterBytes;
  const auto registers = [&](auto v, int64_t reg) {
    const Packed mapped = map_parts(v, T{}, [&](auto x, int64_t part) {
      decltype(x) with;
      std::memcpy(&with, other + part * (sizeof(x) / sizeof(*other)), sizeof(with));
      return f(x, with, part, reg);
    });
    other += kCount;
    return choose_register(copied, v, mapped);
  };
  int64_t i = 0;
  for (; i + kRegs * kCount <= n; i += kRegs * kCount) {
    __builtin_prefetch(next + i * sizeof(T));
    for (int64_t reg = 0; reg < kRegs; ++reg) {
      Packed v;
      std::memcpy(&v, row + i + reg * kCount, sizeof(v));
      v = registers(v, reg);
      std::memcpy(out + i + reg * kCount, &v, sizeof(v));
    }
  }
  for (int64_t reg = 0; i < n; ++reg, i += kCount) {
    const int64_t bytes = (n - i < kCount ? n - i : kCount) * sizeof(T);
    Packed v{};
    std::memcpy(&v, row + i, bytes);
    v = registers(v, reg);
    std::memcpy(out + i, &v, bytes);
  }
}

// The addresses of the rows that those of (B, N, C) are made from: inverse of them from `kept`,
// else their own of `others`.
struct ChosenRows {
  Rows kept;
  RowWalk others;
  const int32_t* rank;

  ChosenRows(const View& kept, const View& others, const int32_t* inverse, int64_t num_tokens,
             int64_t begin)
      : kept(kept), others(Rows(others), num_tokens, begin), rank(inverse + begin) {}
  const char* operator()() {
    const int32_t r = *rank++;
    const char* source = choose(r >= 0, kept(others.image, r), others.address);
    others.next();
    return source;
  }
};

template <class T>
void scatter_rows_adding(const View& x, const View& tokens, const View& update,
                         const int32_t* inverse, const View& out, int64_t begin, int64_t end) {
  using A = typename Type<T>::Sum;
  const int64_t num_tokens = out.size[1], channels = out.size[2];
  const int64_t stride = tokens.stride[2], x_stride = x.stride[2];
  const bool all_contiguous = stride == 1 && x_stride == 1;
  RowWalk to(Rows(out), num_tokens, begin);
  A* added = accumulate_scratch.get<A>(channels + 2 * kLanes);
  int64_t image = -1;
  for_rows(begin, end, rows_ahead(channels * sizeof(T)),
           ChosenRows(tokens, x, inverse, num_tokens, begin),
           [&](int64_t item, const char* from, const char* later) {
             if (to.image != image) {
               image = to.image;
               split_row(added, at<T>(update, image), update.stride[1], channels);
             }
             const bool kept = inverse[item] >= 0;
             const T* row = contiguous(reinterpret_cast<const T*>(from),
                                       all_contiguous ? 1
                                       : kept         ? stride
                                                      : x_stride,
                                       channels);
             copy_or_map(reinterpret_cast<T*>(to.address), row, added, channels, kept, later,
                         [](auto x, auto u, int64_t, int64_t) { return x + u; });
             to.next();
           });
}

void scatter_rows(const View* x, const View& tokens, const View* update, const int32_t* inverse,
                  const View& out, int64_t begin, int64_t end) {
  if (update != nullptr) {
    by_dtype(out.dtype, [&](auto element) {
      scatter_rows_adding<decltype(element)>(*x, tokens, *update, inverse, out, begin, end);
    });
    return;
  }
  const int64_t num_tokens = out.size[1], channels = out.size[2];
  const int64_t element_size = out.element_size;
  // Without x the other rows are copies of one row of zeros.
  View zeros = out;
  zeros.stride[0] = zeros.stride[1] = 0;
  if (x == nullptr) {
    zeros.data = row_scratch.get<char>(channels * element_size);
    std::memset(zeros.data, 0, channels * element_size);
    x = &zeros;
  }
  const int64_t stride = tokens.stride[2], x_stride = x->stride[2];
  const bool all_contiguous = stride == 1 && x_stride == 1;
  RowWalk to(Rows(out), num_tokens, begin);
  for_rows(
      begin, end, rows_ahead(channels * element_size),
      ChosenRows(tokens, *x, inverse, num_tokens, begin),
      [&](int64_t item, const char* from, const char* later) {
        const int64_t from_stride = all_contiguous ? 1 : inverse[item] >= 0 ? stride : x_stride;
        copy_row(to.address, from, from_stride, channels, element_size, later);
        to.next();
      });
}

}  // namespace
}  // namespace SKIPVIT_ISA
}  // namespace skipvit
