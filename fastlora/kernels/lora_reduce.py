"""The reductions over tokens that make the adapters' gradients: fp32 partial sums, added in a fixed order.

lora_reduce          dA_g = ds_gᵀ (mask_g ∘ x)             (R_g, K), one after the other in one flat fp32 tensor
lora_reduce_t        dB_i = dy_iᵀ s_i                      (N_i, R_i), likewise
rms_norm_bwd_reduce  the norm's backward, and dA of what it normalised: n is remade while x is at hand, and not written
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import _flops
from ._library import register
from ._tiles import choose
from ._tl import cdiv, dot_precision, launch, normalised, tl, triton
from .dropout import apply_mask, keep
from .lora_project import block_r
from .rms_norm import rms_norm_bwd


@triton.jit
def dot_kept(
    acc, b_ds, b_x, o_m, m_m, i_k, o_r, K8, p_mask,
    RANKS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + Σ_g ds_gᵀ (mask_g ∘ b_x), the ds_gᵀ one below the other in b_ds."""
    first, plain = 0, 0
    for g in tl.static_range(len(RANKS)):
        if MASKED[g]:
            m_g = (o_r >= first) & (o_r < first + RANKS[g])
            b_g = tl.where(m_g[:, None], b_ds, 0.0).to(b_ds.dtype)
            b_kept = tl.where(keep(p_mask[g], o_m, m_m, i_k, K8, b_x.shape[1]), b_x, 0.0).to(b_x.dtype)
            acc = tl.dot(b_g, b_kept, acc, input_precision=PRECISION)
            b_ds = tl.where(m_g[:, None], 0.0, b_ds).to(b_ds.dtype)
        else:
            plain += 1
        first += RANKS[g]
    if plain > 0:
        acc = tl.dot(b_ds, b_x, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _lora_reduce_kernel(
    p_ds, p_x, p_weight, p_rstd, p_mask, p_partial, M, K, K8, rows,
    RANKS: tl.constexpr, R: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_k = tl.program_id(0) * BLOCK_K
    o_k = i_k + tl.arange(0, BLOCK_K)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_split = tl.program_id(2).to(tl.int64)
    m_k, m_r = o_k < K, o_r < R
    if p_rstd is not None:
        b_w = tl.load(p_weight + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
    acc = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    for i_m in range(0, rows, BLOCK_M):
        o_m = i_split * rows + i_m + tl.arange(0, BLOCK_M)
        m_m = (o_m < M) & (i_m + tl.arange(0, BLOCK_M) < rows)
        b_ds = tl.load(p_ds + o_m[None, :] * R + o_r[:, None], mask=m_m[None, :] & m_r[:, None], other=0.0)
        b_x = tl.load(p_x + o_m[:, None] * K + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        if p_rstd is not None:
            b_rstd = tl.load(p_rstd + o_m, mask=m_m, other=0.0)
            b_x = normalised(b_x, b_rstd, b_w).to(b_ds.dtype)
        acc = dot_kept(acc, b_ds, b_x, o_m, m_m, i_k, o_r, K8, p_mask, RANKS, MASKED, PRECISION)
    p = p_partial + (i_split * R + o_r[:, None]) * K + o_k[None, :]
    tl.store(p, acc, mask=m_r[:, None] & m_k[None, :])


@triton.jit
def _lora_reduce_t_kernel(
    p_s, p_dy, p_partial, M, N, total, rows, RANKS: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_tile = tl.program_id(0)
    i_split = tl.program_id(1).to(tl.int64)
    start, column, offset = 0, 0, 0
    for i in tl.static_range(len(RANKS)):
        blocks_r = (RANKS[i] + BLOCK_R - 1) // BLOCK_R
        tiles = tl.cdiv(N[i], BLOCK_N) * blocks_r
        if (i_tile >= start) & (i_tile < start + tiles):
            o_n = (i_tile - start) // blocks_r * BLOCK_N + tl.arange(0, BLOCK_N)
            o_r = (i_tile - start) % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
            m_n, m_r = o_n < N[i], o_r < RANKS[i]
            # Accumulated as (R, N), which replicates no fragment, and stored transposed.
            acc = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
            for i_m in range(0, rows, BLOCK_M):
                o_m = i_split * rows + i_m + tl.arange(0, BLOCK_M)
                m_m = (o_m < M) & (i_m + tl.arange(0, BLOCK_M) < rows)
                p = p_s + o_m[None, :] * R + column + o_r[:, None]
                b_s = tl.load(p, mask=m_m[None, :] & m_r[:, None], other=0.0)
                p = p_dy[i] + o_m[:, None] * N[i] + o_n[None, :]
                b_dy = tl.load(p, mask=m_m[:, None] & m_n[None, :], other=0.0)
                acc = tl.dot(b_s, b_dy, acc, input_precision=PRECISION)
            p = p_partial + i_split * total + offset + o_n[None, :] * RANKS[i] + o_r[:, None]
            tl.store(p, acc, mask=m_r[:, None] & m_n[None, :])
        start += tiles
        column += RANKS[i]
        offset += N[i] * RANKS[i]


def row_splits(M: int, tiles: int, block_m: int) -> tuple[int, int]:
    """How many runs of rows, and rows in each: about two programs for each of an A100's 108 SMs, 512 rows or more."""
    splits = max(1, min(cdiv(216, max(1, tiles)), cdiv(M, 512)))
    rows = cdiv(cdiv(M, splits), block_m) * block_m
    return max(1, cdiv(M, max(1, rows))), rows


Tensors = Sequence[torch.Tensor]
Masks = Sequence[torch.Tensor | None]


def _reduce(name, ds, x, weight, rstd, ranks, masks):
    (M, K), R = x.shape, ds.shape[1]
    masked = tuple(mask is not None for mask in masks)
    choice = choose(name + "_dropout" if any(masked) else name, ds, m=M, n=K, r=R, p=len(ranks))
    t = choice.tile
    br = block_r(R, t.r)
    splits, rows = row_splits(M, cdiv(K, t.n) * cdiv(R, br), t.m)
    partials = torch.empty((splits, R * K), dtype=torch.float32, device=x.device)
    launch(
        _lora_reduce_kernel,
        (cdiv(K, t.n), cdiv(R, br), splits),
        *(ds, x, weight, rstd, tuple(masks), partials, M, K, cdiv(K, 8), rows),
        choice=choice,
        RANKS=tuple(ranks),
        R=R,
        MASKED=masked,
        PRECISION=dot_precision(ds.dtype),
        BLOCK_M=t.m,
        BLOCK_K=t.n,
        BLOCK_R=br,
    )
    return partials.sum(0)


def lora_reduce(ds: torch.Tensor, x: torch.Tensor, ranks: Sequence[int], masks: Masks) -> torch.Tensor:
    """dA_g (R_g, K) = ds_g (M, R_g)ᵀ (mask_g ∘ x (M, K)) for every adapter, flat, fp32."""
    return _reduce("lora_reduce", ds, x, None, None, ranks, masks)


def rms_norm_bwd_reduce(
    dn: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    dresidual: torch.Tensor | None,
    need_dw: bool,
    ds: torch.Tensor,
    ranks: Sequence[int],
    masks: Masks,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx and dweight of rms_norm_bwd, and lora_reduce(ds, n) of the n = rms_norm(x) that it remakes."""
    # First what may be handed to the composition, so that nothing is computed for it twice.
    da = _reduce("rms_norm_reduce", ds, x, weight, rstd, ranks, masks)
    dx, dw, _ = rms_norm_bwd(dn, x, weight, rstd, dresidual, need_dw, False)
    return dx, dw, da


def lora_reduce_t(s: torch.Tensor, dy: Tensors, ranks: Sequence[int]) -> torch.Tensor:
    """dB_i (N_i, R_i) = dy_i (M, N_i)ᵀ s_i (M, R_i) for every projection, flat, fp32."""
    M, R = s.shape
    N = tuple(one.shape[1] for one in dy)
    choice = choose("lora_reduce_t", s, m=M, n=sum(N), r=R, p=len(ranks))
    t = choice.tile
    br = block_r(max(ranks, default=0), t.r)
    tiles = sum(cdiv(n, t.n) * cdiv(rank, br) for n, rank in zip(N, ranks, strict=True))
    total = sum(n * rank for n, rank in zip(N, ranks, strict=True))
    splits, rows = row_splits(M, tiles, t.m)
    partials = torch.empty((splits, total), dtype=torch.float32, device=s.device)
    launch(
        _lora_reduce_t_kernel,
        (tiles, splits),
        *(s, tuple(dy), partials, M, N, total, rows),
        choice=choice,
        RANKS=tuple(ranks),
        R=R,
        PRECISION=dot_precision(s.dtype),
        BLOCK_M=t.m,
        BLOCK_N=t.n,
        BLOCK_R=br,
    )
    return partials.sum(0)


def _flat(parts):
    parts = [part.reshape(-1) for part in parts]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _tall_product(narrow, wide, mask):
    return narrow.t() @ apply_mask(wide, mask).float()


def _product(narrow, wide, mask=None):
    """narrowᵀ (mask ∘ wide), summed in fp32 whatever the dtype."""
    if wide.dtype == torch.float32:
        return narrow.t() @ apply_mask(wide, mask)
    return torch.ops.fastlora.tall_product(narrow.float().contiguous(), wide, mask)


def _reduce_aten(ds, x, ranks, masks):
    if not any(mask is not None for mask in masks):
        return _product(ds, x).flatten()
    return _flat([_product(dsg, x, mask) for dsg, mask in zip(ds.split(ranks, 1), masks, strict=True)])


def _rms_norm_bwd_reduce_aten(dn, x, weight, rstd, dresidual, need_dw, ds, ranks, masks):
    # Here n is written: on a CPU it stays in the cache of the kernel that has just read x.
    dx, dw, n = torch.ops.fastlora.rms_norm_bwd(dn, x, weight, rstd, dresidual, need_dw, True)
    return dx, dw, torch.ops.fastlora.lora_reduce(ds, n.to(ds.dtype), ranks, masks)


def _rms_norm_bwd_reduce_fake(dn, x, weight, rstd, dresidual, need_dw, ds, ranks, masks):
    da = x.new_empty(ds.shape[1] * x.shape[1], dtype=torch.float32)
    return torch.empty_like(x), weight.new_empty(weight.shape if need_dw else 0), da


def _reduce_t_one(s, dy):
    # In fp32 as autograd has it, to the bit.
    return dy.t() @ s if s.dtype == torch.float32 else _product(s, dy).t()


def _reduce_t_aten(s, dy, ranks):
    return _flat([_reduce_t_one(si, dyi) for dyi, si in zip(dy, s.split(ranks, 1), strict=True) if si.shape[1]])


def _reduce_t_fake(s, dy, ranks):
    total = sum(one.shape[1] * rank for one, rank in zip(dy, ranks, strict=True))
    return s.new_empty(total, dtype=torch.float32)


register(
    "lora_reduce(Tensor ds, Tensor x, SymInt[] ranks, Tensor?[] masks) -> Tensor",
    triton=lora_reduce,
    aten=_reduce_aten,
    fake=lambda ds, x, ranks, masks: x.new_empty(ds.shape[1] * x.shape[1], dtype=torch.float32),
    flops=_flops.lora_reduce,
)
register(
    "lora_reduce_t(Tensor s, Tensor[] dy, SymInt[] ranks) -> Tensor",
    triton=lora_reduce_t,
    aten=_reduce_t_aten,
    fake=_reduce_t_fake,
    flops=_flops.lora_reduce_t,
)
register(
    "rms_norm_bwd_reduce(Tensor dn, Tensor x, Tensor weight, Tensor rstd, Tensor? dresidual, bool need_dw, Tensor ds,"
    " SymInt[] ranks, Tensor?[] masks) -> (Tensor, Tensor, Tensor)",
    triton=rms_norm_bwd_reduce,
    aten=_rms_norm_bwd_reduce_aten,
    fake=_rms_norm_bwd_reduce_fake,
    flops=_flops.rms_norm_bwd_reduce,
)
register(
    "tall_product(Tensor narrow, Tensor wide, Tensor? mask) -> Tensor",
    triton=_tall_product,
    aten=_tall_product,
    fake=lambda narrow, wide, mask: narrow.new_empty(narrow.shape[1], wide.shape[1]),
    flops=_flops.lora_reduce,
)
