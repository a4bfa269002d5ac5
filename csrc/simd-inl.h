// SPDX-License-Identifier: Apache-2.0
// Vectors of 16 elements, the same on every instruction set: loads and stores of every dtype, sums
// in a fixed order, exp. Included once per instruction set, by kernels.cpp.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace skipvit {
namespace SKIPVIT_ISA {
namespace {

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

}  // namespace
}  // namespace SKIPVIT_ISA
}  // namespace skipvit
