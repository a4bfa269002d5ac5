// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set, with SKIPVIT_ISA naming the namespace. Everything but the
// table at the end is in an unnamed namespace and no library template is used: a weak symbol
// compiled for AVX-512 could otherwise be the one the linker keeps for a machine without it.
#include "kernels.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace skipvit {
namespace SKIPVIT_ISA {
namespace {

// ------------------------------------------------------------------------------- vectors of 16

// Sixteen lanes for every instruction set, as one, two or four registers, so that every sum has the
// same order and the same bits everywhere. GCC would take a vector wider than a register too, but
// moves it through memory: AVX2 then ran four times slower than AVX-512.
constexpr int64_t kLanes = 16;
#if defined(__AVX512F__)
constexpr int64_t kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kRegisterBytes = 32;
#else
constexpr int64_t kRegisterBytes = 16;
#endif
typedef float FloatReg __attribute__((vector_size(kRegisterBytes)));
typedef double DoubleReg __attribute__((vector_size(kRegisterBytes)));
typedef uint32_t Bits32 __attribute__((vector_size(kRegisterBytes)));
typedef int32_t IntReg __attribute__((vector_size(kRegisterBytes)));
typedef uint16_t Bits16 __attribute__((vector_size(kRegisterBytes / 2)));
typedef char Bytes __attribute__((vector_size(kRegisterBytes)));

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast keeps the bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// What one register's worth of a type is computed in (Reg) and stored as (Stored).
template <class T>
struct Type {
  using Sum = float;
  using Stored = Bits16;
  using Packed = Bits32;  // a full register
};
template <>
struct Type<float> {
  using Sum = float;
  using Reg = FloatReg;
  using Stored = FloatReg;
  using Packed = FloatReg;
  typedef float Four __attribute__((vector_size(16)));
  typedef int32_t FourPlaces __attribute__((vector_size(16)));
  typedef float Eight __attribute__((vector_size(32)));
};
template <>
struct Type<double> {
  using Sum = double;
  using Reg = DoubleReg;
  using Stored = DoubleReg;
  using Packed = DoubleReg;
  typedef double Four __attribute__((vector_size(32)));
  typedef int64_t FourPlaces __attribute__((vector_size(32)));
  typedef double Eight __attribute__((vector_size(64)));
};

// One instruction each way (two for AVX2's truncate). GCC 12 splits __builtin_convertvector into
// halves and joins them again: scatter_back with an update, B 64, N 197, C 192 in bfloat16 on one
// thread, took 217 instead of 171 us.
inline Bits32 zero_extend(Bits16 v) {
#if defined(__AVX512F__)
  return bit_cast<Bits32>(_mm512_maskz_cvtepu16_epi32(-1, bit_cast<__m256i>(v)));
#elif defined(__AVX2__)
  return bit_cast<Bits32>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(v)));
#else
  return __builtin_convertvector(v, Bits32);
#endif
}
// The low halves; the high ones must be 0.
inline Bits16 truncate(Bits32 v) {
#if defined(__AVX512F__)
  return bit_cast<Bits16>(_mm512_maskz_cvtepi32_epi16(-1, bit_cast<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i halves = bit_cast<__m256i>(v);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
  return bit_cast<Bits16>(_mm256_castsi256_si128(packed));
#else
  return __builtin_convertvector(v, Bits16);
#endif
}

// From and to the low half of each lane; the high one is 0.
inline FloatReg from_low(Bits32 bits, BFloat) { return bit_cast<FloatReg>(bits << 16); }
// Subnormals go through a subtraction of normal numbers, so flush-to-zero modes do not touch them.
inline FloatReg from_low(Bits32 bits, Half) {
  const Bits32 magnitude = bits & 0x7fff;
  const Bits32 normal = (magnitude << 13) + (112u << 23);
  const Bits32 smallest = (magnitude << 13) + (113u << 23);
  const Bits32 subnormal =
      bit_cast<Bits32>(bit_cast<FloatReg>(smallest) - bit_cast<FloatReg>(Bits32{} + (113u << 23)));
  Bits32 result = magnitude < 0x400 ? subnormal : normal;
  result = magnitude >= 0x7c00 ? normal + (112u << 23) : result;
  return bit_cast<FloatReg>(result | ((bits & 0x8000) << 16));
}

// From the low and from the high halves, whatever the other ones are.
template <class T>
inline FloatReg from_even(Bits32 bits, T) {
  return from_low(bits & 0xffff, T{});
}
template <class T>
inline FloatReg from_odd(Bits32 bits, T) {
  return from_low(bits >> 16, T{});
}
inline FloatReg from_even(Bits32 bits, BFloat) { return bit_cast<FloatReg>(bits << 16); }
inline FloatReg from_odd(Bits32 bits, BFloat) { return bit_cast<FloatReg>(bits & 0xffff0000); }

// Round to nearest even, NaN to the quiet NaN: as torch rounds.
inline Bits32 to_high(FloatReg v, BFloat) {  // whatever is left in the low half
  const Bits32 bits = bit_cast<Bits32>(v);
  const Bits32 rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return v != v ? Bits32{} + 0x7fc00000 : rounded;
}
inline Bits32 to_low(FloatReg v, BFloat) { return to_high(v, BFloat{}) >> 16; }
inline Bits32 to_low(FloatReg v, Half) {
  const Bits32 bits = bit_cast<Bits32>(v);
  const Bits32 magnitude = bits & 0x7fffffff;
  const Bits32 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 leaves the result in units of 2**-24, float16's smallest step.
  const Bits32 subnormal = bit_cast<Bits32>(bit_cast<FloatReg>(magnitude) + 0.5f) - 0x3f000000;
  Bits32 result = magnitude < 0x38800000 ? subnormal : normal;
  result = magnitude >= 0x47800000 ? Bits32{} + 0x7c00 : result;
  result = magnitude > 0x7f800000 ? Bits32{} + 0x7e00 : result;
  return result | ((bits >> 16) & 0x8000);
}
inline Bits32 to_high(FloatReg v, Half) { return to_low(v, Half{}) << 16; }

inline FloatReg widen(FloatReg v, float) { return v; }
inline DoubleReg widen(DoubleReg v, double) { return v; }
template <class T>
inline FloatReg widen(Bits16 v, T) {
  return from_low(zero_extend(v), T{});
}
inline FloatReg narrow(FloatReg v, float) { return v; }
inline DoubleReg narrow(DoubleReg v, double) { return v; }
template <class T>
inline Bits16 narrow(FloatReg v, T) {
  return truncate(to_low(v, T{}));
}

// Two registers of results as one of elements: x at the even places, y at the odd ones.
template <class T>
inline Bits32 interleave(FloatReg x, FloatReg y, T) {
  return to_low(x, T{}) | (to_high(y, T{}) & 0xffff0000);
}

#if defined(__AVX512BF16__)
// The processor rounds to bfloat16 in one instruction, but takes subnormals for 0 and keeps what a
// NaN carries. Where there is none of these its bits are those of to_high, which else does it.
inline __mmask16 special_lanes(FloatReg v) {
  return _mm512_fpclass_ps_mask(v, 0x80 | 0x20 | 0x01);  // signalling NaN, subnormal, quiet NaN
}
inline bool processor_rounds(FloatReg x, FloatReg y) {
  return __builtin_expect(_kortestz_mask16_u8(special_lanes(x), special_lanes(y)), 1);
}
inline Bits16 narrow(FloatReg v, BFloat) {
  return processor_rounds(v, v) ? bit_cast<Bits16>(_mm512_cvtneps_pbh(v))
                                : truncate(to_low(v, BFloat{}));
}
inline Bits32 interleave(FloatReg x, FloatReg y, BFloat) {
  if (!processor_rounds(x, y)) {
    return to_low(x, BFloat{}) | (to_high(y, BFloat{}) & 0xffff0000);
  }
  const __m512i places =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return bit_cast<Bits32>(
      _mm512_maskz_permutexvar_epi16(-1, places, bit_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x))));
}
#endif

// A register of elements as they lie in memory, and f(part, index) of what they are computed in: of
// 16-bit elements first those at even places, then those at odd ones. That takes no shuffle, and
// one store of a whole register.
template <class F>
inline FloatReg map_parts(FloatReg v, float, F f) {
  return f(v, 0);
}
template <class F>
inline DoubleReg map_parts(DoubleReg v, double, F f) {
  return f(v, 0);
}
template <class T, class F>
inline Bits32 map_parts(Bits32 v, T, F f) {
  const FloatReg even = f(from_even(v, T{}), 0), odd = f(from_odd(v, T{}), 1);
  return interleave(even, odd, T{});
}

template <class A>
struct Vec {
  using Reg = typename Type<A>::Reg;
  static constexpr int64_t kWidth = kRegisterBytes / sizeof(A);
  static constexpr int64_t kRegs = kLanes / kWidth;
  Reg reg[kRegs];
};

// f(register of x, register of y) for each register.
template <class A, class F>
inline Vec<A> zip(const Vec<A>& x, const Vec<A>& y, F f) {
  Vec<A> result;
  for (int64_t r = 0; r < Vec<A>::kRegs; ++r) {
    result.reg[r] = f(x.reg[r], y.reg[r]);
  }
  return result;
}

template <class A>
inline Vec<A> operator+(const Vec<A>& x, const Vec<A>& y) {
  return zip(x, y, [](auto a, auto b) { return a + b; });
}
template <class A>
inline Vec<A> operator*(const Vec<A>& x, const Vec<A>& y) {
  return zip(x, y, [](auto a, auto b) { return a * b; });
}
template <class A>
inline Vec<A>& operator+=(Vec<A>& x, const Vec<A>& y) {
  return x = x + y;
}
template <class A>
inline Vec<A> operator*(A x, const Vec<A>& y) {
  return zip(y, y, [x](auto a, auto) { return x * a; });
}
// x where it is larger than y, else y.
template <class A>
inline Vec<A> maximum(const Vec<A>& x, const Vec<A>& y) {
  return zip(x, y, [](auto a, auto b) { return a > b ? a : b; });
}
template <class A>
inline Vec<A> broadcast(A x) {
  return zip(Vec<A>{}, Vec<A>{}, [x](auto zero, auto) { return zero + x; });
}

// `count` of 16 elements as accumulators; the others are 0.
template <class A, class T>
inline Vec<A> load(const T* p, int64_t count) {
  T padded[kLanes];
  if (count != kLanes) {
    std::memset(padded, 0, sizeof(padded));
    std::memcpy(padded, p, count * sizeof(T));
    p = padded;
  }
  Vec<A> result;
  if constexpr (sizeof(A) == sizeof(typename Type<T>::Sum)) {
    for (int64_t r = 0; r < Vec<A>::kRegs; ++r) {
      typename Type<T>::Stored stored;
      std::memcpy(&stored, p + r * Vec<A>::kWidth, sizeof(stored));
      result.reg[r] = widen(stored, T{});
    }
  } else {  // float64 scores beside smaller tokens: rare, so lane by lane
    float lanes[kLanes];
    const Vec<float> floats = load<float>(p, kLanes);
    std::memcpy(lanes, &floats, sizeof(lanes));
    for (int64_t i = 0; i < kLanes; ++i) {
      result.reg[i / Vec<A>::kWidth][i % Vec<A>::kWidth] = lanes[i];
    }
  }
  return result;
}

template <class A, class T>
inline void store(T* p, const Vec<A>& v, int64_t count) {
  T padded[kLanes];
  T* to = count == kLanes ? p : padded;
  if constexpr (sizeof(A) == sizeof(typename Type<T>::Sum)) {
    for (int64_t r = 0; r < Vec<A>::kRegs; ++r) {
      const typename Type<T>::Stored stored = narrow(v.reg[r], T{});
      std::memcpy(to + r * Vec<A>::kWidth, &stored, sizeof(stored));
    }
  } else {
    typename Type<T>::Sum lanes[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      lanes[i] = static_cast<typename Type<T>::Sum>(v.reg[i / Vec<A>::kWidth][i % Vec<A>::kWidth]);
    }
    store<typename Type<T>::Sum>(to, load<typename Type<T>::Sum>(lanes, kLanes), kLanes);
  }
  if (count != kLanes) {
    std::memcpy(p, padded, count * sizeof(T));
  }
}

// For the innermost loops: GCC else leaves calls in them, with every vector passed through memory.
#define SKIPVIT_FLATTEN __attribute__((flatten))

// A count that the compiler knows to be 16: as a plain constant it may be merged with the others
// and tested for every vector.
struct AllLanes {
  constexpr operator int64_t() const { return kLanes; }
};

// f(first, count) over n elements; count is AllLanes except in the last call.
template <class F>
inline __attribute__((always_inline)) void for_lanes(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    f(i, AllLanes{});
  }
  if (i < n) {
    f(i, n - i);
  }
}

template <class A>
using Four = typename Type<A>::Four;

// Four lanes of x and y. GCC 11 has only its own spelling, clang only the other.
#if defined(__clang__)
#define SKIPVIT_SHUFFLE(A, x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SKIPVIT_SHUFFLE(A, x, y, ...) \
  __builtin_shuffle(x, y, typename Type<A>::FourPlaces{__VA_ARGS__})
#endif

// Halves are added pairwise, so the order does not depend on the register width.
template <class A>
inline Four<A> fold(const Vec<A>& v) {
  if constexpr (kRegisterBytes == 64) {
    typename Type<A>::Eight eight[2];
    std::memcpy(eight, &v, sizeof(v));
    eight[0] += eight[1];
    Four<A> four[2];
    std::memcpy(four, &eight[0], sizeof(four));
    return four[0] + four[1];
  } else {
    Four<A> four[4];
    std::memcpy(four, &v, sizeof(v));
    return (four[0] + four[2]) + (four[1] + four[3]);
  }
}

template <class A>
inline A sum_lanes(const Vec<A>& v) {
  const Four<A> four = fold<A>(v);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// The sums of four vectors, each in the order of sum_lanes.
template <class A>
inline Four<A> sum_lanes(const Vec<A>& v0, const Vec<A>& v1, const Vec<A>& v2, const Vec<A>& v3) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A,
                               float>) {  // a third of the instructions: all four in one register
    const auto halves = [](__m512 a, __m512 b) {
      return _mm512_maskz_shuffle_f32x4(-1, a, b, 0x44) +
             _mm512_maskz_shuffle_f32x4(-1, a, b, 0xee);
    };
    const __m512 ab = halves(bit_cast<__m512>(v0), bit_cast<__m512>(v1));
    const __m512 cd = halves(bit_cast<__m512>(v2), bit_cast<__m512>(v3));
    const __m512 fours =
        _mm512_maskz_shuffle_f32x4(-1, ab, cd, 0x88) + _mm512_maskz_shuffle_f32x4(-1, ab, cd, 0xdd);
    const __m512 twos = fours + _mm512_maskz_permute_ps(-1, fours, 0x4e);
    const __m512 ones = twos + _mm512_maskz_permute_ps(-1, twos, 0xb1);
    const __m512 packed = _mm512_maskz_compress_ps(0x1111, ones);
    Four<A> sums[4];
    std::memcpy(sums, &packed, sizeof(sums));
    return sums[0];
  }
#endif
  const Four<A> a = fold<A>(v0), b = fold<A>(v1), c = fold<A>(v2), d = fold<A>(v3);
  const Four<A> ab = SKIPVIT_SHUFFLE(A, a, b, 0, 1, 4, 5) + SKIPVIT_SHUFFLE(A, a, b, 2, 3, 6, 7);
  const Four<A> cd = SKIPVIT_SHUFFLE(A, c, d, 0, 1, 4, 5) + SKIPVIT_SHUFFLE(A, c, d, 2, 3, 6, 7);
  return SKIPVIT_SHUFFLE(A, ab, cd, 0, 2, 4, 6) + SKIPVIT_SHUFFLE(A, ab, cd, 1, 3, 5, 7);
}

// x . y in four running sums: with one, each addition waits for the one before.
template <class A, class T>
SKIPVIT_FLATTEN inline A dot(const A* x, const T* y, int64_t n) {
  Vec<A> s0{}, s1{}, s2{}, s3{};
  const auto product = [&](int64_t i, auto count) {
    return load<A>(x + i, count) * load<A>(y + i, count);
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    s0 += product(i, AllLanes{});
    s1 += product(i + kLanes, AllLanes{});
    s2 += product(i + 2 * kLanes, AllLanes{});
    s3 += product(i + 3 * kLanes, AllLanes{});
  }
  for_lanes(n - i, [&](int64_t j, auto count) { s0 += product(i + j, count); });
  return sum_lanes<A>((s0 + s1) + (s2 + s3));
}

// e**v for v <= 0 within 2 units in the last place; NaN stays NaN, below -87.3 gives 0.
inline FloatReg exp(FloatReg v) {
  const IntReg underflow = v < -87.3f;
  const FloatReg x = underflow ? FloatReg{} : v;
  // Adding 1.5 * 2**23 leaves the nearest integer to x / ln 2 in the low bits.
  const FloatReg shifted = x * 1.44269504f + 12582912.0f;
  const FloatReg n = shifted - 12582912.0f;
  const FloatReg r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  FloatReg p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const FloatReg power = bit_cast<FloatReg>((bit_cast<IntReg>(shifted) << 23) + (127 << 23));
  const FloatReg result = p * power;
  return underflow ? FloatReg{} : result;
}
inline DoubleReg exp(DoubleReg v) {
  for (int64_t i = 0; i < Vec<double>::kWidth; ++i) {
    v[i] = std::exp(v[i]);
  }
  return v;
}

// ------------------------------------------------------------------------------- memory

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
  char* address;
  int64_t image, left, rows, row_bytes, gap;

  RowWalk(const Rows& of, int64_t rows, int64_t item)
      : address(of(item / rows, item % rows)),
        image(item / rows),
        left(rows - item % rows),
        rows(rows),
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

// ------------------------------------------------------------------------------- cls_scores

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

// ------------------------------------------------------------------------------- selection

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

// ------------------------------------------------------------------------------- row moves

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

// ------------------------------------------------------------------------------- column sums

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
    A* sum = accumulate_scratch.get<A>(c.count);
    std::memset(sum, 0, c.count * sizeof(A));
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

extern const Kernels kernels;
const Kernels kernels = {
    cls_logits,  cls_softmax_mean, head_mean,     select_topk,  check_range,           invert_index,
    gather_rows, sum_dropped,      fuse_backward, scatter_rows, scatter_back_backward,
};

}  // namespace SKIPVIT_ISA
}  // namespace skipvit
