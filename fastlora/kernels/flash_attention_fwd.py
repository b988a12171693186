"""Attention, forward: one program per tile of queries, a running softmax over the key tiles it sees."""

from __future__ import annotations

from ._tl import tl, triton
from .flash_attention_mask import (
    dot_t,
    edge_tile,
    exponent,
    first_key,
    kept,
    key_tiles,
    load_rows,
    power,
    store_rows,
    visible,
)

_LN2 = tl.constexpr(0.6931471805599453)
# Below every score, and finite: a row that has seen no key yet rescales by exp(0), not by exp(−inf + inf).
_LOWEST = tl.constexpr(-1.0e38)


@triton.jit
def _step(
    acc, b_l, b_max, b_q, p_k, p_v, stride_kt, stride_vt, i_m, i_n, i_bh, o_m, b_first, o_d, p_pad, T_kv, shift, scale,
    seed, threshold, p_visited, CAUSAL: tl.constexpr, LEFT: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_n = i_n + tl.arange(0, BLOCK_N)
    b_k = load_rows(p_k, o_n, stride_kt, o_d, T_kv, MASKED, D, BLOCK_D)
    b_s = dot_t(b_q, b_k, PRECISION)
    if MASKED:
        m = visible(o_m[:, None], o_n[None, :], b_first[:, None], p_pad, T_kv, shift, CAUSAL, LEFT)
        b_s = tl.where(m, b_s, float("-inf"))
    b_top = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    b_p = power(b_s * scale - b_top[:, None], b_q.dtype == tl.float32)
    b_shrink = power(b_max - b_top, b_q.dtype == tl.float32)
    b_l = b_l * b_shrink + tl.sum(b_p, 1)
    if seed is not None:
        b_p = tl.where(kept(i_m, i_n, i_bh, seed, threshold, BLOCK_M, BLOCK_N, False), b_p, 0.0)
    b_v = load_rows(p_v, o_n, stride_vt, o_d, T_kv, MASKED, D, BLOCK_D)
    acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * b_shrink[:, None], input_precision=PRECISION)
    if p_visited is not None:
        tl.atomic_add(p_visited, 1)
    return acc, b_l, b_top


@triton.jit(do_not_specialize=["seed", "threshold"])
def flash_attention_fwd_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_pad, p_pos, p_visited, T, T_kv, GROUP, scale, window, seed, threshold, unkept,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_pad, stride_pos,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    LEFT: tl.constexpr = WINDOW or p_pos is not None
    # Under a causal mask the last queries see the most keys: they go first.
    i_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_hk, i_bh = i_h // GROUP, tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_hk * stride_kh
    p_v += i_b * stride_vb + i_hk * stride_vh
    if p_pad is not None:
        p_pad += i_b * stride_pad
    if p_pos is not None:
        p_pos += i_b * stride_pos
    o_m, o_d = i_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    shift = T_kv - T
    b_first = first_key(o_m, p_pos, T, shift, window, WINDOW) if LEFT else o_m
    lo, lefts, wholes, edges = key_tiles(i_m, o_m, b_first, p_pad, T, T_kv, shift, CAUSAL, LEFT, BLOCK_M, BLOCK_N)
    FP32: tl.constexpr = p_q.dtype.element_ty == tl.float32
    scale = exponent(scale, FP32)
    b_q = load_rows(p_q, o_m, stride_qt, o_d, T, True, D, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_l = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], _LOWEST, dtype=tl.float32)
    for i in range(0, wholes):
        i_n = lo + (lefts + i) * BLOCK_N
        acc, b_l, b_max = _step(
            acc, b_l, b_max, b_q, p_k, p_v, stride_kt, stride_vt, i_m, i_n, i_bh, o_m, b_first, o_d, p_pad, T_kv, shift,
            scale, seed, threshold, p_visited, CAUSAL, LEFT, False, PRECISION, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for i in tl.range(0, edges, num_stages=1):
        i_n = edge_tile(i, lo, lefts, wholes, BLOCK_N)
        acc, b_l, b_max = _step(
            acc, b_l, b_max, b_q, p_k, p_v, stride_kt, stride_vt, i_m, i_n, i_bh, o_m, b_first, o_d, p_pad, T_kv, shift,
            scale, seed, threshold, p_visited, CAUSAL, LEFT, True, PRECISION, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    p_lse += (i_b * tl.num_programs(1) + i_h) * T
    p_out += i_b * stride_ob + i_h * stride_oh
    empty = b_l == 0.0
    b_l = tl.where(empty, 1.0, b_l)
    if seed is not None:
        acc *= unkept
    store_rows(p_out, acc / b_l[:, None], o_m, stride_ot, o_d, T, D)
    # +inf makes every probability of an empty row 0 in the backward.
    b_lse = tl.where(empty, float("inf"), b_max if FP32 else b_max * _LN2 + tl.log(b_l))
    tl.store(p_lse + o_m, b_lse, mask=o_m < T)
