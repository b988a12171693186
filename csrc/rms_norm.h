// RMSNorm: y = weight * round(x * rstd), rstd = 1 / sqrt(mean(x^2) + eps), in Hugging Face's order of rounding.
#pragma once

#include "vec.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

template <class X, class W>
void rms_norm_fwd_rows(const RmsNormFwd& a, int64_t row_begin, int64_t row_end) {
  const W* weight = static_cast<const W*>(a.weight);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const X* x = static_cast<const X*>(a.x) + row * a.cols;
    W* y = static_cast<W*>(a.y) + row * a.cols;

    Chains squares(0.0f);
    for (int64_t i = 0; i < a.cols; i += Chains::step) {
      for (int u = 0; u < Chains::count; ++u) {
        const int64_t j = i + u * Vec::size;
        const Vec v = load(x + j, a.cols - j);
        squares.v[u] = fma(v, v, squares.v[u]);
      }
    }
    // In double: once a row it costs nothing, and every element of the row shares the error of rstd.
    const double mean = static_cast<double>(sum(squares)) / static_cast<double>(a.cols);
    const float rstd = static_cast<float>(1.0 / __builtin_sqrt(mean + a.eps));
    a.rstd[row] = rstd;

    for (int64_t i = 0; i < a.cols; i += Vec::size) {
      const int64_t left = a.cols - i;
      const Vec normed = round_as(load(x + i, left) * splat(rstd), X{});
      store(y + i, load(weight + i, left) * normed, left);
    }
  }
}

// One row of the gradient. With g = dy * weight and xhat = x * rstd:
//   dx = rstd * (g - xhat * mean(g * xhat)) + dresidual,  n = weight * round(xhat),  dw += dy * round(xhat).
template <class X, class W, class D>
void rms_norm_bwd_row(const RmsNormBwd& a, int64_t row, float* dw) {
  const W* weight = static_cast<const W*>(a.weight);
  const D* dy = static_cast<const D*>(a.dy) + row * a.cols;
  const X* x = static_cast<const X*>(a.x) + row * a.cols;
  X* dx = static_cast<X*>(a.dx) + row * a.cols;
  const X* dresidual = a.dresidual ? static_cast<const X*>(a.dresidual) + row * a.cols : nullptr;
  D* n = a.n ? static_cast<D*>(a.n) + row * a.cols : nullptr;
  const Vec rstd = splat(a.rstd[row]);

  Chains dots(0.0f);
  for (int64_t i = 0; i < a.cols; i += Chains::step) {
    for (int u = 0; u < Chains::count; ++u) {
      const int64_t j = i + u * Vec::size, left = a.cols - j;
      dots.v[u] = fma(load(dy + j, left) * load(weight + j, left), load(x + j, left) * rstd, dots.v[u]);
    }
  }
  const Vec mean = splat(sum(dots) / static_cast<float>(a.cols));

  for (int64_t i = 0; i < a.cols; i += Vec::size) {
    const int64_t left = a.cols - i;
    const Vec dyi = load(dy + i, left), xhat = load(x + i, left) * rstd, w = load(weight + i, left);
    Vec dxi = rstd * fnma(xhat, mean, dyi * w);
    if (dresidual) dxi = dxi + load(dresidual + i, left);
    store(dx + i, dxi, left);
    const Vec normed = round_as(xhat, X{});
    // Rounded to the forward's own dtype before it takes that of dy, which autocast may have narrowed.
    if (n) store(n + i, round_as(w * normed, W{}), left);
    if (dw) store(dw + i, fma(dyi, normed, load(dw + i, left)), left);
  }
}

// dw is summed in three levels, so that no chain of additions grows long: rows into a group of 16, groups into a block,
// blocks (rms_norm_dw) into dw. None of them knows of threads.
template <class X, class W, class D>
void rms_norm_bwd_blocks(const RmsNormBwd& a, int64_t block_begin, int64_t block_end) {
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t row_begin = block * a.block_rows;
    const int64_t row_end = row_begin + a.block_rows < a.rows ? row_begin + a.block_rows : a.rows;
    float* dw_block = a.dw_partials ? a.dw_partials + block * 2 * a.cols : nullptr;
    float* dw_group = dw_block ? dw_block + a.cols : nullptr;
    for (int64_t i = 0; dw_block && i < 2 * a.cols; ++i) dw_block[i] = 0.0f;

    for (int64_t row = row_begin; row < row_end; ++row) {
      rms_norm_bwd_row<X, W, D>(a, row, dw_group);
      const bool group_ends = row + 1 == row_end || (row + 1 - row_begin) % 16 == 0;
      for (int64_t i = 0; dw_block && group_ends && i < a.cols; ++i) {
        dw_block[i] += dw_group[i];
        dw_group[i] = 0.0f;
      }
    }
  }
}

template <class W>
void rms_norm_dw_cols(const RmsNormDw& a, int64_t col_begin, int64_t col_end) {
  for (int64_t i = col_begin; i < col_end; i += Vec::size) {
    const int64_t left = col_end - i;
    Vec total = splat(0);
    for (int64_t block = 0; block < a.blocks;) {
      Vec sixteen = splat(0);
      for (int u = 0; u < 16 && block < a.blocks; ++u, ++block) {
        sixteen = sixteen + load(a.dw_partials + block * 2 * a.cols + i, left);
      }
      total = total + sixteen;
    }
    store(static_cast<W*>(a.dw) + i, total, left);
  }
}

void rms_norm_fwd(const RmsNormFwd& a, int64_t begin, int64_t end) {
  with_types(a.x_type, a.weight_type,
             [&](auto x, auto w) { rms_norm_fwd_rows<decltype(x), decltype(w)>(a, begin, end); });
}

void rms_norm_bwd(const RmsNormBwd& a, int64_t begin, int64_t end) {
  with_types(a.x_type, a.weight_type, [&](auto x, auto w) {
    with_type(a.dy_type, [&](auto d) { rms_norm_bwd_blocks<decltype(x), decltype(w), decltype(d)>(a, begin, end); });
  });
}

void rms_norm_dw(const RmsNormDw& a, int64_t begin, int64_t end) {
  with_type(a.weight_type, [&](auto w) { rms_norm_dw_cols<decltype(w)>(a, begin, end); });
}

}  // namespace
}  // namespace FASTLORA_ISA
}  // namespace fastlora
