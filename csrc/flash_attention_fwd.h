// out = softmax(scale * q kᵀ + mask) v, block after block of keys: rows of sums are rescaled where a larger score turns up.
#pragma once

#include "flash_attention.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

// Probabilities may grow to e (or 2) to this before a row is rescaled.
constexpr float kSlack = 8.0f;

template <class T>
struct Forward {
  const FlashAttention& a;
  Scratch scratch;
  Sizes<T> sizes;
  Sight sight;
  Unit *keys, *values, *buffer, *query, *p;
  float *scores, *sums;
  Edge edge;

  Forward(const FlashAttention& args, char* memory)
      : a(args),
        scratch(memory),
        sizes(args),
        sight(scratch, sizes.queries, sizes.keys),
        keys(scratch.take<Unit>(sizes.keys * sizes.steps)),
        values(scratch.take<Unit>(sizes.panels * sizes.keys / sizes.pair * kPanel)),
        buffer(scratch.take<Unit>(kPanel * sizes.row)),
        query(scratch.take<Unit>(kQueries * sizes.row)),
        p(scratch.take<Unit>(kQueries * kUnitsRow<T>)),
        scores(scratch.take<float>(kQueries * kScoresRow)),
        sums(scratch.take<float>(kQueries * sizes.dim)) {}

  void pack(int64_t batch, int64_t head) {
    pack_transposed(keys, sizes.steps, buffer, sizes.row, head_of<T>(a.k, batch, head), a.k.token, a.keys, a.dim, sizes.keys);
    pack_columns(values, head_of<T>(a.v, batch, head), a.v.token, a.keys, a.dim, sizes.keys);
  }

  // One query's probabilities, unnormalised, in the columns of its tile's span.
  template <bool masked>
  void softmax(int64_t row, const Span& span, int64_t begin, int64_t end, const float* limits, float& top, float& total) {
    const float* s = scores + row * kScoresRow;
    Unit* to = p + row * kUnitsRow<T>;
    const int64_t last = span.vectors_end();
    const float scale = a.scale / log_of_unit(T{});
    const auto hidden = [&](Vec x, int64_t j) {
      if (!masked) return x;
      if (limits) x = min(x, load(limits + j));
      return hide(x, j, begin, end, edge);
    };
    Vec most = splat(-kInfinity);
    for (int64_t j = span.begin; j < last; j += Vec::size) most = max(most, hidden(load(s + j), j));
    const float block_top = largest(most) * scale;
    if (block_top == -kInfinity) {
      for (int64_t j = span.begin; j < last; j += Vec::size) Operand<T>::store_row(to + j / sizes.pair, splat(0.0f));
      return;
    }
    if (block_top > top + kSlack) {
      const Vec shrink = exponential(splat(top - block_top), T{});
      float* sum_row = sums + row * sizes.dim;
      for (int64_t j = 0; j < sizes.dim; j += Vec::size) store(sum_row + j, load(sum_row + j) * shrink);
      total *= largest(shrink);
      top = block_top;
    }
    Vec sum_of = splat(0.0f);
    const Vec scales = splat(scale), tops = splat(top);
    for (int64_t j = span.begin; j < last; j += Vec::size) {
      const Vec e = exponential(hidden(below_top(load(s + j), scales, tops, T{}), j), T{});
      sum_of = sum_of + e;
      Operand<T>::store_row(to + j / sizes.pair, e);
    }
    total += sum(sum_of);
  }

  void block(int64_t batch, int64_t head, int64_t first_query) {
    const int64_t left = a.queries - first_query, rows = left < kQueries ? left : kQueries;
    pack_rows(query, sizes.row, head_of<T>(a.q, batch, head) + first_query * a.q.token, a.q.token, rows, a.dim, rows);
    float top[kQueries], total[kQueries];
    int64_t keys_begin = a.keys, keys_end = 0;
    for (int64_t i = 0; i < rows; ++i) {
      top[i] = -kInfinity, total[i] = 0.0f;
      const int64_t begin = sight.begin[first_query + i], end = sight.end[first_query + i];
      if (begin < end && begin < keys_begin) keys_begin = begin;
      if (end > keys_end) keys_end = end;
    }
    for (int64_t i = 0; i < rows * sizes.dim; i += Vec::size) store(sums + i, splat(0.0f));

    for (int64_t key = keys_begin / kKeys * kKeys; key < keys_end; key += kKeys) {
      Span spans[kBlockTiles];
      for (int64_t i = 0; i < rows; i += kTileRows) {
        spans[i / kTileRows] = Span(sight, first_query + i, rows - i < kTileRows ? rows - i : kTileRows, key);
      }
      block_product(scores, query, keys + key * sizes.steps, sizes, spans, rows, Reg::size);
      const float* limits = sight.limits ? sight.limits + key : nullptr;
      for (int64_t i = 0; i < rows; ++i) {
        const Span& span = spans[i / kTileRows];
        if (span.empty()) continue;
        const int64_t begin = sight.begin[first_query + i] - key, end = sight.end[first_query + i] - key;
        if (limits || begin > span.begin || end < span.vectors_end()) {
          softmax<true>(i, span, begin, end, limits, top[i], total[i]);
        } else {
          softmax<false>(i, span, begin, end, limits, top[i], total[i]);
        }
      }
      for (int64_t panel = 0; panel < sizes.panels; ++panel) {
        const Unit* b = values + (panel * sizes.keys + key) / sizes.pair * kPanel;
        for (int64_t i = 0; i < rows; i += kTileRows) {
          const Span& span = spans[i / kTileRows];
          if (span.empty()) continue;
          const int64_t begin = span.begin / sizes.pair, end = (span.end + sizes.pair - 1) / sizes.pair;
          const Product product{end - begin, p + i * kUnitsRow<T> + begin, kUnitsRow<T>, 1, b + begin * kPanel,
                                sums + i * sizes.dim + panel * kPanel, sizes.dim};
          multiply<T, true>(product, rows - i < kTileRows ? rows - i : kTileRows, sizes.panel_regs(panel));
        }
      }
    }

    float* lse = a.lse + (batch * a.heads + head) * a.queries + first_query;
    T* out = const_cast<T*>(head_of<T>(a.out, batch, head)) + first_query * a.out.token;
    for (int64_t i = 0; i < rows; ++i, out += a.out.token) {
      const bool none = total[i] == 0.0f;
      lse[i] = none ? kInfinity : top[i] * log_of_unit(T{}) + __builtin_logf(total[i]);
      const Vec inverse = splat(none ? 0.0f : 1.0f / total[i]);
      for (int64_t j = 0; j < a.dim; j += Vec::size) store(out + j, load(sums + i * sizes.dim + j) * inverse, a.dim - j);
    }
  }
};

template <class T>
int64_t flash_attention_fwd_scratch(const FlashAttention& a) {
  return Forward<T>(a, nullptr).scratch.bytes();
}

// Blocks of queries, of every head of every batch row in turn.
template <class T>
void flash_attention_fwd(const FlashAttention& a, char* memory, int64_t begin, int64_t end) {
  Forward<T> forward(a, memory);
  const int64_t blocks = forward.sizes.queries / kQueries, group = a.heads / a.key_heads;
  int64_t batch = -1, key_head = -1;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i / blocks % a.heads, row = i / blocks / a.heads;
    if (row != batch) forward.sight.look(a, row, forward.sizes.queries, forward.sizes.keys);
    if (row != batch || head / group != key_head) forward.pack(row, head / group);
    batch = row, key_head = head / group;
    forward.block(row, head, i % blocks * kQueries);
  }
}

}  // namespace
}  // namespace FASTLORA_ISA
}  // namespace fastlora
