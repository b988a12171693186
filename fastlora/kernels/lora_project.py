"""The skinny products of LoRA: s = scale · (mask ∘ f(x)) Aᵀ for several adapters over one x, and ds = scale · dy B.

f is nothing, RMSNorm or SwiGLU: while the row is at hand its projection on A costs no pass over memory of its own.
A and B may be wider than x (fp32 masters): they are cast on load.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import _flops
from ._library import register
from ._tiles import choose
from ._tl import cdiv, dot_precision, launch, next_power_of_2, normalised, silu_mul, tl, triton
from .dropout import apply_mask, keep

_NONE, _RMS_NORM, _SWIGLU = 0, 1, 2


@triton.jit
def _dot_branches(
    acc, b_x, b_a, o_m, m_m, i_k, o_r, K8, p_mask,
    RANKS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + Σ_g (mask_g ∘ b_x) A_gᵀ, the A_gᵀ side by side in b_a."""
    first, plain = 0, 0
    for g in tl.static_range(len(RANKS)):
        if MASKED[g]:
            m_g = ((o_r >= first) & (o_r < first + RANKS[g]))[None, :]
            b_kept = tl.where(keep(p_mask[g], o_m, m_m, i_k, K8, b_x.shape[1]), b_x, 0.0).to(b_x.dtype)
            acc = tl.dot(b_kept, tl.where(m_g, b_a, 0.0).to(b_x.dtype), acc, input_precision=PRECISION)
            b_a = tl.where(m_g, 0.0, b_a).to(b_x.dtype)
        else:
            plain += 1
        first += RANKS[g]
    if plain > 0:
        acc = tl.dot(b_x, b_a, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _lora_project_kernel(
    p_x, p_up, p_weight, p_n, p_rstd, p_s, p_a, p_mask, scale, M, K, K8, eps,
    R: tl.constexpr, RANKS: tl.constexpr, MASKED: tl.constexpr, PROLOGUE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(1)
    o_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    m_m = o_m < M
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    if PROLOGUE == 1:
        b_square = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        for i_k in range(0, K, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            m = m_m[:, None] & (o_k < K)[None, :]
            b_x = tl.load(p_x + o_m[:, None] * K + o_k[None, :], mask=m, other=0.0).to(tl.float32)
            b_square += b_x * b_x
        b_rstd = tl.math.rsqrt(tl.sum(b_square, axis=1) / K + eps)
        if i_r == 0:
            tl.store(p_rstd + o_m, b_rstd, mask=m_m)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        m = m_m[:, None] & m_k[None, :]
        b_x = tl.load(p_x + o_m[:, None] * K + o_k[None, :], mask=m, other=0.0)
        if PROLOGUE == 1:
            b_w = tl.load(p_weight + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
            b_x = normalised(b_x, b_rstd, b_w).to(p_n.dtype.element_ty)
        if PROLOGUE == 2:
            b_x = silu_mul(b_x, tl.load(p_up + o_m[:, None] * K + o_k[None, :], mask=m, other=0.0))
        if PROLOGUE != 0:
            if i_r == 0:
                tl.store(p_n + o_m[:, None] * K + o_k[None, :], b_x, mask=m)
        if R > 0:
            m_a = (o_r < R)[None, :] & m_k[:, None]
            b_a = tl.load(p_a + o_r[None, :].to(tl.int64) * K + o_k[:, None], mask=m_a, other=0.0).to(b_x.dtype)
            acc = _dot_branches(acc, b_x, b_a, o_m, m_m, i_k, o_r, K8, p_mask, RANKS, MASKED, PRECISION)
    if R > 0:
        b_scale = tl.zeros([BLOCK_R], dtype=tl.float32)
        first = 0
        for g in tl.static_range(len(RANKS)):
            b_scale = tl.where(o_r >= first, scale[g], b_scale)
            first += RANKS[g]
        b_s = (acc * b_scale[None, :]).to(p_s.dtype.element_ty)
        tl.store(p_s + o_m[:, None] * R + o_r[None, :], b_s, mask=m_m[:, None] & (o_r < R)[None, :])


@triton.jit
def _lora_project_t_kernel(
    p_dy, p_b, p_ds, scale, M, N, RANKS: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(1)
    o_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    m_m = o_m[:, None] < M
    first_block, first = 0, 0
    for i in tl.static_range(len(RANKS)):
        blocks = (RANKS[i] + BLOCK_R - 1) // BLOCK_R
        if (i_r >= first_block) & (i_r < first_block + blocks):
            o_r = (i_r - first_block) * BLOCK_R + tl.arange(0, BLOCK_R)
            m_r = o_r[None, :] < RANKS[i]
            acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
            for i_n in range(0, N[i], BLOCK_N):
                o_n = i_n + tl.arange(0, BLOCK_N)
                m_n = o_n < N[i]
                b_dy = tl.load(p_dy[i] + o_m[:, None] * N[i] + o_n[None, :], mask=m_m & m_n[None, :], other=0.0)
                p = p_b[i] + o_n[:, None].to(tl.int64) * RANKS[i] + o_r[None, :]
                b_b = tl.load(p, mask=m_n[:, None] & m_r, other=0.0).to(b_dy.dtype)
                acc = tl.dot(b_dy, b_b, acc, input_precision=PRECISION)
            b_ds = (acc * scale[i]).to(p_ds.dtype.element_ty)
            tl.store(p_ds + o_m[:, None] * R + first + o_r[None, :], b_ds, mask=m_m & m_r)
        first_block += blocks
        first += RANKS[i]


def block_r(R: int, most: int) -> int:
    """Ranks that one tl.dot takes: at least its 16, at most what the tile leaves registers for."""
    return min(most, max(16, next_power_of_2(R)))


def _choose(name, x, a, masks):
    """Before anything is made: where the composition is the choice, it makes its own."""
    dropout = any(mask is not None for mask in masks)
    R = sum(one.shape[0] for one in a)
    return choose(f"{name}_dropout" if dropout else name, x, m=x.shape[0], k=x.shape[1], r=R, p=len(a))


def _project(choice, prologue, x, up, weight, eps, n, rstd, a, scale, masks):
    M, K = x.shape
    ranks = tuple(one.shape[0] for one in a)
    R = sum(ranks)
    s = n.new_empty(M, R)
    masked = tuple(mask is not None for mask in masks)
    t = choice.tile
    br = block_r(R, t.r)
    # Several A are read as one: stacking them is one small launch, reading them apart would crowd shared memory.
    stacked = torch.cat(list(a)) if len(a) > 1 else a[0] if a else None
    launch(
        _lora_project_kernel,
        (cdiv(M, t.m), max(1, cdiv(R, br))),
        *(x, up, weight, n, rstd, s, stacked, tuple(masks), tuple(scale), M, K, cdiv(K, 8), eps),
        choice=choice,
        R=R,
        RANKS=ranks,
        MASKED=masked,
        PROLOGUE=prologue,
        PRECISION=dot_precision(n.dtype),
        BLOCK_M=t.m,
        BLOCK_K=t.k,
        BLOCK_R=br,
    )
    return s


Tensors = Sequence[torch.Tensor]
Masks = Sequence[torch.Tensor | None]


def lora_project(x: torch.Tensor, a: Tensors, scale: Sequence[float], masks: Masks) -> torch.Tensor:
    """s (M, ΣR): s_g = scale_g · (mask_g ∘ x) A_gᵀ, accumulated in fp32, in the dtype of x."""
    choice = _choose("lora_project", x, a, masks)
    return _project(choice, _NONE, x, None, None, 0.0, x, None, a, scale, masks)


def rms_norm_project(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    a: Tensors,
    scale: Sequence[float],
    masks: Masks,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """n (M, K) = rms_norm(x) in dtype, rstd (M,) fp32, and s of n."""
    choice = _choose("rms_norm_project", x, a, masks)
    n = torch.empty_like(x, dtype=dtype)
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return n, rstd, _project(choice, _RMS_NORM, x, None, weight, eps, n, rstd, a, scale, masks)


def swiglu_project(
    gate: torch.Tensor, up: torch.Tensor, a: Tensors, scale: Sequence[float], masks: Masks
) -> tuple[torch.Tensor, torch.Tensor]:
    """h (M, F) = silu(gate) · up, and s of h."""
    choice = _choose("swiglu_project", gate, a, masks)
    h = torch.empty_like(gate)
    return h, _project(choice, _SWIGLU, gate, up, None, 0.0, h, None, a, scale, masks)


def lora_project_t(dy: Tensors, b: Tensors, scale: Sequence[float]) -> torch.Tensor:
    """ds (M, ΣR): ds_i = scale_i · dy_i (M, N_i) B_i (N_i, R_i), accumulated in fp32, in the dtype of dy."""
    M = dy[0].shape[0]
    ranks = tuple(one.shape[1] for one in b)
    R = sum(ranks)
    ds = dy[0].new_empty(M, R)
    choice = choose("lora_project_t", dy[0], m=M, k=sum(one.shape[1] for one in dy), r=R, p=len(ranks))
    t = choice.tile
    br = block_r(max(ranks, default=0), t.r)
    launch(
        _lora_project_t_kernel,
        (cdiv(M, t.m), sum(cdiv(rank, br) for rank in ranks)),
        *(tuple(dy), tuple(b), ds, tuple(scale), M, tuple(one.shape[1] for one in dy)),
        choice=choice,
        RANKS=ranks,
        R=R,
        PRECISION=dot_precision(ds.dtype),
        BLOCK_M=t.m,
        BLOCK_N=t.k,
        BLOCK_R=br,
    )
    return ds


def _product(x, a, scale):
    """scale · x Aᵀ with one rounding."""
    return torch.addmm(x.new_empty(1), x, a.t().to(x.dtype), beta=0, alpha=scale)


def _project_aten(x, a, scale, masks):
    if not a:
        return x.new_empty(x.shape[0], 0)
    if len(set(scale)) == 1 and not any(mask is not None for mask in masks):
        return _product(x, torch.cat(list(a)) if len(a) > 1 else a[0], scale[0])
    kept = [apply_mask(x, mask) for mask in masks]
    return torch.cat([_product(*one) for one in zip(kept, a, scale, strict=True)], 1)


def _rms_norm_project_aten(x, weight, eps, a, scale, masks, dtype):
    y, rstd = torch.ops.fastlora.rms_norm_fwd(x, weight, eps)
    n = y.to(dtype)
    return n, rstd, _project_aten(n, a, scale, masks)


def _swiglu_project_aten(gate, up, a, scale, masks):
    h = torch.ops.fastlora.swiglu_fwd(gate, up)
    return h, _project_aten(h, a, scale, masks)


def _project_t_aten(dy, b, scale):
    parts = [_product(one, half.t(), factor) for one, half, factor in zip(dy, b, scale, strict=True) if half.shape[1]]
    return torch.cat(parts, 1) if len(parts) != 1 else parts[0]


def _rank(a: Tensors, dim: int) -> int:
    return sum(one.shape[dim] for one in a)


def _swiglu_project_fake(gate, up, a, scale, masks):
    return torch.empty_like(gate), gate.new_empty(gate.shape[0], _rank(a, 0))


def _rms_norm_project_fake(x, weight, eps, a, scale, masks, dtype):
    M = x.shape[0]
    rstd = x.new_empty(M, dtype=torch.float32)
    return torch.empty_like(x, dtype=dtype), rstd, x.new_empty(M, _rank(a, 0), dtype=dtype)


register(
    "lora_project(Tensor x, Tensor[] a, float[] scale, Tensor?[] masks) -> Tensor",
    triton=lora_project,
    aten=_project_aten,
    fake=lambda x, a, scale, masks: x.new_empty(x.shape[0], _rank(a, 0)),
    flops=_flops.lora_project,
)
register(
    "rms_norm_project(Tensor x, Tensor weight, float eps, Tensor[] a, float[] scale, Tensor?[] masks, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    triton=rms_norm_project,
    aten=_rms_norm_project_aten,
    fake=_rms_norm_project_fake,
    flops=_flops.rms_norm_project,
)
register(
    "swiglu_project(Tensor gate, Tensor up, Tensor[] a, float[] scale, Tensor?[] masks) -> (Tensor, Tensor)",
    triton=swiglu_project,
    aten=_swiglu_project_aten,
    fake=_swiglu_project_fake,
    flops=_flops.swiglu_project,
)
register(
    "lora_project_t(Tensor[] dy, Tensor[] b, float[] scale) -> Tensor",
    triton=lora_project_t,
    aten=_project_t_aten,
    fake=lambda dy, b, scale: dy[0].new_empty(dy[0].shape[0], _rank(b, 1)),
    flops=_flops.lora_project_t,
)
