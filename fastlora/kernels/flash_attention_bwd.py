"""Attention, backward: dq by tiles of queries, then dk and dv by tiles of keys. No atomics: the same bits every time.

With P = exp(scale · q kᵀ − lse), Z what dropout keeps, times 1 / (1 − p), and delta = rowsum(dout ∘ out):

    dv = (Z ∘ P)ᵀ dout      dS = P ∘ (Z ∘ dout vᵀ − delta)      dq = scale · dS k      dk = scale · dSᵀ q

In fp32 the rounding of lse and of out would be the largest errors here. There lse is the row's largest score, and one
more pass over the keys takes norm = 1 / rowsum(P), by which P is multiplied, and delta = norm · rowsum(P ∘ Z ∘ dP). In
bf16 and fp16 the rounding of P itself hides them.
"""

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
    query_tiles,
    store_rows,
    visible,
)


@triton.jit
def _probabilities(
    b_q, b_do, b_lse, p_k, p_v, stride_kt, stride_vt, i_m, i_n, i_bh, o_m, b_first, o_d, p_pad, T_kv, shift, scale,
    seed, threshold, unkept, CAUSAL: tl.constexpr, LEFT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """k, P and dP = Z ∘ dout vᵀ of one tile."""
    o_n = i_n + tl.arange(0, BLOCK_N)
    b_k = load_rows(p_k, o_n, stride_kt, o_d, T_kv, MASKED, D, BLOCK_D)
    b_v = load_rows(p_v, o_n, stride_vt, o_d, T_kv, MASKED, D, BLOCK_D)
    b_s = dot_t(b_q, b_k, PRECISION)
    if MASKED:
        m = visible(o_m[:, None], o_n[None, :], b_first[:, None], p_pad, T_kv, shift, CAUSAL, LEFT)
        b_s = tl.where(m, b_s, float("-inf"))
    b_p = power(b_s * scale - b_lse[:, None], b_q.dtype == tl.float32)
    b_dp = dot_t(b_do, b_v, PRECISION)
    if seed is not None:
        b_dp = tl.where(kept(i_m, i_n, i_bh, seed, threshold, BLOCK_M, BLOCK_N, False), b_dp * unkept, 0.0)
    return b_k, b_p, b_dp


@triton.jit
def _norm_step(
    b_norm, b_delta, b_q, b_do, b_lse, p_k, p_v, stride_kt, stride_vt, i_m, i_n, i_bh, o_m, b_first, o_d, p_pad, T_kv,
    shift, scale, seed, threshold, unkept, CAUSAL: tl.constexpr, LEFT: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    _, b_p, b_dp = _probabilities(
        b_q, b_do, b_lse, p_k, p_v, stride_kt, stride_vt, i_m, i_n, i_bh, o_m, b_first, o_d, p_pad, T_kv, shift, scale,
        seed, threshold, unkept, CAUSAL, LEFT, MASKED, PRECISION, D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    return b_norm + tl.sum(b_p, 1), b_delta + tl.sum(b_p * b_dp, 1)


@triton.jit
def _dq_step(
    acc, b_q, b_do, b_lse, b_delta, p_k, p_v, stride_kt, stride_vt, i_m, i_n, i_bh, o_m, b_first, o_d, p_pad, T_kv,
    shift, scale, seed, threshold, unkept, p_visited, CAUSAL: tl.constexpr, LEFT: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b_k, b_p, b_dp = _probabilities(
        b_q, b_do, b_lse, p_k, p_v, stride_kt, stride_vt, i_m, i_n, i_bh, o_m, b_first, o_d, p_pad, T_kv, shift, scale,
        seed, threshold, unkept, CAUSAL, LEFT, MASKED, PRECISION, D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
    if p_visited is not None:
        tl.atomic_add(p_visited, 1)
    return tl.dot(b_ds, b_k, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["seed", "threshold"])
def flash_attention_dq_kernel(
    p_q, p_k, p_v, p_out, p_do, p_lse, p_delta, p_norm, p_dq, p_pad, p_pos, p_visited, T, T_kv, GROUP, scale, window,
    seed, threshold, unkept,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_dob, stride_doh, stride_dot, stride_dqb, stride_dqh, stride_dqt,
    stride_pad, stride_pos,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq, and delta on the way; or, where NORM, norm and delta alone."""
    LEFT: tl.constexpr = WINDOW or p_pos is not None
    i_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_hk, i_bh = i_h // GROUP, tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    p_lse += (i_b * tl.num_programs(1) + i_h) * T
    p_delta += (i_b * tl.num_programs(1) + i_h) * T
    if p_norm is not None:
        p_norm += (i_b * tl.num_programs(1) + i_h) * T
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_hk * stride_kh
    p_v += i_b * stride_vb + i_hk * stride_vh
    p_out += i_b * stride_ob + i_h * stride_oh
    p_do += i_b * stride_dob + i_h * stride_doh
    p_dq += i_b * stride_dqb + i_h * stride_dqh
    if p_pad is not None:
        p_pad += i_b * stride_pad
    if p_pos is not None:
        p_pos += i_b * stride_pos
    o_m, o_d = i_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    shift = T_kv - T
    b_first = first_key(o_m, p_pos, T, shift, window, WINDOW) if LEFT else o_m
    lo, lefts, wholes, edges = key_tiles(i_m, o_m, b_first, p_pad, T, T_kv, shift, CAUSAL, LEFT, BLOCK_M, BLOCK_N)
    b_do = load_rows(p_do, o_m, stride_dot, o_d, T, True, D, BLOCK_D)
    b_q = load_rows(p_q, o_m, stride_qt, o_d, T, True, D, BLOCK_D)
    b_lse = exponent(tl.load(p_lse + o_m, mask=o_m < T, other=float("inf")), b_q.dtype == tl.float32)
    unit_scale = exponent(scale, b_q.dtype == tl.float32)
    if NORM:
        b_norm = tl.zeros([BLOCK_M], dtype=tl.float32)
        b_delta = tl.zeros([BLOCK_M], dtype=tl.float32)
        for i in range(0, wholes):
            i_n = lo + (lefts + i) * BLOCK_N
            b_norm, b_delta = _norm_step(
                b_norm, b_delta, b_q, b_do, b_lse, p_k, p_v, stride_kt, stride_vt, i_m, i_n, i_bh, o_m, b_first, o_d,
                p_pad, T_kv, shift, unit_scale, seed, threshold, unkept,
                CAUSAL, LEFT, False, PRECISION, D, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        for i in tl.range(0, edges, num_stages=1):
            i_n = edge_tile(i, lo, lefts, wholes, BLOCK_N)
            b_norm, b_delta = _norm_step(
                b_norm, b_delta, b_q, b_do, b_lse, p_k, p_v, stride_kt, stride_vt, i_m, i_n, i_bh, o_m, b_first, o_d,
                p_pad, T_kv, shift, unit_scale, seed, threshold, unkept,
                CAUSAL, LEFT, True, PRECISION, D, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        b_norm = 1.0 / tl.where(b_norm > 0.0, b_norm, 1.0)
        tl.store(p_norm + o_m, b_norm, mask=o_m < T)
        tl.store(p_delta + o_m, b_delta * b_norm, mask=o_m < T)
    else:
        if p_norm is None:
            b_out = load_rows(p_out, o_m, stride_ot, o_d, T, True, D, BLOCK_D)
            b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
            tl.store(p_delta + o_m, b_delta, mask=o_m < T)
        else:
            b_delta = tl.load(p_delta + o_m, mask=o_m < T, other=0.0)
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        for i in range(0, wholes):
            i_n = lo + (lefts + i) * BLOCK_N
            acc = _dq_step(
                acc, b_q, b_do, b_lse, b_delta, p_k, p_v, stride_kt, stride_vt, i_m, i_n, i_bh, o_m, b_first, o_d,
                p_pad, T_kv, shift, unit_scale, seed, threshold, unkept, p_visited,
                CAUSAL, LEFT, False, PRECISION, D, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        for i in tl.range(0, edges, num_stages=1):
            i_n = edge_tile(i, lo, lefts, wholes, BLOCK_N)
            acc = _dq_step(
                acc, b_q, b_do, b_lse, b_delta, p_k, p_v, stride_kt, stride_vt, i_m, i_n, i_bh, o_m, b_first, o_d,
                p_pad, T_kv, shift, unit_scale, seed, threshold, unkept, p_visited,
                CAUSAL, LEFT, True, PRECISION, D, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        if p_norm is not None:
            acc *= tl.load(p_norm + o_m, mask=o_m < T, other=0.0)[:, None]
        store_rows(p_dq, acc * scale, o_m, stride_dqt, o_d, T, D)


@triton.jit
def _dkdv_step(
    b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, p_norm, stride_qt, stride_dot, i_m, i_n, i_bh, o_n, o_d, p_pos,
    T, T_kv, shift, scale, window, seed, threshold, unkept, p_visited,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, LEFT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_m = i_m + tl.arange(0, BLOCK_M)
    b_q = load_rows(p_q, o_m, stride_qt, o_d, T, MASKED, D, BLOCK_D)
    b_do = load_rows(p_do, o_m, stride_dot, o_d, T, MASKED, D, BLOCK_D)
    b_s = dot_t(b_k, b_q, PRECISION)
    if MASKED:
        # +inf for rows past T: their probabilities are 0.
        b_lse = exponent(tl.load(p_lse + o_m, mask=o_m < T, other=float("inf")), b_q.dtype == tl.float32)
        b_delta = tl.load(p_delta + o_m, mask=o_m < T, other=0.0)
        b_first = first_key(o_m, p_pos, T, shift, window, WINDOW) if LEFT else o_m
        m = visible(o_m[None, :], o_n[:, None], b_first[None, :], None, T_kv, shift, CAUSAL, LEFT)
        b_s = tl.where(m, b_s, float("-inf"))
    else:
        b_lse = exponent(tl.load(p_lse + o_m), b_q.dtype == tl.float32)
        b_delta = tl.load(p_delta + o_m)
    b_p = power(b_s * scale - b_lse[None, :], b_q.dtype == tl.float32)
    if p_norm is not None:
        b_p *= tl.load(p_norm + o_m, mask=o_m < T, other=0.0)[None, :]
    b_dp = dot_t(b_v, b_do, PRECISION)
    if seed is None:
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    else:
        b_kept = kept(i_m, i_n, i_bh, seed, threshold, BLOCK_M, BLOCK_N, True)
        b_dp = tl.where(b_kept, b_dp * unkept, 0.0)
        b_dv = tl.dot(tl.where(b_kept, b_p, 0.0).to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
    b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
    if p_visited is not None:
        tl.atomic_add(p_visited, 1)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["seed", "threshold"])
def flash_attention_dkdv_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_norm, p_dk, p_dv, p_pad, p_pos, p_visited, T, T_kv, GROUP, scale, window,
    seed, threshold, unkept,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_dob, stride_doh, stride_dot, stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    stride_pad, stride_pos,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    LEFT: tl.constexpr = WINDOW or p_pos is not None
    i_n = tl.program_id(0) * BLOCK_N
    i_hk, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_h, i_bh = i_hk * GROUP, (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * GROUP
    p_lse += (i_b * tl.num_programs(1) * GROUP + i_h) * T
    p_delta += (i_b * tl.num_programs(1) * GROUP + i_h) * T
    if p_norm is not None:
        p_norm += (i_b * tl.num_programs(1) * GROUP + i_h) * T
    p_q += i_b * stride_qb + i_h * stride_qh
    p_do += i_b * stride_dob + i_h * stride_doh
    p_k += i_b * stride_kb + i_hk * stride_kh
    p_v += i_b * stride_vb + i_hk * stride_vh
    p_dk += i_b * stride_dkb + i_hk * stride_dkh
    p_dv += i_b * stride_dvb + i_hk * stride_dvh
    if p_pos is not None:
        p_pos += i_b * stride_pos
    o_n, o_d = i_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    shift = T_kv - T
    b_real = o_n < T_kv
    if p_pad is not None:
        b_real = tl.load(p_pad + i_b * stride_pad + o_n, mask=b_real, other=0) != 0
    lo, lefts, wholes, edges = query_tiles(
        i_n, b_real, p_pad, p_pos, T, T_kv, shift, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N
    )
    b_k = load_rows(p_k, o_n, stride_kt, o_d, T_kv, True, D, BLOCK_D)
    b_v = load_rows(p_v, o_n, stride_vt, o_d, T_kv, True, D, BLOCK_D)
    unit_scale = exponent(scale, b_k.dtype == tl.float32)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for _ in range(0, GROUP):
        for i in range(0, wholes):
            i_m = lo + (lefts + i) * BLOCK_M
            b_dk, b_dv = _dkdv_step(
                b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, p_norm, stride_qt, stride_dot, i_m, i_n, i_bh, o_n,
                o_d, p_pos, T, T_kv, shift, unit_scale, window, seed, threshold, unkept, p_visited,
                CAUSAL, WINDOW, LEFT, False, PRECISION, D, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        for i in tl.range(0, edges, num_stages=1):
            i_m = edge_tile(i, lo, lefts, wholes, BLOCK_M)
            b_dk, b_dv = _dkdv_step(
                b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, p_norm, stride_qt, stride_dot, i_m, i_n, i_bh, o_n,
                o_d, p_pos, T, T_kv, shift, unit_scale, window, seed, threshold, unkept, p_visited,
                CAUSAL, WINDOW, LEFT, True, PRECISION, D, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        p_q += stride_qh
        p_do += stride_doh
        p_lse += T
        p_delta += T
        i_bh += 1
        if p_norm is not None:
            p_norm += T
    if seed is not None:
        b_dv *= unkept
    if p_pad is not None:
        # What a padded key gathered stayed in its own row.
        b_dk = tl.where(b_real[:, None], b_dk, 0.0)
        b_dv = tl.where(b_real[:, None], b_dv, 0.0)
    store_rows(p_dk, b_dk * scale, o_n, stride_dkt, o_d, T_kv, D)
    store_rows(p_dv, b_dv, o_n, stride_dvt, o_d, T_kv, D)
