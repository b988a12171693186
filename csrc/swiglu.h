// SwiGLU: h = round(silu(gate)) * up, silu(g) = g * sigmoid(g).
#pragma once

#include "vec.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

// sigmoid(g) and 1 - sigmoid(g), both to full relative accuracy, from e^-|g|, which cannot overflow.
struct Sigmoid {
  Vec value, complement;
};

inline Sigmoid sigmoid(Vec g) {
  const Vec e = exp(minus_abs(g));
  const Vec large = splat(1.0f) / (splat(1.0f) + e), small = e * large;
  return {if_negative(g, small, large), if_negative(g, large, small)};
}

template <class T>
void swiglu_fwd_range(const SwigluFwd& a, int64_t begin, int64_t end) {
  const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
  T* h = static_cast<T*>(a.h);
  for (int64_t i = begin; i < end; i += Vec::size) {
    const int64_t left = end - i;
    const Vec g = load(gate + i, left);
    store(h + i, round_as(g * sigmoid(g).value, T{}) * load(up + i, left), left);
  }
}

template <class T>
void swiglu_bwd_range(const SwigluBwd& a, int64_t begin, int64_t end) {
  const T *dh = static_cast<const T*>(a.dh), *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
  T *dgate = static_cast<T*>(a.dgate), *dup = static_cast<T*>(a.dup);
  for (int64_t i = begin; i < end; i += Vec::size) {
    const int64_t left = end - i;
    const Vec g = load(gate + i, left), d = load(dh + i, left), u = load(up + i, left);
    const Sigmoid s = sigmoid(g);
    store(dup + i, d * (g * s.value), left);
    store(dgate + i, d * u * (s.value * fma(g, s.complement, splat(1.0f))), left);
  }
}

void swiglu_fwd(const SwigluFwd& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto t) { swiglu_fwd_range<decltype(t)>(a, begin, end); });
}

void swiglu_bwd(const SwigluBwd& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto t) { swiglu_bwd_range<decltype(t)>(a, begin, end); });
}

}  // namespace
}  // namespace FASTLORA_ISA
}  // namespace fastlora
