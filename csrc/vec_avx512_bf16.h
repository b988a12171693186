// Pairs of bf16 in the lanes of Reg: the first in the low half of a lane, the second in the high half. Rounding is to
// nearest even; subnormal numbers are flushed to zero, as the product would.
#pragma once

#include "vec_avx512.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

// sum + a's first * b's first + a's second * b's second, lane by lane.
inline Reg multiply_pairs(Reg a, Reg b, Reg sum) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_castps_si512(a.v), (__m512bh)_mm512_castps_si512(b.v))};
}

// The 32 numbers of two registers in a row, as 16 pairs.
inline Reg pairs(Reg lo, Reg hi) { return {_mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(hi.v, lo.v))}; }

// Pairs of the lanes of two registers.
inline Reg interleaved_pairs(Reg first, Reg second) {
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, _mm512_castps_si512(pairs(first, second).v)))};
}

}  // namespace
}  // namespace FASTLORA_ISA
}  // namespace fastlora
