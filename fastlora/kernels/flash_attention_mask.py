"""What attention sees, shared by its three kernels.

Every mask is an interval of keys for each query, cut by the set of real keys. With p(i) = i + T_kv − T, the position of
query i among the keys, query i sees real keys from first(i) up to p(i), or up to the last where not causal:

    first(i) = max(p(i) − window + 1, p(i) − position_ids[i])

So the tiles a program has to visit are an interval too. Tiles outside it are skipped, tiles seen whole by all their
queries are taken without a mask, and only the tiles on its two edges are masked.
"""

from __future__ import annotations

from ._tl import tl, triton

_SCAN = tl.constexpr(1024)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exponent(x, FP32: tl.constexpr):
    """x in the unit that `power` takes: log₂ e, but in fp32, where that would round away the last bits, 1."""
    return x if FP32 else x * _LOG2E


@triton.jit
def power(x, FP32: tl.constexpr):
    """e to the x of `exponent`."""
    return tl.exp(x) if FP32 else tl.math.exp2(x)


@triton.jit
def load_rows(p, o_r, stride, o_d, rows, CHECK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows o_r of a (rows, D) matrix with unit column stride; 0 past D, and past its last row under CHECK."""
    p += o_r.to(tl.int64)[:, None] * stride + o_d[None, :]
    if CHECK:
        if D == BLOCK_D:
            b = tl.load(p, mask=o_r[:, None] < rows, other=0.0)
        else:
            b = tl.load(p, mask=(o_r[:, None] < rows) & (o_d[None, :] < D), other=0.0)
    else:
        if D == BLOCK_D:
            b = tl.load(p)
        else:
            b = tl.load(p, mask=o_d[None, :] < D, other=0.0)
    return b


@triton.jit
def store_rows(p, b, o_r, stride, o_d, rows, D: tl.constexpr):
    """The inverse of load_rows, checked."""
    p += o_r.to(tl.int64)[:, None] * stride + o_d[None, :]
    tl.store(p, b.to(p.dtype.element_ty), mask=(o_r[:, None] < rows) & (o_d[None, :] < D))


@triton.jit
def first_key(o_m, p_pos, T, shift, window, WINDOW: tl.constexpr):
    """first(i) of queries o_m: what a row cannot see to its left."""
    if p_pos is None:
        b = o_m + shift - window + 1
    else:
        b = o_m + shift - tl.load(p_pos + o_m, mask=o_m < T, other=0).to(tl.int32)
        if WINDOW:
            b = tl.maximum(b, o_m + shift - window + 1)
    return b


@triton.jit
def visible(o_m, o_n, b_first, p_pad, T_kv, shift, CAUSAL: tl.constexpr, LEFT: tl.constexpr):
    """True where query o_m sees key o_n; o_m and b_first broadcast against o_n. Rows past T are left undefined."""
    if p_pad is not None:  # a padded key lies past every query
        o_n = tl.where(tl.load(p_pad + o_n, mask=o_n < T_kv, other=0) != 0, o_n, 0x7FFFFFFF)
    m = o_n <= o_m + shift if CAUSAL else o_n < T_kv
    if LEFT:
        m = m & (o_n >= b_first)
    return m


@triton.jit
def _tiles(lo, whole_lo, whole_hi, hi, BLOCK: tl.constexpr):
    """(lo, lefts, wholes, edges) of the tiles from lo on: lefts masked, wholes unmasked, edges − lefts masked.

    Loops count them from 0: a loop that starts at a number read from memory is not pipelined.
    """
    hi = tl.where(lo < hi, hi, 0)
    lo = lo // BLOCK
    end = tl.cdiv(hi, BLOCK)
    whole_lo = tl.maximum(lo, tl.minimum(tl.cdiv(whole_lo, BLOCK), end))
    whole_hi = tl.maximum(whole_lo, tl.minimum(whole_hi, hi) // BLOCK)
    lefts = whole_lo - lo
    return lo * BLOCK, lefts, whole_hi - whole_lo, lefts + tl.maximum(0, end - whole_hi)


@triton.jit
def edge_tile(i, lo, lefts, wholes, BLOCK: tl.constexpr):
    """First index of the i-th masked tile: those left of the whole tiles, then those right of them."""
    return lo + tl.where(i < lefts, i, i + wholes) * BLOCK


@triton.jit
def key_tiles(
    i_m, o_m, b_first, p_pad, T, T_kv, shift,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The key tiles seen by the BLOCK_M queries from i_m on: see _tiles."""
    lo, whole_lo, whole_hi, hi = 0, 0, T_kv, T_kv
    if CAUSAL:
        hi = tl.minimum(i_m + BLOCK_M, T) + shift
        whole_hi = tl.maximum(i_m + shift + 1, 0)
    if LEFT:
        lo = tl.maximum(0, tl.min(tl.where(o_m < T, b_first, T_kv), 0))
        whole_lo = tl.maximum(0, tl.max(tl.where(o_m < T, b_first, 0), 0))
    if p_pad is not None:
        b_lo = tl.zeros([_SCAN], dtype=tl.int32) + T_kv
        b_hi = tl.zeros([_SCAN], dtype=tl.int32)
        b_real = tl.zeros([_SCAN], dtype=tl.int32)
        for i in range(0, T_kv, _SCAN):
            o = i + tl.arange(0, _SCAN)
            m = tl.load(p_pad + o, mask=o < T_kv, other=0) != 0
            b_lo = tl.minimum(b_lo, tl.where(m, o, T_kv))
            b_hi = tl.maximum(b_hi, tl.where(m, o + 1, 0))
            b_real += m.to(tl.int32)
        first, end = tl.min(b_lo, 0), tl.max(b_hi, 0)
        lo, whole_lo = tl.maximum(lo, first), tl.maximum(whole_lo, first)
        # A hole among the real keys may be anywhere: then every tile is masked.
        whole_hi = tl.where(tl.sum(b_real, 0) == end - first, tl.minimum(whole_hi, end), 0)
        hi = tl.minimum(hi, end)
    return _tiles(lo, whole_lo, whole_hi, hi, BLOCK_N)


@triton.jit
def query_tiles(
    i_n, b_real, p_pos, T, T_kv, shift, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The query tiles that see any of the BLOCK_N keys from i_n on, b_real of which are real: see _tiles."""
    last = tl.minimum(i_n + BLOCK_N, T_kv) - 1
    lo, whole_lo, whole_hi, hi = 0, 0, T, T
    if CAUSAL:
        lo = tl.maximum(0, i_n - shift)
        whole_lo = tl.maximum(0, last - shift)
    if WINDOW:
        hi = tl.maximum(0, tl.minimum(hi, last + window - shift))
        whole_hi = tl.maximum(0, tl.minimum(whole_hi, i_n + window - shift))
    if p_pos is not None:
        b_hi = tl.zeros([_SCAN], dtype=tl.int32)
        b_whole = tl.zeros([_SCAN], dtype=tl.int32) + T
        for i in range(lo, hi, _SCAN):
            o = i + tl.arange(0, _SCAN)
            b_first = first_key(o, p_pos, T, shift, window, False)
            b_hi = tl.maximum(b_hi, tl.where((o < T) & (b_first <= last), o + 1, 0))
            b_whole = tl.minimum(b_whole, tl.where((o < T) & (b_first > i_n), o, T))
        hi = tl.minimum(hi, tl.max(b_hi, 0))
        whole_hi = tl.minimum(whole_hi, tl.min(b_whole, 0))
    hi = tl.where(tl.max(b_real.to(tl.int32), 0) > 0, hi, 0)
    return _tiles(lo, whole_lo, whole_hi, hi, BLOCK_M)
