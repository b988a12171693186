// What the row loops are written in: Vec, a register of float lanes. The including isa_*.cpp has brought its own Vec:
//
//   splat(a)                    every lane a
//   load(p), store(p, v)        float, Bf16 or Fp16 memory; rounding to nearest even, NaN stays NaN
//   round_as(v, T{})            what store followed by load gives
//   + - * /, fma, fnma          fma(a, b, c) = a*b + c, fnma(a, b, c) = c - a*b; one rounding where the processor can
//   min, max                    of a NaN and a number: the second argument
//   minus_abs(v)                -|v|
//   if_negative(sign, a, b)     a where the sign bit is set, b elsewhere
//   nearest_integer(v)          for |v| < 2^22
//   times_exp2(a, n)            a * 2^n for integers n in [-252, 254]
//   sum(v), largest(v)          over the lanes
//
// This header adds the ends of rows and the exponential.
#pragma once

#include "kernels.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

template <class T>
__attribute__((noinline)) Vec load_tail(const T* p, int64_t left, float pad) {
  T values[Vec::size] = {};
  for (int64_t i = 0; i < left; ++i) values[i] = p[i];
  float lanes[Vec::size];
  store(lanes, load(values));
  for (int64_t i = left > 0 ? left : 0; i < Vec::size; ++i) lanes[i] = pad;
  return load(lanes);
}

template <class T>
__attribute__((noinline)) void store_tail(T* p, Vec a, int64_t left) {
  T values[Vec::size];
  store(values, a);
  for (int64_t i = 0; i < left; ++i) p[i] = values[i];
}

// With `left` elements up to the end of the row: lanes past it read as `pad` and are not written.
// The lanes of a tail go through the same arithmetic as all others, so where a row is cut never changes its bits.
template <class T>
inline Vec load(const T* p, int64_t left, float pad = 0.0f) {
  return __builtin_expect(left >= Vec::size, 1) ? load(p) : load_tail(p, left, pad);
}

template <class T>
inline void store(T* p, Vec a, int64_t left) {
  if (__builtin_expect(left >= Vec::size, 1)) {
    store(p, a);
  } else {
    store_tail(p, a, left);
  }
}

// e^x within 1 ulp; 0 for -infinity, infinity past 88.7, subnormal results included, NaN for NaN.
// With n = round(x / ln 2): e^x = 2^n * e^r, |r| <= ln(2)/2. The first part of ln 2 has 10 significant bits, which makes
// its multiples exact; the polynomial is the minimax fit of (e^r - 1 - r) / r^2, with a relative error below 2^-28.
inline Vec exp(Vec x) {
  // Beyond these the result is 0 or infinity. The order of the arguments lets a NaN through.
  x = min(splat(89.0f), max(splat(-104.0f), x));
  const Vec n = nearest_integer(x * splat(1.44269504f));
  const Vec r = fnma(n, splat(-2.12194440e-4f), fnma(n, splat(0.693359375f), x));
  Vec q = fma(splat(0x1.6a2434p-10f), r, splat(0x1.1239e2p-7f));
  q = fma(q, r, splat(0x1.5558f2p-5f));
  q = fma(q, r, splat(0x1.555492p-3f));
  q = fma(q, r, splat(0x1.fffffcp-2f));
  return times_exp2(fma(q, r * r, r) + splat(1.0f), n);
}

// Calls f with a value of the C++ type behind each dtype.
template <class F>
void with_type(DType type, F f) {
  switch (type) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(Bf16{});
    case DType::f16: return f(Fp16{});
  }
}

// The same for a pair whose second dtype is the first one or f32.
template <class F>
void with_types(DType type, DType other, F f) {
  with_type(type, [&](auto t) {
    if (other == DType::f32) {
      f(t, float{});
    } else {
      f(t, t);
    }
  });
}

}  // namespace
}  // namespace FASTLORA_ISA
}  // namespace fastlora
