// Reg for AVX-512: sixteen float lanes. The same names as vec_avx2.h and vec_plain.h; vec.h says what they mean.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

struct Reg {
  static constexpr int64_t size = 16;
  __m512 v;
};

inline Reg splat_reg(float a) { return {_mm512_set1_ps(a)}; }

inline Reg load_reg(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Reg load_reg(const Bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Reg load_reg(const Fp16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

// Integer rounding: the bf16 instruction would flush subnormal numbers to zero. A NaN keeps its bits; arithmetic has made
// it a quiet one, whose mark lies in the high half.
inline __m512i bf16_high_half(Reg a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __mmask16 number = _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q);
  return _mm512_mask_add_epi32(bits, number, bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}

inline void store(float* p, Reg a) { _mm512_storeu_ps(p, a.v); }
inline void store(Bf16* p, Reg a) {
  const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_high_half(a), 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
}
inline void store(Fp16* p, Reg a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

inline Reg round_as(Reg a, float) { return a; }
inline Reg round_as(Reg a, Bf16) {
  return {_mm512_castsi512_ps(_mm512_and_si512(bf16_high_half(a), _mm512_set1_epi32(-0x10000)))};
}
inline Reg round_as(Reg a, Fp16) { return {_mm512_cvtph_ps(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT))}; }

inline Reg operator+(Reg a, Reg b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Reg operator-(Reg a, Reg b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Reg operator*(Reg a, Reg b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Reg operator/(Reg a, Reg b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Reg fma(Reg a, Reg b, Reg c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Reg fnma(Reg a, Reg b, Reg c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline Reg min(Reg a, Reg b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Reg max(Reg a, Reg b) { return {_mm512_max_ps(a.v, b.v)}; }

inline Reg minus_abs(Reg a) { return {_mm512_or_ps(a.v, _mm512_set1_ps(-0.0f))}; }
inline Reg if_negative(Reg sign, Reg a, Reg b) {
  return {_mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(sign.v)), b.v, a.v)};
}

inline Reg keep(Reg a, uint32_t bits) { return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), a.v)}; }

inline Reg nearest_integer(Reg a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Reg times_exp2(Reg a, Reg integer) { return {_mm512_scalef_ps(a.v, integer.v)}; }

// Rows of four in the same place of every 128 bits, transposed there.
inline void transpose4(const float* from, int64_t stride, float* to, int64_t to_stride) {
  __m512 row[4];
  for (int i = 0; i < 4; ++i) {
    const float* p = from + i * stride;
    row[i] = _mm512_castps128_ps512(_mm_loadu_ps(p));
    row[i] = _mm512_insertf32x4(row[i], _mm_loadu_ps(p + 4 * stride), 1);
    row[i] = _mm512_insertf32x4(row[i], _mm_loadu_ps(p + 8 * stride), 2);
    row[i] = _mm512_insertf32x4(row[i], _mm_loadu_ps(p + 12 * stride), 3);
  }
  const __m512d lo01 = _mm512_castps_pd(_mm512_unpacklo_ps(row[0], row[1]));
  const __m512d hi01 = _mm512_castps_pd(_mm512_unpackhi_ps(row[0], row[1]));
  const __m512d lo23 = _mm512_castps_pd(_mm512_unpacklo_ps(row[2], row[3]));
  const __m512d hi23 = _mm512_castps_pd(_mm512_unpackhi_ps(row[2], row[3]));
  _mm512_storeu_ps(to, _mm512_castpd_ps(_mm512_unpacklo_pd(lo01, lo23)));
  _mm512_storeu_ps(to + to_stride, _mm512_castpd_ps(_mm512_unpackhi_pd(lo01, lo23)));
  _mm512_storeu_ps(to + 2 * to_stride, _mm512_castpd_ps(_mm512_unpacklo_pd(hi01, hi23)));
  _mm512_storeu_ps(to + 3 * to_stride, _mm512_castpd_ps(_mm512_unpackhi_pd(hi01, hi23)));
}

inline float sum(Reg a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Reg a) { return _mm512_reduce_max_ps(a.v); }

}  // namespace
}  // namespace FASTLORA_ISA
}  // namespace fastlora
