// Reg in plain code, on the vector extension of GCC and clang: four float lanes on any processor. The same names as
// vec_avx2.h and vec_avx512.h; vec.h says what they mean.
#pragma once

#include "kernels.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

typedef float F32x4 __attribute__((vector_size(16)));
typedef int32_t I32x4 __attribute__((vector_size(16)));
typedef uint32_t U32x4 __attribute__((vector_size(16)));
typedef uint16_t U16x4 __attribute__((vector_size(8)));

struct Reg {
  static constexpr int64_t size = 4;
  F32x4 v;
};

// Between vectors of one size these casts reinterpret the bits.
inline U32x4 as_bits(F32x4 a) { return (U32x4)a; }
inline F32x4 as_floats(U32x4 a) { return (F32x4)a; }
inline U32x4 select(U32x4 mask, U32x4 a, U32x4 b) { return (mask & a) | (~mask & b); }

inline Reg splat_reg(float a) { return {F32x4{a, a, a, a}}; }
inline U32x4 splat_bits(uint32_t a) { return U32x4{a, a, a, a}; }

inline U32x4 load_halves(const void* p) {
  U16x4 halves;
  __builtin_memcpy(&halves, p, sizeof halves);
  return __builtin_convertvector(halves, U32x4);
}
inline void store_halves(void* p, U32x4 a) {
  const U16x4 halves = __builtin_convertvector(a, U16x4);
  __builtin_memcpy(p, &halves, sizeof halves);
}

// A NaN keeps its bits; arithmetic has made it a quiet one, whose mark lies in the high half.
inline U32x4 bf16_from_float(F32x4 a) {
  const U32x4 bits = as_bits(a);
  const U32x4 bias = splat_bits(0x7fff) + ((bits >> 16) & splat_bits(1));
  return (bits + (bias & (U32x4)(a == a))) >> 16;
}

// Shift exponent and mantissa into place, then let one exact multiplication repair the exponent's bias; it also makes
// normal floats of subnormal halves.
inline F32x4 float_from_fp16(U32x4 half) {
  const U32x4 magnitude = (half & splat_bits(0x7fff)) << 13;
  const F32x4 scaled = as_floats(magnitude) * as_floats(splat_bits(0x77800000));  // 2^112
  const U32x4 special = (U32x4)(magnitude >= splat_bits(0x0f800000));             // infinity or NaN
  const U32x4 bits = select(special, magnitude | splat_bits(0x7f800000), as_bits(scaled));
  return as_floats(bits | ((half & splat_bits(0x8000)) << 16));
}
inline U32x4 fp16_from_float(F32x4 a) {
  const U32x4 bits = as_bits(a);
  const U32x4 magnitude = bits & splat_bits(0x7fffffff);
  const U32x4 normal = (magnitude - splat_bits(112u << 23) + splat_bits(0xfff) + ((magnitude >> 13) & splat_bits(1))) >> 13;
  // Adding 0.5 leaves a subnormal half's bits, correctly rounded, at the bottom of the mantissa.
  const U32x4 subnormal = as_bits(as_floats(magnitude) + splat_reg(0.5f).v) - splat_bits(0x3f000000);
  const U32x4 infinity = splat_bits(0x7c00), nan = splat_bits(0x7e00);
  U32x4 half = select((U32x4)(magnitude < splat_bits(113u << 23)), subnormal, normal);
  half = select((U32x4)(magnitude >= splat_bits(0x477ff000)), infinity, half);  // 65520, where rounding overflows
  half = select((U32x4)(magnitude > splat_bits(0x7f800000)), nan, half);
  return half | ((bits >> 16) & splat_bits(0x8000));
}

inline Reg load_reg(const float* p) {
  Reg a;
  __builtin_memcpy(&a.v, p, sizeof a.v);
  return a;
}
inline Reg load_reg(const Bf16* p) { return {as_floats(load_halves(p) << 16)}; }
inline Reg load_reg(const Fp16* p) { return {float_from_fp16(load_halves(p))}; }

inline void store(float* p, Reg a) { __builtin_memcpy(p, &a.v, sizeof a.v); }
inline void store(Bf16* p, Reg a) { store_halves(p, bf16_from_float(a.v)); }
inline void store(Fp16* p, Reg a) { store_halves(p, fp16_from_float(a.v)); }

inline Reg round_as(Reg a, float) { return a; }
inline Reg round_as(Reg a, Bf16) { return {as_floats(bf16_from_float(a.v) << 16)}; }
inline Reg round_as(Reg a, Fp16) { return {float_from_fp16(fp16_from_float(a.v))}; }

inline Reg operator+(Reg a, Reg b) { return {a.v + b.v}; }
inline Reg operator-(Reg a, Reg b) { return {a.v - b.v}; }
inline Reg operator*(Reg a, Reg b) { return {a.v * b.v}; }
inline Reg operator/(Reg a, Reg b) { return {a.v / b.v}; }
#if defined(__FP_FAST_FMAF) || defined(__aarch64__)
inline Reg fma(Reg a, Reg b, Reg c) {
  for (int i = 0; i < 4; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
}
#else
inline Reg fma(Reg a, Reg b, Reg c) { return {a.v * b.v + c.v}; }
#endif
inline Reg fnma(Reg a, Reg b, Reg c) { return fma({-a.v}, b, c); }
inline Reg min(Reg a, Reg b) { return {as_floats(select((U32x4)(a.v < b.v), as_bits(a.v), as_bits(b.v)))}; }
inline Reg max(Reg a, Reg b) { return {as_floats(select((U32x4)(a.v > b.v), as_bits(a.v), as_bits(b.v)))}; }

inline Reg minus_abs(Reg a) { return {as_floats(as_bits(a.v) | splat_bits(0x80000000))}; }
inline Reg if_negative(Reg sign, Reg a, Reg b) {
  const U32x4 negative = (U32x4)((I32x4)sign.v >> 31);
  return {as_floats(select(negative, as_bits(a.v), as_bits(b.v)))};
}

inline Reg keep(Reg a, uint32_t bits) {
  const U32x4 each = {1, 2, 4, 8};
  return {as_floats(as_bits(a.v) & (U32x4)((splat_bits(bits) & each) == each))};
}

// Adding 1.5 * 2^23 pushes the fraction out of the mantissa.
inline Reg nearest_integer(Reg a) { return {(a.v + 12582912.0f) - 12582912.0f}; }

// In two steps, so that the result may be subnormal or infinite although 2^integer itself is no normal float.
inline Reg times_exp2(Reg a, Reg integer) {
  const I32x4 n = __builtin_convertvector(integer.v, I32x4);
  const I32x4 half = n >> 1;
  const F32x4 first = as_floats((U32x4)(half + 127) << 23);
  const F32x4 second = as_floats((U32x4)(n - half + 127) << 23);
  return {(a.v * first) * second};
}

inline void transpose4(const float* from, int64_t stride, float* to, int64_t to_stride) {
  Reg row[4];
  for (int i = 0; i < 4; ++i) row[i] = load_reg(from + i * stride);
  for (int64_t i = 0; i < 4; ++i) {
    store(to + i * to_stride, Reg{F32x4{row[0].v[i], row[1].v[i], row[2].v[i], row[3].v[i]}});
  }
}

inline float sum(Reg a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float largest(Reg a) {
  const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2], y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return x > y ? x : y;
}

}  // namespace
}  // namespace FASTLORA_ISA
}  // namespace fastlora
