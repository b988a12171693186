// The softmax of attention and its gradient, in place, on rows of scores (heads, queries, keys) that hold every key a
// query sees. Query i sees the keys first[i] <= j < last[i] whose bias, where there is one, is 0 and not -infinity:
//   p = softmax(scale * scores) over the keys seen, 0 elsewhere
//   ds = scale * p * (dp - sum(p * dp))
// Exponentials are computed again rather than kept: a row stays in cache, and fp32 values of it would need scratch.
#pragma once

#include "mask.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

// What one query sees of its row.
struct Seen {
  int64_t first, last, begin, keys;  // begin: first, rounded down to whole vectors
  const float* bias;
  const Edge& edge;

  // scale * scores at j to j + Vec::size, -infinity where hidden.
  template <class T>
  Vec scores(const T* row, int64_t j, Vec scale) const {
    Vec x = load(row + j, keys - j) * scale;
    if (bias) x = x + load(bias + j, keys - j);
    return hide(x, j, first, last, edge);
  }
};

template <class T>
float largest_score(const T* row, const Seen& seen, Vec scale) {
  Chains tops(-kInfinity);
  for (int64_t i = seen.begin; i < seen.last; i += Chains::step) {
    for (int u = 0; u < Chains::count; ++u) {
      const int64_t j = i + u * Vec::size;
      if (j < seen.last) tops.v[u] = max(tops.v[u], seen.scores(row, j, scale));
    }
  }
  return largest(tops);
}

template <class T>
void zero(T* scores, T* dp, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) scores[j] = T{};
  for (int64_t j = begin; dp && j < end; ++j) dp[j] = T{};
}

template <class T, bool backward>
void attention_rows(const AttentionRows& a, int64_t row_begin, int64_t row_end) {
  const Edge edge;
  const Vec scale = splat(a.scale);
  for (int64_t row = row_begin; row < row_end; ++row) {
    T* scores = static_cast<T*>(a.scores) + row * a.keys;
    T* dp = backward ? static_cast<T*>(a.dp) + row * a.keys : nullptr;
    const int64_t query = row % a.queries;
    const int64_t first = a.first[query] > 0 ? a.first[query] : 0;
    const int64_t last = a.last[query] < a.keys ? a.last[query] : a.keys;
    const Seen seen{first, last, first / Vec::size * Vec::size, a.keys, a.bias, edge};
    const float top = first < last ? largest_score(scores, seen, scale) : -kInfinity;
    if (top == -kInfinity) {
      zero(scores, dp, 0, a.keys);
      if (!backward) a.lse[row] = kInfinity;
      continue;
    }

    Chains sums(0.0f), dots(0.0f);
    for (int64_t i = seen.begin; i < last; i += Chains::step) {
      for (int u = 0; u < Chains::count; ++u) {
        const int64_t j = i + u * Vec::size;
        if (j >= last) break;
        const Vec e = exp(seen.scores(scores, j, scale) - splat(top));
        sums.v[u] = sums.v[u] + e;
        if (backward) dots.v[u] = fma(e, load(dp + j, a.keys - j), dots.v[u]);
      }
    }
    const float total = sum(sums);
    const Vec inverse = splat(1.0f / total), delta = splat(backward ? sum(dots) / total : 0.0f);
    if (!backward) a.lse[row] = top + __builtin_logf(total);

    int64_t j = seen.begin;
    zero(scores, dp, 0, j);
    for (; j < last; j += Vec::size) {
      const int64_t left = a.keys - j;
      const Vec p = exp(seen.scores(scores, j, scale) - splat(top)) * inverse;
      if (backward) store(dp + j, p * (load(dp + j, left) - delta) * scale, left);
      store(scores + j, p, left);
    }
    zero(scores, dp, j, a.keys);
  }
}

// total += the sum of parts over the members of a group, in fp32.
template <class T>
void accumulate_rows(const Accumulate& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t group = i / a.rows, row = i % a.rows;
    float* total = a.total + group * a.total_group + row * a.cols;
    const T* part = static_cast<const T*>(a.parts) + (group * a.members * a.rows + row) * a.cols;
    for (int64_t j = 0; j < a.cols; j += Vec::size) {
      const int64_t left = a.cols - j;
      Vec sum = load(total + j, left);
      for (int64_t m = 0; m < a.members; ++m) sum = sum + load(part + m * a.rows * a.cols + j, left);
      store(total + j, sum, left);
    }
  }
}

void accumulate(const Accumulate& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto t) { accumulate_rows<decltype(t)>(a, begin, end); });
}

void attention_softmax(const AttentionRows& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto t) { attention_rows<decltype(t), false>(a, begin, end); });
}

void attention_softmax_bwd(const AttentionRows& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto t) { attention_rows<decltype(t), true>(a, begin, end); });
}

}  // namespace
}  // namespace FASTLORA_ISA
}  // namespace fastlora
