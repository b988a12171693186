// Hiding the lanes of vectors of scores: a hidden score is -infinity, even where it is a NaN.
#pragma once

#include "vec.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// Minima with a run of 2 * Vec::size of these hide the lanes before an edge, or those from it on.
struct Edge {
  float before[2 * Vec::size], after[2 * Vec::size];
  Edge() {
    for (int64_t i = 0; i < 2 * Vec::size; ++i) {
      before[i] = i < Vec::size ? -kInfinity : kInfinity;
      after[i] = -before[i];
    }
  }
};

inline int64_t lanes(int64_t n) { return n < 0 ? 0 : n > Vec::size ? Vec::size : n; }

// x, the scores at j to j + Vec::size, where begin <= j < end is seen.
inline Vec hide(Vec x, int64_t j, int64_t begin, int64_t end, const Edge& edge) {
  if (j < begin) x = min(x, load(edge.before + Vec::size - lanes(begin - j)));
  if (j + Vec::size > end) x = min(x, load(edge.after + Vec::size - lanes(end - j)));
  return x;
}

}  // namespace
}  // namespace FASTLORA_ISA
}  // namespace fastlora
