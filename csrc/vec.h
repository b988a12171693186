// What the row loops are written in: Vec, a pair of registers of float lanes. Two, because the kernels' chains of
// dependent operations (an exponential, a rounding) are long, and a second chain runs in the first one's shadow.
// The including isa_*.cpp has brought Reg, one register of its instruction set, with these functions:
//
//   splat_reg(a)                every lane a; Vec: splat(a)
//   load_reg(p), store(p, v)    float, Bf16 or Fp16 memory; Vec: load(p); rounding to nearest even, NaN stays NaN
//   round_as(v, T{})            what store followed by load gives
//   + - * /, fma, fnma          fma(a, b, c) = a*b + c, fnma(a, b, c) = c - a*b; one rounding where the processor can
//   min, max                    of a NaN and a number: the second argument
//   minus_abs(v)                -|v|
//   if_negative(sign, a, b)     a where the sign bit is set, b elsewhere
//   keep(v, bits)               lane i where bit i is set, +0 elsewhere
//   nearest_integer(v)          for |v| < 2^22
//   times_exp2(a, n)            a * 2^n for integers n in [-252, 254]
//   sum(v), largest(v)          over the lanes
//   transpose4(from, stride, to, to_stride)   four columns of Reg::size rows of floats (or of pairs) become four rows
//
// Vec has the same, but for the last. This header also adds the ends of rows, reductions and the exponential.
#pragma once

#include "kernels.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

struct Vec {
  static constexpr int64_t size = 2 * Reg::size;
  Reg lo, hi;
};

inline Vec splat(float a) { return {splat_reg(a), splat_reg(a)}; }

template <class T>
inline Vec load(const T* p) {
  return {load_reg(p), load_reg(p + Reg::size)};
}
template <class T>
inline void store(T* p, Vec a) {
  store(p, a.lo);
  store(p + Reg::size, a.hi);
}
template <class T>
inline Vec round_as(Vec a, T t) {
  return {round_as(a.lo, t), round_as(a.hi, t)};
}

inline Vec operator+(Vec a, Vec b) { return {a.lo + b.lo, a.hi + b.hi}; }
inline Vec operator-(Vec a, Vec b) { return {a.lo - b.lo, a.hi - b.hi}; }
inline Vec operator*(Vec a, Vec b) { return {a.lo * b.lo, a.hi * b.hi}; }
inline Vec operator/(Vec a, Vec b) { return {a.lo / b.lo, a.hi / b.hi}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {fnma(a.lo, b.lo, c.lo), fnma(a.hi, b.hi, c.hi)}; }
inline Vec min(Vec a, Vec b) { return {min(a.lo, b.lo), min(a.hi, b.hi)}; }
inline Vec max(Vec a, Vec b) { return {max(a.lo, b.lo), max(a.hi, b.hi)}; }
inline Vec minus_abs(Vec a) { return {minus_abs(a.lo), minus_abs(a.hi)}; }
inline Vec if_negative(Vec sign, Vec a, Vec b) {
  return {if_negative(sign.lo, a.lo, b.lo), if_negative(sign.hi, a.hi, b.hi)};
}
inline Vec keep(Vec a, uint32_t bits) { return {keep(a.lo, bits), keep(a.hi, bits >> Reg::size)}; }
inline Vec nearest_integer(Vec a) { return {nearest_integer(a.lo), nearest_integer(a.hi)}; }
inline Vec times_exp2(Vec a, Vec n) { return {times_exp2(a.lo, n.lo), times_exp2(a.hi, n.hi)}; }
inline float sum(Vec a) { return sum(a.lo + a.hi); }
inline float largest(Vec a) { return largest(max(a.lo, a.hi)); }

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

// Rows are reduced through 64 partial results on every instruction set: independent chains hide the latency of an
// addition, and short chains keep the rounding error low. Element i of a row belongs to chain i % 64.
struct Chains {
  static constexpr int count = 64 / Vec::size;
  static constexpr int64_t step = 64;
  Vec v[count];

  explicit Chains(float start) {
    for (Vec& chain : v) chain = splat(start);
  }
};

inline float sum(Chains c) {
  for (int n = Chains::count / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) c.v[i] = c.v[i] + c.v[i + n];
  }
  return sum(c.v[0]);
}
inline float largest(Chains c) {
  for (int i = 1; i < Chains::count; ++i) c.v[0] = max(c.v[0], c.v[i]);
  return largest(c.v[0]);
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
