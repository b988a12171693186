// Rotary embedding, rotate-half form. With halves 1 and 2 of a head:
//   forward            out1 = q1*cos1 - q2*sin1    out2 = q2*cos2 + q1*sin2
//   inverse, i.e. the  out1 = q1*cos1 + q2*sin2    out2 = q2*cos2 - q1*sin1
//   transpose
#pragma once

#include "vec.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

template <class T, class Table>
void rope_head(const T* in, T* out, const Table* cos, const Table* sin, int64_t half, bool inverse) {
  for (int64_t i = 0; i < half; i += Vec::size) {
    const int64_t left = half - i;
    const Vec a = load(in + i, left), b = load(in + half + i, left);
    const Vec sin1 = load(sin + i, left), sin2 = load(sin + half + i, left);
    const Vec a_cos = a * load(cos + i, left), b_cos = b * load(cos + half + i, left);
    store(out + i, inverse ? fma(b, sin2, a_cos) : fnma(b, sin1, a_cos), left);
    store(out + half + i, inverse ? fnma(a, sin1, b_cos) : fma(a, sin2, b_cos), left);
  }
}

template <class T, class Table>
void rope_tokens(const Rope& a, int64_t begin, int64_t end) {
  const RopeHeads* const both[] = {&a.q, &a.k};
  // A token's heads are neighbours in memory (a transposed view of batch, token, head): its table row stays in cache.
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / a.tokens, token = i % a.tokens;
    const int64_t table = batch * a.table_batch + token * a.dim;
    const Table* cos = static_cast<const Table*>(a.cos) + table;
    const Table* sin = static_cast<const Table*>(a.sin) + table;
    for (const RopeHeads* x : both) {
      const T* in = static_cast<const T*>(x->in) + batch * x->in_batch + token * x->in_token;
      T* out = static_cast<T*>(x->out) + batch * x->out_batch + token * x->out_token;
      for (int64_t head = 0; head < x->heads; ++head) {
        rope_head(in + head * x->in_head, out + head * x->out_head, cos, sin, a.dim / 2, a.inverse);
      }
    }
  }
}

void rope(const Rope& a, int64_t begin, int64_t end) {
  with_types(a.type, a.table_type,
             [&](auto t, auto table) { rope_tokens<decltype(t), decltype(table)>(a, begin, end); });
}

}  // namespace
}  // namespace FASTLORA_ISA
}  // namespace fastlora
