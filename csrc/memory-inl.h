// SPDX-License-Identifier: Apache-2.0
// Scratch, rows by address, row copies, and the switches over dtypes. Included once per
// instruction set, by kernels.cpp.
#pragma once

#include <cstdlib>
#include <new>

#include "simd-inl.h"

namespace skipvit {
namespace SKIPVIT_ISA {
namespace {

// Per-thread buffers that only grow: no allocation once the shapes have been seen. At a cache
// line's start: else every load of a whole register is two.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) / 64 + 1) * 64;
    if (bytes > capacity_) {
      std::free(data_);
      capacity_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (data_ == nullptr) {
        throw std::bad_alloc();
      }
      capacity_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t capacity_ = 0;
};

thread_local Scratch row_scratch;         // a row gathered from strided memory
thread_local Scratch accumulate_scratch;  // a row, or all scores of an image, as accumulators
thread_local Scratch key_scratch;         // the sort keys of an image

template <class T>
inline T* at(const View& v, int64_t i, int64_t j = 0, int64_t k = 0) {
  return static_cast<T*>(v.data) + i * v.stride[0] + j * v.stride[1] + k * v.stride[2];
}

// The rows of a tensor (B, N, C) by address: a View seen through a reference is read again after
// every store, which may have changed it for all the compiler knows.
struct Rows {
  char* data;
  int64_t image_bytes, row_bytes;

  explicit Rows(const View& v)
      : data(static_cast<char*>(v.data)),
        image_bytes(v.stride[0] * v.element_size),
        row_bytes(v.stride[1] * v.element_size) {}
  char* operator()(int64_t image, int64_t row) const {
    return data + image * image_bytes + row * row_bytes;
  }
};

// Not inline: the registers are for the rows that are contiguous.
template <class Bits>
__attribute__((noinline)) void copy_strided(void* out, const void* in, int64_t stride, int64_t n) {
  Bits* to = static_cast<Bits*>(out);
  const Bits* from = static_cast<const Bits*>(in);
  for (int64_t i = 0; i < n; ++i) {
    to[i] = from[i * stride];
  }
}

// Rows between the one being copied and the one fetched into the cache for later: about 9 kB of
// them. The hardware does not follow rows with gaps. The distance is one in bytes: for B 64, N 577,
// C 192 in bfloat16 on one thread a scatter reaches 0.71 of a copy's speed with 4 rows, 0.90
// with 16.
constexpr int64_t kMostRowsAhead = 16;  // a power of two
inline int64_t rows_ahead(int64_t row_bytes) {
  const int64_t rows = 9216 / (row_bytes > 0 ? row_bytes : 1);
  return rows < 3 ? 3 : rows > kMostRowsAhead ? kMostRowsAhead : rows;
}

inline void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(row + i);
  }
}

// Copies a row in whole registers, not with a library call for each, and fetches as many bytes of
// `next`, which is needed later. Register by register: an array of them GCC 12 also stores on the
// stack, which made every copy write twice.
inline void copy_bytes(char* out, const char* in, int64_t n, const char* next) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    __builtin_prefetch(next + i);
    for (int64_t j = i; j < i + 64; j += kRegisterBytes) {
      Bytes v;
      std::memcpy(&v, in + j, sizeof(v));
      std::memcpy(out + j, &v, sizeof(v));
    }
  }
  if (i < n) {
    __builtin_prefetch(next + i);
    std::memcpy(out + i, in + i, n - i);
  }
}

inline void copy_row(char* out, const char* in, int64_t stride, int64_t n, int64_t element_size,
                     const char* next) {
  if (stride == 1 || n <= 1) {
    copy_bytes(out, in, n * element_size, next);
  } else if (element_size == 2) {
    copy_strided<uint16_t>(out, in, stride, n);
  } else if (element_size == 4) {
    copy_strided<uint32_t>(out, in, stride, n);
  } else {
    copy_strided<uint64_t>(out, in, stride, n);
  }
}

inline void copy_row(void* out, const void* in, int64_t stride, int64_t n, int64_t element_size) {
  char* to = static_cast<char*>(out);
  const char* from = static_cast<const char*>(in);
  copy_row(to, from, stride, n, element_size, from);
}

// The rows of a tensor (B, rows, C) from the item-th on, without a division or product a row.
struct RowWalk {
  int64_t rows;
  char* address;
  int64_t image, left, row_bytes, gap;

  RowWalk(const Rows& of, int64_t num_rows, int64_t item)
      : rows(num_rows > 0 ? num_rows : 1),  // a walk over no rows starts too, and goes nowhere
        address(of(item / rows, item % rows)),
        image(item / rows),
        left(rows - item % rows),
        row_bytes(of.row_bytes),
        gap(of.image_bytes - rows * of.row_bytes) {}
  void next() {
    address += row_bytes;
    if (--left == 0) {
      left = rows;
      address += gap;
      ++image;
    }
  }
};

// each(item, source, later source) for the items [begin, end). next_source() is the address of the
// row that the next item is made from; it is asked for `step` rows ahead of its use.
template <class NextSource, class Each>
inline __attribute__((always_inline)) void for_rows(int64_t begin, int64_t end, int64_t step,
                                                    NextSource next_source, Each each) {
  const char* sources[kMostRowsAhead];
  for (int64_t i = 0; i < step && i < end - begin; ++i) {
    sources[i] = next_source();
  }
  uint64_t place = 0, later_place = step;
  for (int64_t item = begin; item < end; ++item) {
    const char* from = sources[place++ % kMostRowsAhead];
    const char* later = from;
    if (item + step < end) {
      later = next_source();
      sources[later_place++ % kMostRowsAhead] = later;
    }
    each(item, from, later);
  }
}

// x where it is one of the rows kept, else y. No branch: on rows kept at random it is mispredicted
// every second time.
inline const char* choose(bool kept, const char* x, const char* y) {
  const uintptr_t mask = -static_cast<uintptr_t>(kept);
  return reinterpret_cast<const char*>((reinterpret_cast<uintptr_t>(x) & mask) |
                                       (reinterpret_cast<uintptr_t>(y) & ~mask));
}

// The row itself where it is contiguous, else a copy of it.
template <class T>
inline const T* contiguous(const T* row, int64_t stride, int64_t n) {
  if (stride == 1 || n <= 1) {
    return row;
  }
  T* copy = row_scratch.get<T>(n);
  copy_row(copy, row, stride, n, sizeof(T));
  return copy;
}

// A row as accumulators.
template <class A, class T>
SKIPVIT_FLATTEN inline void widen_row(A* out, const T* row, int64_t stride, int64_t n) {
  const T* from = contiguous(row, stride, n);
  for_lanes(n, [&](int64_t i, auto count) { store<A>(out + i, load<A>(from + i, count), count); });
}

// f(T{}) for the element type of x.
template <class F>
inline void by_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat16:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat{});
    case DType::kFloat64:
      return f(double{});
  }
}

// f(T{}, A{}): A, the type of the sums, is double where `wide` says so, as it is for T = double.
template <class F>
inline void by_dtype_and_sum(DType dtype, bool wide, F f) {
  by_dtype(dtype, [&](auto element) {
    if constexpr (sizeof(element) < sizeof(double)) {
      if (!wide) {
        return f(element, float{});
      }
    }
    f(element, double{});
  });
}

}  // namespace
}  // namespace SKIPVIT_ISA
}  // namespace skipvit
