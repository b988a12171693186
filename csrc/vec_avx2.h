// Reg for AVX2, FMA and F16C: eight float lanes. The same names as vec_avx512.h and vec_plain.h; vec.h says what they
// mean.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

struct Reg {
  static constexpr int64_t size = 8;
  __m256 v;
};

inline Reg splat_reg(float a) { return {_mm256_set1_ps(a)}; }

inline Reg load_reg(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Reg load_reg(const Bf16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline Reg load_reg(const Fp16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }

// A NaN keeps its bits; arithmetic has made it a quiet one, whose mark lies in the high half.
inline __m256i bf16_high_half(Reg a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_ORD_Q));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  return _mm256_add_epi32(bits, _mm256_and_si256(bias, number));
}

inline void store(float* p, Reg a) { _mm256_storeu_ps(p, a.v); }
inline void store(Bf16* p, Reg a) {
  const __m256i high = _mm256_srli_epi32(bf16_high_half(a), 16);
  const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
}
inline void store(Fp16* p, Reg a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

inline Reg round_as(Reg a, float) { return a; }
inline Reg round_as(Reg a, Bf16) {
  return {_mm256_castsi256_ps(_mm256_and_si256(bf16_high_half(a), _mm256_set1_epi32(-0x10000)))};
}
inline Reg round_as(Reg a, Fp16) { return {_mm256_cvtph_ps(_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT))}; }

inline Reg operator+(Reg a, Reg b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Reg operator-(Reg a, Reg b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Reg operator*(Reg a, Reg b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Reg operator/(Reg a, Reg b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Reg fma(Reg a, Reg b, Reg c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Reg fnma(Reg a, Reg b, Reg c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline Reg min(Reg a, Reg b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Reg max(Reg a, Reg b) { return {_mm256_max_ps(a.v, b.v)}; }

inline Reg minus_abs(Reg a) { return {_mm256_or_ps(a.v, _mm256_set1_ps(-0.0f))}; }
inline Reg if_negative(Reg sign, Reg a, Reg b) { return {_mm256_blendv_ps(b.v, a.v, sign.v)}; }

inline Reg keep(Reg a, uint32_t bits) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), each);
  return {_mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, each)))};
}

inline Reg nearest_integer(Reg a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// In two steps, so that the result may be subnormal or infinite although 2^integer itself is no normal float.
inline Reg times_exp2(Reg a, Reg integer) {
  const __m256i n = _mm256_cvtps_epi32(integer.v);
  const __m256i half = _mm256_srai_epi32(n, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias), 23);
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second))};
}

// Rows of four in the same place of every 128 bits, transposed there.
inline void transpose4(const float* from, int64_t stride, float* to, int64_t to_stride) {
  __m256 row[4];
  for (int i = 0; i < 4; ++i) {
    const float* p = from + i * stride;
    row[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * stride), 1);
  }
  const __m256d lo01 = _mm256_castps_pd(_mm256_unpacklo_ps(row[0], row[1]));
  const __m256d hi01 = _mm256_castps_pd(_mm256_unpackhi_ps(row[0], row[1]));
  const __m256d lo23 = _mm256_castps_pd(_mm256_unpacklo_ps(row[2], row[3]));
  const __m256d hi23 = _mm256_castps_pd(_mm256_unpackhi_ps(row[2], row[3]));
  _mm256_storeu_ps(to, _mm256_castpd_ps(_mm256_unpacklo_pd(lo01, lo23)));
  _mm256_storeu_ps(to + to_stride, _mm256_castpd_ps(_mm256_unpackhi_pd(lo01, lo23)));
  _mm256_storeu_ps(to + 2 * to_stride, _mm256_castpd_ps(_mm256_unpacklo_pd(hi01, hi23)));
  _mm256_storeu_ps(to + 3 * to_stride, _mm256_castpd_ps(_mm256_unpackhi_pd(hi01, hi23)));
}

inline float sum(Reg a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float largest(Reg a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

}  // namespace
}  // namespace FASTLORA_ISA
}  // namespace fastlora
