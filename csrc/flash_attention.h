// Attention without the score matrix: what its forward and its backward share. Scores are made in blocks of kQueries by
// kKeys, each block in row tiles of kTileRows queries; what no query of a tile sees is not computed.
//
// Query i sees the keys max(first[i], 0) <= j < (causal ? i + keys - queries + 1 : keys) that are real. One that sees none
// gives 0, its lse is infinity, and it takes no gradient.
#pragma once

#include "mask.h"
#include "tile_product.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

constexpr int64_t kQueries = 64, kKeys = 128;
constexpr int64_t kSteps = 64;  // of one sum over a head's dimension: a longer one would round more
constexpr int64_t kBlockTiles = (kQueries + kTileRows - 1) / kTileRows;
// Row strides of blocks: not powers of two, whose rows would share their places in the cache.
constexpr int64_t kScoresRow = kKeys + 16;
template <class T>
constexpr int64_t kUnitsRow = kKeys / Operand<T>::pair + 16;

// Memory for one thread, or without any the number of bytes that it needs.
class Scratch {
 public:
  explicit Scratch(char* memory) : memory_(memory) {}
  template <class E>
  E* take(int64_t n) {
    E* const place = memory_ ? reinterpret_cast<E*>(memory_ + bytes_) : nullptr;
    bytes_ += rounded_up(n * static_cast<int64_t>(sizeof(E)), 64);
    return place;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

// Sizes of a head's matrices: dim in units of a row, in steps of a product, in floats of a row of sums.
template <class T>
struct Sizes {
  static constexpr int64_t pair = Operand<T>::pair;
  int64_t queries, keys, dim;  // padded to whole blocks; dim to whole vectors
  int64_t row, steps, panels, regs;

  explicit Sizes(const FlashAttention& a)
      : queries(rounded_up(a.queries, kQueries)),
        keys(rounded_up(a.keys, kKeys)),
        dim(rounded_up(a.dim, Vec::size)),
        row(dim / pair),
        steps(rounded_up((a.dim + pair - 1) / pair, 4)),
        panels((a.dim + kPanel - 1) / kPanel),
        regs((a.dim + Reg::size - 1) / Reg::size) {}

  int64_t panel_regs(int64_t panel) const {
    const int64_t left = regs - panel * kTileRegs;
    return left < kTileRegs ? left : kTileRegs;
  }
};

// The keys that the queries of one batch row see.
struct Sight {
  int64_t *begin, *end;  // (queries, padded): begin == end where a query sees nothing
  float* limits;         // (keys, padded): infinity for real keys, -infinity for others; null where all between are real
  float* limits_memory;

  Sight(Scratch& scratch, int64_t queries, int64_t keys)
      : begin(scratch.take<int64_t>(queries)),
        end(scratch.take<int64_t>(queries)),
        limits(nullptr),
        limits_memory(scratch.take<float>(keys)) {}

  void look(const FlashAttention& a, int64_t batch, int64_t padded_queries, int64_t padded_keys) {
    int64_t real_begin = 0, real_end = a.keys, hidden = 0;
    limits = nullptr;
    if (a.real) {
      const uint8_t* real = a.real + batch * a.real_batch;
      while (real_begin < real_end && !real[real_begin]) ++real_begin;
      while (real_begin < real_end && !real[real_end - 1]) --real_end;
      for (int64_t j = 0; j < padded_keys; ++j) {
        const bool seen = j < a.keys && real[j];
        limits_memory[j] = seen ? kInfinity : -kInfinity;
        hidden += !seen && j >= real_begin && j < real_end;
      }
      if (hidden) limits = limits_memory;
    }
    const int64_t* first = a.first + batch * a.first_batch;
    for (int64_t i = 0; i < padded_queries; ++i) {
      begin[i] = end[i] = 0;
      if (i >= a.queries) continue;
      const int64_t last = a.causal ? i + a.keys - a.queries + 1 : a.keys;
      const int64_t from = first[i] > real_begin ? first[i] : real_begin, to = last < real_end ? last : real_end;
      if (from < to) begin[i] = from, end[i] = to;
    }
  }
};

// The keys of a block that a tile of queries sees, relative to the block: begin in whole vectors, end exactly.
struct Span {
  int64_t begin = kKeys, end = 0;
  bool whole = true;  // every query sees the whole block

  Span() = default;
  Span(const Sight& sight, int64_t query, int64_t rows, int64_t key) {
    for (int64_t i = query; i < query + rows; ++i) {
      const int64_t from = sight.begin[i] > key ? sight.begin[i] - key : 0;
      const int64_t to = sight.end[i] < key + kKeys ? sight.end[i] - key : kKeys;
      whole = whole && from == 0 && to == kKeys;
      if (from >= to) continue;
      begin = from < begin ? from : begin;
      end = to > end ? to : end;
    }
    begin = begin / Vec::size * Vec::size;
    whole = whole && !sight.limits;
  }
  bool empty() const { return end == 0; }
  int64_t vectors_end() const { return rounded_up(end, Vec::size); }
};

// The scores' unit: e to the x in fp32, 2 to the x for 16-bit types, whose probabilities are rounded far more coarsely
// than the polynomial errs: 3e-6.
inline Vec exponential(Vec x, float) { return exp(x); }
template <class T>
inline Vec exponential(Vec x, T) {
  x = max(splat(-160.0f), x);  // whose exponential is 0; the order of the arguments lets a NaN through
  const Vec n = nearest_integer(x), r = x - n;
  Vec y = fma(splat(0x1.3a02cap-7f), r, splat(0x1.c9fc46p-5f));
  y = fma(y, r, splat(0x1.ec0378p-3f));
  y = fma(y, r, splat(0x1.62e12cp-1f));
  return times_exp2(fma(y, r, splat(1.0f)), n);
}
// scale * x - top: in fp32 exactly 0 for the largest score, whose product with scale has been rounded, too.
inline Vec below_top(Vec x, Vec scale, Vec top, float) { return x * scale - top; }
template <class T>
inline Vec below_top(Vec x, Vec scale, Vec top, T) {
  return fma(x, scale, top * splat(-1.0f));
}
constexpr float log_of_unit(float) { return 1.0f; }
template <class T>
constexpr float log_of_unit(T) {
  return 0.693147181f;
}

// Scores or their gradient, unscaled: rows of a by rows of b, where the queries of a tile see a key.
template <class T>
void block_product(
    float* c, const Unit* a, const Unit* b_panels, const Sizes<T>& sizes, const Span* spans, int64_t rows,
    int64_t granularity) {
  for (int64_t panel = 0; panel < kKeys; panel += kPanel, b_panels += sizes.steps * kPanel) {
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const Span& span = spans[i / kTileRows];
      const int64_t last = rounded_up(span.end, granularity);
      const int64_t begin = span.begin > panel ? span.begin : panel;
      const int64_t end = last < panel + kPanel ? last : panel + kPanel;
      if (begin >= end) continue;
      const int64_t tile = rows - i < kTileRows ? rows - i : kTileRows, regs = (end - begin) / Reg::size;
      Product p{sizes.steps < kSteps ? sizes.steps : kSteps, a + i * sizes.row, sizes.row, 1,
                b_panels + (begin - panel), c + i * kScoresRow + begin, kScoresRow};
      multiply<T, false>(p, tile, regs);
      for (int64_t s = kSteps; s < sizes.steps; s += kSteps) {
        p.steps = sizes.steps - s < kSteps ? sizes.steps - s : kSteps;
        p.a += kSteps, p.b += kSteps * kPanel;
        multiply<T, true>(p, tile, regs);
      }
    }
  }
}

template <class T>
const T* head_of(const Heads& x, int64_t batch, int64_t head) {
  return static_cast<const T*>(x.data) + batch * x.batch + head * x.head;
}

}  // namespace
}  // namespace FASTLORA_ISA
}  // namespace fastlora
