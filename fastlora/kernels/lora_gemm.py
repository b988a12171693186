"""The wide products of LoRA, base and low-rank in one pass.

    lora_gemm     y_i = x W_iᵀ + s_i B_iᵀ + bias_i + residual       every projection of one x in one launch,
                                                                    queries and keys rotated before they are stored
    lora_gemm_t   dx = Σ_i dy_i W_i + Σ_g mask_g ∘ (ds_g A_g)       every projection into one accumulator

Three exact ways to compute y, chosen by FASTLORA_GEMM or the row of the architecture:
    triton     one kernel: the rank-R product and the epilogue share the base product's accumulator
    addmm      the library's GEMM, then its accumulating GEMM of rank R
    augmented  the library's GEMM over the concatenated [x | s] and [W | B]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import _flops
from . import rope as _rope  # noqa: F401  registers the operator
from ._library import register
from ._tiles import choose
from ._tl import cdiv, dot_precision, launch, next_power_of_2, swizzle, tl, triton
from .dropout import apply_mask, keep
from .lora_project import block_r


@triton.jit
def _rotated(acc, p_cos, p_sin, o_t, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rotary embedding of whole heads of D columns by rows o_t of the tables, rotate-half convention."""
    HALF: tl.constexpr = D // 2
    o = o_t[:, None] * D + tl.arange(0, HALF)[None, :]
    b_1, b_2 = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, BLOCK_N // D, 2, HALF]), (0, 1, 3, 2)))
    b_c1, b_c2 = tl.load(p_cos + o).to(tl.float32), tl.load(p_cos + o + HALF).to(tl.float32)
    b_s1, b_s2 = tl.load(p_sin + o).to(tl.float32), tl.load(p_sin + o + HALF).to(tl.float32)
    b_y = tl.join(b_1 * b_c1[:, None, :] - b_2 * b_s1[:, None, :], b_2 * b_c2[:, None, :] + b_1 * b_s2[:, None, :])
    return tl.reshape(tl.permute(b_y, (0, 1, 3, 2)), [BLOCK_M, BLOCK_N])


@triton.jit
def _lora_gemm_kernel(
    p_x, p_w, p_s, p_b, p_bias, p_residual, p_cos, p_sin, p_y, M, K, N, tiles_n, rotated, tables,
    RANKS: tl.constexpr, R: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN_K: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_m, i_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_n, 8)
    # The projection this column of tiles belongs to.
    p_wi, p_bi, p_biasi, p_yi, n, rank, first, start = p_w[0], p_b[0], p_bias[0], p_y[0], N[0], RANKS[0], 0, 0
    next_first, next_start = RANKS[0], tl.cdiv(N[0], BLOCK_N)
    for i in tl.static_range(1, len(RANKS)):
        if i_n >= next_start:
            p_wi, p_bi, p_biasi, p_yi, n, rank = p_w[i], p_b[i], p_bias[i], p_y[i], N[i], RANKS[i]
            first, start = next_first, next_start
        next_first += RANKS[i]
        next_start += tl.cdiv(N[i], BLOCK_N)
    rotate = i_n < rotated
    i_n -= start
    # Rows and columns past the edge read valid memory and are not stored.
    o_m = ((i_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M).to(tl.int64)
    o_n = ((i_n * BLOCK_N + tl.arange(0, BLOCK_N)) % n).to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_r in tl.range(0, rank, BLOCK_R, num_stages=1):
        o_r = i_r + tl.arange(0, BLOCK_R)
        m_r = o_r < rank
        b_s = tl.load(p_s + o_m[:, None] * R + first + o_r[None, :], mask=m_r[None, :], other=0.0)
        b_b = tl.load(p_bi + o_n[None, :] * rank + o_r[:, None], mask=m_r[:, None], other=0.0).to(b_s.dtype)
        acc = tl.dot(b_s, b_b, acc, input_precision=PRECISION)
    o_k = tl.arange(0, BLOCK_K)
    p_xk = p_x + o_m[:, None] * K + o_k[None, :]
    p_wk = p_wi + o_n[None, :] * K + o_k[:, None]
    for i_k in range(0, K, BLOCK_K):
        if EVEN_K:
            b_x = tl.load(p_xk)
            b_w = tl.load(p_wk)
        else:
            b_x = tl.load(p_xk, mask=o_k[None, :] < K - i_k, other=0.0)
            b_w = tl.load(p_wk, mask=o_k[:, None] < K - i_k, other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
        p_xk += BLOCK_K
        p_wk += BLOCK_K
    if HAS_BIAS:
        acc += tl.load(p_biasi + o_n).to(tl.float32)[None, :]
    if D > 0:
        if rotate:
            acc = _rotated(acc, p_cos, p_sin, o_m % tables, D, BLOCK_M, BLOCK_N)
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o = o_m[:, None] * n + o_n[None, :]
    m = (o_m[:, None] < M) & (o_n[None, :] < n)
    if HAS_RESIDUAL:
        acc += tl.load(p_residual + o, mask=m, other=0.0).to(tl.float32)
    tl.store(p_yi + o, acc.to(p_yi.dtype.element_ty), mask=m)


@triton.jit
def _add_low(
    acc, p_ds, p_a, p_mask, o_m, o_n, i_n, M, K, K8,
    RANKS: tl.constexpr, R: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + Σ_g mask_g ∘ (ds_g A_g), rows o_m (int64) and columns o_n, from i_n on; those past the edge read others."""
    first = 0
    for g in tl.static_range(len(RANKS)):
        for i_r in tl.range(0, RANKS[g], BLOCK_R, num_stages=1):
            o_r = i_r + tl.arange(0, BLOCK_R)
            m_r = o_r < RANKS[g]
            b_ds = tl.load(p_ds + o_m[:, None] * R + first + o_r[None, :], mask=m_r[None, :], other=0.0)
            p = p_a[g] + o_r[:, None].to(tl.int64) * K + o_n[None, :]
            b_a = tl.load(p, mask=m_r[:, None], other=0.0).to(b_ds.dtype)
            if MASKED[g]:
                b_kept = keep(p_mask[g], o_m, o_m < M, i_n, K8, acc.shape[1])
                acc += tl.where(b_kept, tl.dot(b_ds, b_a, input_precision=PRECISION), 0.0)
            else:
                acc = tl.dot(b_ds, b_a, acc, input_precision=PRECISION)
        first += RANKS[g]
    return acc


@triton.jit
def _lora_low_kernel(
    p_ds, p_a, p_mask, p_low, M, K, K8,
    RANKS: tl.constexpr, R: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    o_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    i_n = tl.program_id(1) * BLOCK_N
    o_n = i_n + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    acc = _add_low(acc, p_ds, p_a, p_mask, o_m % M, o_n % K, i_n, M, K, K8, RANKS, R, MASKED, PRECISION, BLOCK_R)
    m = (o_m[:, None] < M) & (o_n[None, :] < K)
    tl.store(p_low + o_m[:, None] * K + o_n[None, :], acc.to(p_low.dtype.element_ty), mask=m)


@triton.jit
def _lora_gemm_t_kernel(
    p_dy, p_w, p_ds, p_a, p_mask, p_dx, M, K, K8, N,
    RANKS: tl.constexpr, R: tl.constexpr, MASKED: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_m, i_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), 8)
    o_m = ((i_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M).to(tl.int64)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)) % K
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    i_col = i_n * BLOCK_N
    acc = _add_low(acc, p_ds, p_a, p_mask, o_m, o_n, i_col, M, K, K8, RANKS, R, MASKED, PRECISION, BLOCK_R)
    o_k = tl.arange(0, BLOCK_K)
    for i in tl.static_range(len(p_dy)):
        n = N[i]
        p_dyk = p_dy[i] + o_m[:, None] * n + o_k[None, :]
        p_wk = p_w[i] + o_k[:, None].to(tl.int64) * K + o_n[None, :]
        for i_k in range(0, n, BLOCK_K):
            if EVEN_N:
                b_dy = tl.load(p_dyk)
                b_w = tl.load(p_wk)
            else:
                b_dy = tl.load(p_dyk, mask=o_k[None, :] < n - i_k, other=0.0)
                b_w = tl.load(p_wk, mask=o_k[:, None] < n - i_k, other=0.0)
            acc = tl.dot(b_dy, b_w, acc, input_precision=PRECISION)
            p_dyk += BLOCK_K
            p_wk += BLOCK_K * K.to(tl.int64)
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (o_m[:, None] < M) & (o_n[None, :] < K)
    tl.store(p_dx + o_m[:, None] * K + o_n[None, :], acc.to(p_dx.dtype.element_ty), mask=m)


Tensors = Sequence[torch.Tensor]
Optionals = Sequence[torch.Tensor | None]


def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> Tensors:
    """q and k (M, heads · D) rotated by tables (1 or B, T, D), or back; M = B · T."""
    T, D = cos.shape[1:]
    if not q.numel():
        return q, k
    heads = (one.view(-1, T, one.shape[1] // D, D).transpose(1, 2) for one in (q, k))
    return [one.transpose(1, 2).view(q.shape[0], -1) for one in torch.ops.fastlora.rope(*heads, cos, sin, inverse)]


def lora_gemm(
    x: torch.Tensor,
    w: Tensors,
    s: torch.Tensor,
    b: Tensors,
    bias: Optionals,
    residual: torch.Tensor | None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """y_i (M, N_i) = x (M, K) W_iᵀ + s_i (M, R_i) B_iᵀ + bias_i + residual, accumulated in fp32.

    s holds the s_i side by side; a B_i of no columns is no adapter. The residual goes with a single projection, whose
    y takes the residual's dtype. With cos and sin (1 or B, T, D), M = B · T, the first two y, queries and keys, are
    rotated as heads of D.
    """
    (M, K), N = x.shape, tuple(one.shape[0] for one in w)
    ranks = tuple(one.shape[1] for one in b)
    if not any(ranks):
        return _gemm_aten(x, w, s, b, bias, residual, cos, sin)
    size = {"m": M, "n": sum(N), "k": K, "r": sum(ranks), "p": len(N)}
    D = 0 if cos is None else cos.shape[2]
    choice = choose("lora_gemm_rotary" if D else "lora_gemm", x, **size)
    if D and (D != next_power_of_2(D) or choice.tile.n % D):  # a tile rotates the heads that it holds whole
        choice, D = choose("lora_gemm", x, **size), 0
    if choice.method == "addmm":
        return _gemm_aten(x, w, s, b, bias, residual, cos, sin)
    if choice.method == "augmented":
        return _gemm_augmented(x, w, s, b, bias, residual, cos, sin)
    dtype = x.dtype if residual is None else residual.dtype
    y = [x.new_empty((M, n), dtype=dtype) for n in N]
    if len({one.dtype for one in b}) > 1:  # the kernel picks a projection's pointer at run time: one type for all
        b = [one.to(x.dtype) for one in b]
    has_bias = any(one is not None for one in bias)
    biases = [x.new_zeros(n) if has_bias and one is None else one for one, n in zip(bias, N, strict=True)]
    t = choice.tile
    tiles = [cdiv(n, t.n) for n in N]
    launch(
        _lora_gemm_kernel,
        (cdiv(M, t.m) * sum(tiles),),
        *(x, tuple(w), s, tuple(b), tuple(biases) if has_bias else tuple(w), residual),
        *((cos, sin) if D else (None, None)),
        *(tuple(y), M, K, N, sum(tiles), sum(tiles[:2]), cos.numel() // D if cos is not None and D else 1),
        choice=choice,
        RANKS=ranks,
        R=sum(ranks),
        HAS_BIAS=has_bias,
        HAS_RESIDUAL=residual is not None,
        EVEN_K=K % t.k == 0,
        D=D,
        PRECISION=dot_precision(x.dtype),
        BLOCK_M=t.m,
        BLOCK_N=t.n,
        BLOCK_K=t.k,
        BLOCK_R=block_r(max(ranks), t.r),
    )
    return y if D else _finish(y, None, cos, sin)


def lora_gemm_t(
    dy: Tensors, w: Tensors, ds: torch.Tensor, a: Tensors, masks: Optionals, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """dx (M, K) = Σ_i dy_i (M, N_i) W_i + Σ_g mask_g ∘ (ds_g (M, R_g) A_g), accumulated in fp32; dtype: dy's, or wider.

    Where a library makes the products one after the other, dtype is what they are added in.
    """
    if not a:
        return _gemm_t_aten(dy, w, ds, a, masks, dtype)
    M, K = dy[0].shape[0], w[0].shape[1]
    N = tuple(one.shape[1] for one in dy)
    ranks = tuple(one.shape[0] for one in a)
    masked = tuple(mask is not None for mask in masks)
    kernel = "lora_gemm_t_dropout" if any(masked) else "lora_gemm_t"
    choice = choose(kernel, dy[0], m=M, n=K, k=sum(N), r=sum(ranks), p=len(N))
    if choice.method != "triton":
        if any(masked) and dtype in (None, dy[0].dtype):
            return _gemm_t_masked(dy, w, ds, a, masks)
        return _gemm_t_aten(dy, w, ds, a, masks, dtype)
    dx = dy[0].new_empty(M, K, dtype=dtype)
    t = choice.tile
    launch(
        _lora_gemm_t_kernel,
        (cdiv(M, t.m) * cdiv(K, t.n),),
        *(tuple(dy), tuple(w), ds, tuple(a), tuple(masks), dx, M, K, cdiv(K, 8), N),
        choice=choice,
        RANKS=ranks,
        R=sum(ranks),
        MASKED=masked,
        EVEN_N=all(n % t.k == 0 for n in N),
        PRECISION=dot_precision(ds.dtype),
        BLOCK_M=t.m,
        BLOCK_N=t.n,
        BLOCK_K=t.k,
        BLOCK_R=block_r(max(ranks), t.r),
    )
    return dx


def _columns(s, ranks):
    return s.split_with_sizes(ranks, 1) if ranks else ()


def _finish(y, residual, cos, sin):
    """What the epilogue of the Triton kernel does."""
    if cos is not None:
        y[:2] = rotate(y[0], y[1], cos, sin, False)
    return y if residual is None else [residual + y[0]]


def _gemm_aten(x, w, s, b, bias, residual, cos=None, sin=None):
    y = []
    for wi, bi, si, bias_i in zip(w, b, _columns(s, [one.shape[1] for one in b]), bias, strict=True):
        # The small product first: what the wide one is added to is rounded at the size of the small one.
        if bi.shape[1]:
            bt = bi.to(x.dtype).t()
            low = si @ bt if bias_i is None else torch.addmm(bias_i, si, bt)
            y.append(low.addmm_(x, wi.t()))
        else:
            y.append(x @ wi.t() if bias_i is None else torch.addmm(bias_i, x, wi.t()))
    return _finish(y, residual, cos, sin)


def _gemm_augmented(x, w, s, b, bias, residual, cos, sin):
    y = []
    for wi, bi, si, bias_i in zip(w, b, _columns(s, [one.shape[1] for one in b]), bias, strict=True):
        wide, weight = torch.cat((x, si), 1), torch.cat((wi, bi.to(x.dtype)), 1)
        y.append(wide @ weight.t() if bias_i is None else torch.addmm(bias_i, wide, weight.t()))
    return _finish(y, residual, cos, sin)


def _gemm_t_aten(dy, w, ds, a, masks, dtype=None):
    dx = (dy[0] @ w[0]).to(dtype)
    low = zip(_columns(ds, [one.shape[0] for one in a]), a, masks, strict=True)
    rest = [(dyi, wi, None) for dyi, wi in zip(dy[1:], w[1:], strict=True)]
    for left, right, mask in (*rest, *low):
        if mask is None and dx.dtype == left.dtype:
            dx.addmm_(left, right.to(left.dtype))
        else:
            dx += apply_mask(left @ right.to(left.dtype), mask)
    return dx


def _gemm_t_masked(dy, w, ds, a, masks):
    """Σ mask ∘ (ds A) first, by one kernel, and the library's GEMMs on top of it.

    The tile is the largest of those tried that spills for no rank and dtype, on sm_80 and sm_90.
    """
    M, K = dy[0].shape[0], w[0].shape[1]
    ranks = tuple(one.shape[0] for one in a)
    dx = dy[0].new_empty(M, K)
    launch(
        _lora_low_kernel,
        (cdiv(M, 32), cdiv(K, 128)),
        *(ds, tuple(a), tuple(masks), dx, M, K, cdiv(K, 8)),
        RANKS=ranks,
        R=sum(ranks),
        MASKED=tuple(mask is not None for mask in masks),
        PRECISION=dot_precision(ds.dtype),
        BLOCK_M=32,
        BLOCK_N=128,
        BLOCK_R=block_r(max(ranks), 16),
        num_warps=8,
    )
    for left, right in zip(dy, w, strict=True):
        dx.addmm_(left, right)
    return dx


def _gemm_fake(x, w, s, b, bias, residual, cos=None, sin=None):
    dtype = x.dtype if residual is None else residual.dtype
    return [x.new_empty((x.shape[0], one.shape[0]), dtype=dtype) for one in w]


register(
    "lora_gemm(Tensor x, Tensor[] w, Tensor s, Tensor[] b, Tensor?[] bias, Tensor? residual, Tensor? cos=None,"
    " Tensor? sin=None) -> Tensor[]",
    triton=lora_gemm,
    aten=_gemm_aten,
    fake=_gemm_fake,
    flops=_flops.lora_gemm,
)
register(
    "lora_gemm_t(Tensor[] dy, Tensor[] w, Tensor ds, Tensor[] a, Tensor?[] masks, ScalarType? dtype=None) -> Tensor",
    triton=lora_gemm_t,
    aten=_gemm_t_aten,
    fake=lambda dy, w, ds, a, masks, dtype=None: dy[0].new_empty(dy[0].shape[0], w[0].shape[1], dtype=dtype),
    flops=_flops.lora_gemm_t,
)
