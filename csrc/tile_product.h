// Products of matrices in 32-bit units, a tile of sums in registers. A unit is a float, widened from a 16-bit type where
// need be; or, where the processor multiplies those, a pair of bf16 next to one another along the reduction. Sums are fp32.
//
//   C[i][j] = sum over s of A[i * row + s * step] * B[s * kPanel + j]        (or +=)
//
// A is read a unit at a time, in any strides, B in whole registers: it is packed into panels of kPanel columns.
#pragma once

#include "vec.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

// A tile's sums, its row of B and one unit of A are all the registers there are: 32 of AVX-512, else 16.
constexpr int kTileRows = 6;
constexpr int kTileRegs = Reg::size == 16 ? 4 : 2;
constexpr int64_t kPanel = kTileRegs * Reg::size;

typedef float __attribute__((may_alias)) Unit;

inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How elements of T become units, and what multiplies these.
template <class T>
struct Operand {
  static constexpr int64_t pair = 1;  // elements in a unit
  static Reg multiply(Reg a, Reg b, Reg sum) { return fma(a, b, sum); }
  // Neighbours in a row, rounded to T.
  static void store_row(Unit* to, Vec x) { store(to, round_as(x, T{})); }
  // Neighbours in a row, each with the one below it.
  static void store_rows(Unit* to, Vec x, Vec) { store_row(to, x); }
};

#ifdef FASTLORA_BF16_PAIRS
template <>
struct Operand<Bf16> {
  static constexpr int64_t pair = 2;
  static Reg multiply(Reg a, Reg b, Reg sum) { return multiply_pairs(a, b, sum); }
  static void store_row(Unit* to, Vec x) { store(to, pairs(x.lo, x.hi)); }
  static void store_rows(Unit* to, Vec x, Vec below) {
    store(to, interleaved_pairs(x.lo, below.lo));
    store(to + Reg::size, interleaved_pairs(x.hi, below.hi));
  }
};
#endif

#define FASTLORA_INLINE __attribute__((always_inline))

// By name, not in arrays: those would be written to memory at every step.
template <int regs>
struct TileRow {
  Reg v;
  TileRow<regs - 1> rest;

  FASTLORA_INLINE void zero() {
    v = splat_reg(0.0f);
    rest.zero();
  }
  FASTLORA_INLINE void load(const Unit* b) {
    v = load_reg(b);
    rest.load(b + Reg::size);
  }
  template <class T>
  FASTLORA_INLINE void add(Reg a, const TileRow& b) {
    v = Operand<T>::multiply(a, b.v, v);
    rest.template add<T>(a, b.rest);
  }
  template <bool more>
  FASTLORA_INLINE void finish(float* c) const {
    store(c, more ? load_reg(c) + v : v);
    rest.template finish<more>(c + Reg::size);
  }
};
template <>
struct TileRow<0> {
  void zero() {}
  void load(const Unit*) {}
  template <class T>
  void add(Reg, const TileRow&) {}
  template <bool more>
  void finish(float*) const {}
};

template <int rows, int regs>
struct TileSums {
  TileRow<regs> row;
  TileSums<rows - 1, regs> rest;

  FASTLORA_INLINE void zero() {
    row.zero();
    rest.zero();
  }
  template <class T>
  FASTLORA_INLINE void add(const Unit* a, int64_t stride, const TileRow<regs>& b) {
    row.template add<T>(splat_reg(*a), b);
    rest.template add<T>(a + stride, stride, b);
  }
  template <bool more>
  FASTLORA_INLINE void finish(float* c, int64_t stride) const {
    row.template finish<more>(c);
    rest.template finish<more>(c + stride, stride);
  }
};
template <int regs>
struct TileSums<0, regs> {
  void zero() {}
  template <class T>
  void add(const Unit*, int64_t, const TileRow<regs>&) {}
  template <bool more>
  void finish(float*, int64_t) const {}
};

struct Product {
  int64_t steps;
  const Unit* a;
  int64_t a_row, a_step;
  const Unit* b;
  float* c;
  int64_t c_row;
};

template <class T, bool more, int rows, int regs>
void tile_product(const Product& p) {
  TileSums<rows, regs> sums;
  sums.zero();
  const Unit *a = p.a, *b = p.b;
  const int64_t row = p.a_row, step = p.a_step;
  for (int64_t s = p.steps; s > 0; --s, a += step, b += kPanel) {
    TileRow<regs> b_row;
    b_row.load(b);
    sums.template add<T>(a, row, b_row);
  }
  sums.template finish<more>(p.c, p.c_row);
}

// The first `rows` (up to kTileRows) and `regs` (up to kTileRegs) of C; with `more`, added to it.
template <class T, bool more, int most_rows = kTileRows, int most_regs = kTileRegs>
inline void multiply(const Product& p, int64_t rows, int64_t regs) {
  if constexpr (most_rows > 1) {
    if (rows < most_rows) return multiply<T, more, most_rows - 1, most_regs>(p, rows, regs);
  }
  if constexpr (most_regs > 1) {
    if (regs < most_regs) return multiply<T, more, most_rows, most_regs - 1>(p, rows, regs);
  }
  tile_product<T, more, most_rows, most_regs>(p);
}

// The matrices that products take, from (rows, cols) of T in memory, a row `stride` elements after the last. Rows up to
// `padded`, and columns up to whole vectors, are zeros.

// For A, along a row: unit s of row i at i * ld + s.
template <class T>
void pack_rows(Unit* to, int64_t ld, const T* from, int64_t stride, int64_t rows, int64_t cols, int64_t padded) {
  for (int64_t i = 0; i < padded; ++i, to += ld, from += stride) {
    for (int64_t j = 0; j < cols; j += Vec::size) {
      Operand<T>::store_row(to + j / Operand<T>::pair, i < rows ? load(from + j, cols - j) : splat(0.0f));
    }
  }
}

// For B, along a row: panels of kPanel rows, transposed, each of `steps` steps, a multiple of four. buffer holds kPanel
// rows of ld units.
template <class T>
void pack_transposed(
    Unit* to, int64_t steps, Unit* buffer, int64_t ld, const T* from, int64_t stride, int64_t rows, int64_t cols,
    int64_t padded) {
  for (int64_t i = 0; i < padded; i += kPanel, to += steps * kPanel) {
    pack_rows(buffer, ld, from + i * stride, stride, rows - i, cols, kPanel);
    for (int64_t s = 0; s < steps; s += 4) {
      for (int64_t j = 0; j < kPanel; j += Reg::size) transpose4(buffer + j * ld + s, ld, to + s * kPanel + j, kPanel);
    }
  }
}

// For B, along a column: panels of kPanel columns, each of padded / pair steps.
template <class T>
void pack_columns(Unit* to, const T* from, int64_t stride, int64_t rows, int64_t cols, int64_t padded) {
  constexpr int64_t pair = Operand<T>::pair;
  const int64_t steps = padded / pair;
  for (int64_t s = 0; s < steps; ++s) {
    const T* row = from + s * pair * stride;
    for (int64_t j = 0; j < cols; j += Vec::size) {
      const Vec x = s * pair < rows ? load(row + j, cols - j) : splat(0.0f);
      const Vec below = pair == 2 && s * pair + 1 < rows ? load(row + stride + j, cols - j) : splat(0.0f);
      Operand<T>::store_rows(to + (j / kPanel * steps + s) * kPanel + j % kPanel, x, below);
    }
  }
}

}  // namespace
}  // namespace FASTLORA_ISA
}  // namespace fastlora
