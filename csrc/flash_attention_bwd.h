// The gradient of attention, from probabilities made again:
//   p = exp(scale * q kᵀ - lse), dp = dout vᵀ, delta = sum(dout * out)
//   ds = scale * p * (dp - delta), dv = pᵀ dout, dk = dsᵀ q, dq = ds k
// A head's dq, and dk and dv of all query heads that share them, are summed in fp32, block after block: all queries for a
// block of keys. In fp32 all keys for a block of queries: the roundings of lse and of out would be seen, so the whole
// rows of scores and of dp are made first, and p and delta = sum(p * dp) of them.
#pragma once

#include "flash_attention.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

template <class T>
struct Backward {
  static constexpr int64_t pair = Operand<T>::pair;
  static constexpr bool whole_rows = log_of_unit(T{}) == 1.0f;
  static constexpr int64_t block_size = kQueries * kScoresRow;

  const FlashAttention& a;
  Scratch scratch;
  Sizes<T> sizes;
  Sight sight;
  Unit *keys, *values, *key_columns, *buffer;                   // of a head of the keys
  Unit *queries, *douts, *query_columns, *dout_columns;         // of a head of the queries
  float *top, *inverse, *delta;                                 // (queries)
  Unit *p, *ds, *ds_rows;                                       // of a block; p and ds by queries, in pairs of them
  float *scores, *dp;
  float *dq, *dk, *dv;
  Edge edge;

  Backward(const FlashAttention& args, char* memory)
      : a(args),
        scratch(memory),
        sizes(args),
        sight(scratch, sizes.queries, sizes.keys),
        keys(scratch.take<Unit>(sizes.keys * sizes.steps)),
        values(scratch.take<Unit>(sizes.keys * sizes.steps)),
        key_columns(scratch.take<Unit>(sizes.panels * sizes.keys / sizes.pair * kPanel)),
        buffer(scratch.take<Unit>(kPanel * sizes.row)),
        queries(scratch.take<Unit>(sizes.queries * sizes.row)),
        douts(scratch.take<Unit>(sizes.queries * sizes.row)),
        query_columns(scratch.take<Unit>(sizes.panels * sizes.queries / sizes.pair * kPanel)),
        dout_columns(scratch.take<Unit>(sizes.panels * sizes.queries / sizes.pair * kPanel)),
        top(scratch.take<float>(sizes.queries)),
        inverse(scratch.take<float>(sizes.queries)),
        delta(scratch.take<float>(sizes.queries)),
        p(scratch.take<Unit>(kQueries / sizes.pair * kScoresRow)),
        ds(scratch.take<Unit>(kQueries / sizes.pair * kScoresRow)),
        ds_rows(sizes.pair == 1 ? ds : scratch.take<Unit>(kQueries * kUnitsRow<T>)),
        scores(scratch.take<float>(block_size * (whole_rows ? sizes.keys / kKeys : 1))),
        dp(scratch.take<float>(block_size * (whole_rows ? sizes.keys / kKeys : 1))),
        dq(scratch.take<float>(sizes.queries * sizes.dim)),
        dk(scratch.take<float>(sizes.keys * sizes.dim)),
        dv(scratch.take<float>(sizes.keys * sizes.dim)) {}

  static void zero(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += Vec::size) store(x + i, splat(0.0f));
  }

  void begin_keys(int64_t batch, int64_t head) {
    const T *k = head_of<T>(a.k, batch, head), *v = head_of<T>(a.v, batch, head);
    pack_transposed(keys, sizes.steps, buffer, sizes.row, k, a.k.token, a.keys, a.dim, sizes.keys);
    pack_transposed(values, sizes.steps, buffer, sizes.row, v, a.v.token, a.keys, a.dim, sizes.keys);
    pack_columns(key_columns, k, a.k.token, a.keys, a.dim, sizes.keys);
    zero(dk, sizes.keys * sizes.dim);
    zero(dv, sizes.keys * sizes.dim);
  }

  void begin_queries(int64_t batch, int64_t head) {
    const T *q = head_of<T>(a.q, batch, head), *dout = head_of<T>(a.dout, batch, head);
    const T* out = head_of<T>(a.out, batch, head);
    pack_rows(queries, sizes.row, q, a.q.token, a.queries, a.dim, sizes.queries);
    pack_rows(douts, sizes.row, dout, a.dout.token, a.queries, a.dim, sizes.queries);
    pack_columns(query_columns, q, a.q.token, a.queries, a.dim, sizes.queries);
    pack_columns(dout_columns, dout, a.dout.token, a.queries, a.dim, sizes.queries);
    zero(dq, sizes.queries * sizes.dim);
    const float* lse = a.lse + (batch * a.heads + head) * a.queries;
    for (int64_t i = 0; i < sizes.queries; ++i) {
      top[i] = kInfinity, inverse[i] = delta[i] = 0.0f;
      if (whole_rows || i >= a.queries || sight.begin[i] == sight.end[i]) continue;
      top[i] = lse[i] / log_of_unit(T{});
      Vec dots = splat(0.0f);
      for (int64_t j = 0; j < a.dim; j += Vec::size) {
        dots = fma(load(dout + i * a.dout.token + j, a.dim - j), load(out + i * a.out.token + j, a.dim - j), dots);
      }
      delta[i] = sum(dots);
    }
  }

  int64_t block_at(int64_t key) const { return whole_rows ? key / kKeys * block_size : 0; }

  // f of every vector of scores and of dp that the query in this row of the block sees.
  template <class F>
  void each_seen(int64_t first_query, int64_t row, F f) const {
    const int64_t begin = sight.begin[first_query + row], end = sight.end[first_query + row];
    for (int64_t j = begin / Vec::size * Vec::size; j < end; j += Vec::size) {
      const int64_t at = block_at(j) + row * kScoresRow + j % kKeys;
      Vec x = load(scores + at);
      if (sight.limits) x = min(x, load(sight.limits + j));
      f(hide(x, j, begin, end, edge), load(dp + at));
    }
  }

  void normalise(int64_t first_query) {
    for (int64_t row = 0; row < kQueries; ++row) {
      const int64_t i = first_query + row;
      if (sight.begin[i] == sight.end[i]) continue;
      Vec most = splat(-kInfinity), total = splat(0.0f), dots = splat(0.0f);
      each_seen(first_query, row, [&](Vec x, Vec) { most = max(most, x); });
      if (largest(most) == -kInfinity) continue;
      top[i] = largest(most) * a.scale;
      const Vec scale = splat(a.scale), tops = splat(top[i]);
      each_seen(first_query, row, [&](Vec x, Vec dp_seen) {
        const Vec e = exp(below_top(x, scale, tops, T{}));
        total = total + e;
        dots = fma(e, dp_seen, dots);
      });
      inverse[i] = 1.0f / sum(total);
      delta[i] = sum(dots) / sum(total);
    }
  }

  // p and ds of the `pair` queries from `row` of the block on, in the columns from `begin` to `end`.
  template <bool masked>
  void softmax(int64_t first_query, int64_t row, int64_t key, int64_t begin, int64_t end) {
    const Vec scale = splat(a.scale), scales = splat(a.scale / log_of_unit(T{}));
    Unit *p_to = p + row / pair * kScoresRow, *ds_to = ds + row / pair * kScoresRow;
    for (int64_t j = begin; j < end; j += Vec::size) {
      Vec ps[pair], dss[pair];
      for (int64_t u = 0; u < pair; ++u) {
        const int64_t i = first_query + row + u, at = block_at(key) + (row + u) * kScoresRow + j;
        Vec x = below_top(load(scores + at), scales, splat(top[i]), T{});
        if (masked) {
          if (sight.limits) x = min(x, load(sight.limits + key + j));
          x = hide(x, j, sight.begin[i] - key, sight.end[i] - key, edge);
        }
        ps[u] = exponential(x, T{});
        if (whole_rows) ps[u] = ps[u] * splat(inverse[i]);
        dss[u] = (ps[u] * scale) * (load(dp + at) - splat(delta[i]));
        if (pair == 2) Operand<T>::store_row(ds_rows + (row + u) * kUnitsRow<T> + j / pair, dss[u]);
      }
      Operand<T>::store_rows(p_to + j, ps[0], ps[pair - 1]);
      Operand<T>::store_rows(ds_to + j, dss[0], dss[pair - 1]);
    }
  }

  void hide_columns(int64_t row, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += Vec::size) {
      store(p + row / sizes.pair * kScoresRow + j, splat(0.0f));
      store(ds + row / sizes.pair * kScoresRow + j, splat(0.0f));
    }
  }

  // The queries of a block that see any key from `key` to `end`.
  void viewers(int64_t first_query, int64_t rows, int64_t key, int64_t end, int64_t& from, int64_t& to) const {
    from = rows, to = 0;
    for (int64_t i = 0; i < rows; ++i) {
      if (sight.begin[first_query + i] < end && sight.end[first_query + i] > key) {
        if (i < from) from = i;
        to = i + 1;
      }
    }
  }

  // Where a block of queries meets a block of keys.
  struct Block {
    int64_t query, rows, key;
    Span spans[kBlockTiles];
    bool whole = true, empty = true;

    Block(const Backward& of, int64_t first_query, int64_t first_key) : query(first_query), key(first_key) {
      const int64_t left = of.a.queries - query;
      rows = rounded_up(left < kQueries ? left : kQueries, pair);
      for (int64_t i = 0; i < rows; i += kTileRows) {
        Span& span = spans[i / kTileRows];
        span = Span(of.sight, query + i, rows - i < kTileRows ? rows - i : kTileRows, key);
        whole = whole && span.whole;
        empty = empty && span.empty();
      }
    }
  };

  void score(const Block& at) {
    if (at.empty) return;
    const int64_t to = block_at(at.key), query = at.query * sizes.row, key = at.key * sizes.steps;
    block_product(scores + to, queries + query, keys + key, sizes, at.spans, at.rows, Vec::size);
    block_product(dp + to, douts + query, values + key, sizes, at.spans, at.rows, Vec::size);
  }

  void add_gradients(const Block& at) {
    if (at.empty) return;
    const int64_t first_query = at.query, rows = at.rows, key = at.key;
    const bool whole = at.whole;
    const Span* spans = at.spans;
    for (int64_t i = 0; i < rows; i += pair) {
      if (whole) {
        softmax<false>(first_query, i, key, 0, kKeys);
        continue;
      }
      const Span& span = spans[i / kTileRows];
      const int64_t end = span.vectors_end(), begin = span.empty() ? 0 : span.begin;
      hide_columns(i, 0, begin);
      softmax<true>(first_query, i, key, begin, end);
      hide_columns(i, end, kKeys);
    }

    const int64_t key_rows = a.keys - key < kKeys ? a.keys - key : kKeys;
    for (int64_t panel = 0; panel < sizes.panels; ++panel) {
      const int64_t regs = sizes.panel_regs(panel), from_query = (panel * sizes.queries + first_query) / pair * kPanel;
      for (int64_t j = 0; j < key_rows; j += kTileRows) {
        const int64_t tile = key_rows - j < kTileRows ? key_rows - j : kTileRows;
        int64_t from = 0, to = rows;
        if (!whole) viewers(first_query, rows, key + j, key + j + tile, from, to);
        if (from >= to) continue;
        from /= pair, to = (to + pair - 1) / pair;
        const int64_t c = (key + j) * sizes.dim + panel * kPanel;
        Product product{to - from, p + from * kScoresRow + j, 1, kScoresRow, dout_columns + from_query + from * kPanel,
                        dv + c, sizes.dim};
        multiply<T, true>(product, tile, regs);
        product.a = ds + from * kScoresRow + j, product.b = query_columns + from_query + from * kPanel, product.c = dk + c;
        multiply<T, true>(product, tile, regs);
      }
      constexpr int64_t ds_row = pair == 1 ? kScoresRow : kUnitsRow<T>;
      const Unit* b = key_columns + (panel * sizes.keys + key) / pair * kPanel;
      for (int64_t i = 0; i < rows; i += kTileRows) {
        const Span& span = spans[i / kTileRows];
        if (span.empty()) continue;
        const int64_t begin = span.begin / pair, end = (span.end + pair - 1) / pair;
        const Product product{end - begin, ds_rows + i * ds_row + begin, ds_row, 1, b + begin * kPanel,
                              dq + (first_query + i) * sizes.dim + panel * kPanel, sizes.dim};
        multiply<T, true>(product, rows - i < kTileRows ? rows - i : kTileRows, regs);
      }
    }
  }

  // All gradients of a head, whose matrices are at hand.
  void head() {
    const int64_t queries_end = sizes.queries, keys_end = sizes.keys;
    for (int64_t key = 0; !whole_rows && key < keys_end; key += kKeys) {
      for (int64_t query = 0; query < queries_end; query += kQueries) {
        const Block block(*this, query, key);
        score(block);
        add_gradients(block);
      }
    }
    for (int64_t query = 0; whole_rows && query < queries_end; query += kQueries) {
      for (int64_t key = 0; key < keys_end; key += kKeys) score(Block(*this, query, key));
      normalise(query);
      for (int64_t key = 0; key < keys_end; key += kKeys) add_gradients(Block(*this, query, key));
    }
  }

  void write(const Heads& to, int64_t batch, int64_t head, const float* from, int64_t rows) const {
    T* x = const_cast<T*>(head_of<T>(to, batch, head));
    for (int64_t i = 0; i < rows; ++i, x += to.token, from += sizes.dim) {
      for (int64_t j = 0; j < a.dim; j += Vec::size) store(x + j, load(from + j), a.dim - j);
    }
  }
};

template <class T>
int64_t flash_attention_bwd_scratch(const FlashAttention& a) {
  return Backward<T>(a, nullptr).scratch.bytes();
}

// Heads of the keys, of every batch row in turn.
template <class T>
void flash_attention_bwd(const FlashAttention& a, char* memory, int64_t begin, int64_t end) {
  Backward<T> backward(a, memory);
  const int64_t group = a.heads / a.key_heads;
  int64_t batch = -1;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / a.key_heads, key_head = i % a.key_heads;
    if (row != batch) backward.sight.look(a, row, backward.sizes.queries, backward.sizes.keys);
    batch = row;
    backward.begin_keys(row, key_head);
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      backward.begin_queries(row, head);
      backward.head();
      backward.write(a.dq, row, head, backward.dq, a.queries);
    }
    backward.write(a.dk, row, key_head, backward.dk, a.keys);
    backward.write(a.dv, row, key_head, backward.dv, a.keys);
  }
}

}  // namespace
}  // namespace FASTLORA_ISA
}  // namespace fastlora
