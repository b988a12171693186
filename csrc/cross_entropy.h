// Cross-entropy of one row of logits: loss = logsumexp(row) - row[label], and in place the gradient
// (softmax - onehot) * scale. Three passes over a row that stays in cache: largest, sum of exponentials, gradient.
#pragma once

#include "vec.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

template <class T>
void cross_entropy_range(const CrossEntropyRows& a, int64_t row_begin, int64_t row_end) {
  const float minus_infinity = -__builtin_inff();
  for (int64_t row = row_begin; row < row_end; ++row) {
    T* logits = static_cast<T*>(a.logits) + row * a.vocab;
    const int64_t label = a.labels[row];
    const Vec label_logit = load(logits + label, 1, minus_infinity);

    Chains tops(minus_infinity);
    for (int64_t i = 0; i < a.vocab; i += Chains::step) {
      for (int u = 0; u < Chains::count; ++u) {
        const int64_t j = i + u * Vec::size;
        tops.v[u] = max(tops.v[u], load(logits + j, a.vocab - j, minus_infinity));
      }
    }
    const float top = largest(tops);

    Chains sums(0.0f);
    for (int64_t i = 0; i < a.vocab; i += Chains::step) {
      for (int u = 0; u < Chains::count; ++u) {
        const int64_t j = i + u * Vec::size;
        sums.v[u] = sums.v[u] + exp(load(logits + j, a.vocab - j, minus_infinity) - splat(top));
      }
    }
    const float total = sum(sums);
    a.loss[row] = __builtin_logf(total) + (top - largest(label_logit));
    if (!a.need_grad) continue;

    const Vec inverse = splat(1.0f / total), scale = splat(a.scale);
    for (int64_t i = 0; i < a.vocab; i += Vec::size) {
      const int64_t left = a.vocab - i;
      store(logits + i, exp(load(logits + i, left) - splat(top)) * inverse * scale, left);
    }
    store(logits + label, (exp(label_logit - splat(top)) * inverse - splat(1.0f)) * scale, 1);
  }
}

void cross_entropy_rows(const CrossEntropyRows& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto t) { cross_entropy_range<decltype(t)>(a, begin, end); });
}

}  // namespace
}  // namespace FASTLORA_ISA
}  // namespace fastlora
