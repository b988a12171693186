"""The three matrix products of a LoRA linear layer; forward and backward are the same three, transposed.

    lora_project   s = scaling · x Aᵀ            (M, K)·(R, K) → (M, R)     also ds = scaling · dy B
    lora_gemm      y = x Wᵀ + s Bᵀ + bias        one pass                   also dx = dy W + ds A
    lora_reduce    g = sᵀ x                      (M, R)·(M, K) → (R, K)     dA = dsᵀ x and dBᵀ = sᵀ dy

W, A and B are read through their strides, so that the backward passes transposed views.
"""

from __future__ import annotations

import torch

from ._library import register
from ._tiles import tile
from ._tl import cdiv, dot_precision, launch, next_power_of_2, swizzle, tl, triton


@triton.jit
def _lora_gemm_kernel(
    p_x, p_w, p_s, p_b, p_bias, p_y, M, N, K,
    stride_wn, stride_wk, stride_bn, stride_br,
    R: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_m, i_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    # Rows and columns past the edge read valid memory and are not stored.
    o_m = ((i_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M).to(tl.int64)
    o_n = ((i_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N).to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_r in tl.range(0, R, BLOCK_R, num_stages=1):
        o_r = i_r + tl.arange(0, BLOCK_R)
        b_s = tl.load(p_s + o_m[:, None] * R + o_r[None, :], mask=o_r[None, :] < R, other=0.0)
        b_b = tl.load(
            p_b + o_n[None, :] * stride_bn + o_r[:, None].to(tl.int64) * stride_br, mask=o_r[:, None] < R, other=0.0
        )
        acc = tl.dot(b_s, b_b, acc, input_precision=PRECISION)
    o_k = tl.arange(0, BLOCK_K)
    p_xk = p_x + o_m[:, None] * K + o_k[None, :]
    p_wk = p_w + o_n[None, :] * stride_wn + o_k[:, None].to(tl.int64) * stride_wk
    for i_k in range(0, K, BLOCK_K):
        if EVEN_K:
            b_x = tl.load(p_xk)
            b_w = tl.load(p_wk)
        else:
            b_x = tl.load(p_xk, mask=o_k[None, :] < K - i_k, other=0.0)
            b_w = tl.load(p_wk, mask=o_k[:, None] < K - i_k, other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
        p_xk += BLOCK_K
        p_wk += BLOCK_K * stride_wk
    if HAS_BIAS:
        acc += tl.load(p_bias + o_n).to(tl.float32)[None, :]
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (o_m[:, None] < M) & (o_n[None, :] < N)
    tl.store(p_y + o_m[:, None] * N + o_n[None, :], acc.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def _lora_project_kernel(
    p_x, p_a, p_s, M, K, R, scaling, stride_ar, stride_ak,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    o_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_r = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_r = o_m[:, None] < M, o_r[None, :] < R
    p_xk = p_x + o_m[:, None] * K + o_k[None, :]
    p_ak = p_a + o_r[None, :] * stride_ar + o_k[:, None].to(tl.int64) * stride_ak
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for i_k in range(0, K, BLOCK_K):
        if EVEN_K:
            b_x = tl.load(p_xk, mask=m_m, other=0.0)
            b_a = tl.load(p_ak, mask=m_r, other=0.0)
        else:
            b_x = tl.load(p_xk, mask=m_m & (o_k[None, :] < K - i_k), other=0.0)
            b_a = tl.load(p_ak, mask=m_r & (o_k[:, None] < K - i_k), other=0.0)
        acc = tl.dot(b_x, b_a, acc, input_precision=PRECISION)
        p_xk += BLOCK_K
        p_ak += BLOCK_K * stride_ak
    b_s = (acc * scaling).to(p_s.dtype.element_ty)
    tl.store(p_s + o_m[:, None] * R + o_r[None, :], b_s, mask=m_m & m_r)


@triton.jit
def _lora_reduce_kernel(
    p_s, p_x, p_partial, M, R, K, rows,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_split = tl.program_id(2).to(tl.int64)
    m_k, m_r = o_k[None, :] < K, o_r < R
    acc = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    first = i_split * rows
    for i_m in range(0, rows, BLOCK_M):
        o_m = first + i_m + tl.arange(0, BLOCK_M)
        m_m = (o_m < M) & (o_m < first + rows)
        b_s = tl.load(p_s + o_m[None, :] * R + o_r[:, None], mask=m_m[None, :] & m_r[:, None], other=0.0)
        b_x = tl.load(p_x + o_m[:, None] * K + o_k[None, :], mask=m_m[:, None] & m_k, other=0.0)
        acc = tl.dot(b_s, b_x, acc, input_precision=PRECISION)
    p_out = p_partial + (i_split * R + o_r[:, None]) * K + o_k[None, :]
    tl.store(p_out, acc, mask=m_r[:, None] & m_k)


def _block_r(R: int, most: int) -> int:
    return min(most, max(16, next_power_of_2(R)))


def lora_gemm(
    x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """y (M, N) = x (M, K) · w (N, K)ᵀ + s (M, R) · b (N, R)ᵀ + bias (N,) in one pass, accumulated in fp32."""
    (M, K), N, R = x.shape, w.shape[0], s.shape[1]
    y = x.new_empty(M, N)
    t = tile("lora_gemm", x)
    launch(
        _lora_gemm_kernel,
        (cdiv(M, t.m) * cdiv(N, t.n),),
        *(x, w, s, b, bias, y, M, N, K, *w.stride(), *b.stride()),
        R=R,
        HAS_BIAS=bias is not None,
        EVEN_K=K % t.k == 0,
        PRECISION=dot_precision(x.dtype),
        BLOCK_M=t.m,
        BLOCK_N=t.n,
        BLOCK_K=t.k,
        BLOCK_R=_block_r(R, 64),
        num_warps=t.warps,
        num_stages=t.stages,
    )
    return y


def lora_project(x: torch.Tensor, a: torch.Tensor, scaling: float) -> torch.Tensor:
    """s (M, R) = scaling · x (M, K) · a (R, K)ᵀ, accumulated in fp32, in the dtype of x."""
    (M, K), R = x.shape, a.shape[0]
    s = x.new_empty(M, R)
    t = tile("lora_project", x)
    block_r = _block_r(R, 64)
    launch(
        _lora_project_kernel,
        (cdiv(M, t.m), cdiv(R, block_r)),
        *(x, a, s, M, K, R, scaling, *a.stride()),
        EVEN_K=K % t.k == 0,
        PRECISION=dot_precision(x.dtype),
        BLOCK_M=t.m,
        BLOCK_K=t.k,
        BLOCK_R=block_r,
        num_warps=t.warps,
        num_stages=t.stages,
    )
    return s


def lora_reduce(s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """g (R, K) fp32 = s (M, R)ᵀ · x (M, K): fp32 partial sums over fixed runs of rows, added in a fixed order."""
    (M, R), K = s.shape, x.shape[1]
    t = tile("lora_reduce", x)
    block_r = _block_r(R, 64)
    tiles = cdiv(K, t.n) * cdiv(R, block_r)
    splits = max(1, min(cdiv(216, tiles), cdiv(M, 512)))  # about two programs for each of an A100's 108 SMs
    rows = cdiv(cdiv(M, splits), t.m) * t.m
    partials = torch.empty((splits, R, K), dtype=torch.float32, device=x.device)
    launch(
        _lora_reduce_kernel,
        (cdiv(K, t.n), cdiv(R, block_r), splits),
        *(s, x, partials, M, R, K, rows),
        PRECISION=dot_precision(x.dtype),
        BLOCK_M=t.m,
        BLOCK_K=t.n,
        BLOCK_R=block_r,
        num_warps=t.warps,
        num_stages=t.stages,
    )
    return partials.sum(0) if splits > 1 else partials[0].clone()


def _gemm_aten(x, w, s, b, bias):
    y = x @ w.t() if bias is None else torch.addmm(bias, x, w.t())
    return y.addmm_(s, b.t())


def _project_aten(x, a, scaling):
    return torch.addmm(x.new_zeros(1), x, a.t(), beta=0, alpha=scaling)


def _reduce_aten(s, x):
    return (s.t() @ x).float()


register(
    "lora_gemm(Tensor x, Tensor w, Tensor s, Tensor b, Tensor? bias) -> Tensor",
    triton=lora_gemm,
    aten=_gemm_aten,
    fake=lambda x, w, s, b, bias: x.new_empty(x.shape[0], w.shape[0]),
)
register(
    "lora_project(Tensor x, Tensor a, float scaling) -> Tensor",
    triton=lora_project,
    aten=_project_aten,
    fake=lambda x, a, scaling: x.new_empty(x.shape[0], a.shape[0]),
)
register(
    "lora_reduce(Tensor s, Tensor x) -> Tensor",
    triton=lora_reduce,
    aten=_reduce_aten,
    fake=lambda s, x: x.new_empty(s.shape[1], x.shape[1], dtype=torch.float32),
)
