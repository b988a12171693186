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
# ln 2 as a number of ten bits, which an exponent multiplies exactly, and the rest.
_LN2_HIGH = tl.constexpr(355 / 512)
_LN2_LOW = tl.constexpr(-2.121944400546905e-4)


@triton.jit
def exponent(x, FP32: tl.constexpr):
    """x in the unit that `power` takes: log₂ e, but in fp32, where that would round away the last bits, 1."""
    return x if FP32 else x * _LOG2E


@triton.jit
def power(x, FP32: tl.constexpr):
    """e to the x of `exponent`, x ≤ 0 but for rounding."""
    return _exp(x) if FP32 else tl.math.exp2(x)


@triton.jit
def _exp(x):
    """To one ulp, as eager's; the GPU's own is exp2(x · log₂ e), off by the rounding of that product. 0 below −87."""
    b = tl.maximum(x, -87.0)
    n = tl.floor(b * _LOG2E + 0.5)
    r = (b - n * _LN2_HIGH) - n * _LN2_LOW
    y = 1 / 720 + r * (1 / 5040)
    y = 1 / 24 + r * (1 / 120 + r * y)
    y = 1.0 + (r + r * r * (0.5 + r * (1 / 6 + r * y)))
    return tl.where(x < -87.0, 0.0, y * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True))


@triton.jit
def dot_t(b_a, b_b, PRECISION: tl.constexpr):
    """a bᵀ of rows. In fp32 even and odd columns are summed apart, which loses less; beyond 64 that would spill."""
    if b_a.dtype == tl.float32 and b_a.shape[1] <= 64:
        b_a0, b_a1 = tl.split(tl.reshape(b_a, (b_a.shape[0], b_a.shape[1] // 2, 2)))
        b_b0, b_b1 = tl.split(tl.reshape(b_b, (b_b.shape[0], b_b.shape[1] // 2, 2)))
        b = tl.dot(b_a0, tl.trans(b_b0), input_precision=PRECISION)
        return b + tl.dot(b_a1, tl.trans(b_b1), input_precision=PRECISION)
    else:
        return tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION)


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
def kept(i_m, i_n, i_bh, seed, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """What dropout keeps of the tile of scores at (i_m, i_n) of head i_bh, (BLOCK_N, BLOCK_M) where KEYS_FIRST.

    The random word of score (i, j) is word j % 4 of Philox of the counter (j // 4, i, i_bh): of whatever tile it is in.
    """
    o_m, o_n = (i_m + tl.arange(0, BLOCK_M)).to(tl.uint32), (i_n // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)
    if KEYS_FIRST:
        b_zero = tl.zeros([BLOCK_N // 4, BLOCK_M], dtype=tl.uint32)
        r0, r1, r2, r3 = tl.philox(seed, b_zero + o_n[:, None], b_zero + o_m[None, :], b_zero + i_bh, b_zero)
    else:
        b_zero = tl.zeros([BLOCK_M, BLOCK_N // 4], dtype=tl.uint32)
        r0, r1, r2, r3 = tl.philox(seed, b_zero + o_n[None, :], b_zero + o_m[:, None], b_zero + i_bh, b_zero)
    b_even = tl.join((r0 >= threshold).to(tl.int8), (r2 >= threshold).to(tl.int8))
    b_odd = tl.join((r1 >= threshold).to(tl.int8), (r3 >= threshold).to(tl.int8))
    b = tl.join(b_even, b_odd)
    if KEYS_FIRST:
        b = tl.reshape(tl.permute(b, (0, 2, 3, 1)), (BLOCK_N, BLOCK_M))
    else:
        b = tl.reshape(b, (BLOCK_M, BLOCK_N))
    return b != 0


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
    i_n, b_real, p_pad, p_pos, T, T_kv, shift, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The query tiles that see any real key, b_real, of the BLOCK_N from i_n on: see _tiles."""
    last = tl.minimum(i_n + BLOCK_N, T_kv) - 1
    if p_pad is not None:
        o_n = i_n + tl.arange(0, BLOCK_N)
        last = tl.max(tl.where(b_real, o_n, i_n), 0)
        i_n = tl.min(tl.where(b_real, o_n, last), 0)
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
