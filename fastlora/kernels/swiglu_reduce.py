"""SwiGLU's backward with every reduction over tokens that its tensors take part in.

A program owns some columns of the ffn and walks down the tokens. What it reads and makes on the way, h = silu(gate) ·
up, dgate and dup, meets ds of down_proj and s of gate_proj and up_proj there: h is not written, and dgate and dup are
not read again for dB.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import _flops
from ._library import register
from ._tiles import choose
from ._tl import cdiv, dot_precision, launch, silu_mul, tl, triton
from .lora_project import block_r
from .lora_reduce import dot_kept, row_splits
from .swiglu import silu_mul_bwd

_ROWS = 512


@triton.jit
def _swiglu_bwd_reduce_kernel(
    p_dh, p_gate, p_up, p_ds, p_s, p_mask, p_dgate, p_dup, p_partial, M, F, F8, rows, total,
    RANKS: tl.constexpr, MASKED: tl.constexpr, R: tl.constexpr, R_GATE: tl.constexpr, R_UP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0) * BLOCK_N
    o_n = i_n + tl.arange(0, BLOCK_N)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_split = tl.program_id(2).to(tl.int64)
    m_n = o_n < F
    acc_a = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    acc_gate = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    acc_up = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    for i_m in range(0, rows, BLOCK_M):
        o_m = i_split * rows + i_m + tl.arange(0, BLOCK_M)
        m_m = (o_m < M) & (i_m + tl.arange(0, BLOCK_M) < rows)
        o, m = o_m[:, None] * F + o_n[None, :], m_m[:, None] & m_n[None, :]
        b_dh = tl.load(p_dh + o, mask=m, other=0.0)
        b_gate = tl.load(p_gate + o, mask=m, other=0.0)
        b_up = tl.load(p_up + o, mask=m, other=0.0)
        b_dgate, b_dup = silu_mul_bwd(b_dh, b_gate, b_up)
        if tl.program_id(1) == 0:
            tl.store(p_dgate + o, b_dgate, mask=m)
            tl.store(p_dup + o, b_dup, mask=m)
        if R > 0:
            b_ds = tl.load(p_ds + o_m[None, :] * R + o_r[:, None], mask=m_m[None, :] & (o_r < R)[:, None], other=0.0)
            b_h = silu_mul(b_gate, b_up)
            acc_a = dot_kept(acc_a, b_ds, b_h, o_m, m_m, i_n, o_r, F8, p_mask, RANKS, MASKED, PRECISION)
        p_sm = p_s + o_m[None, :] * (R_GATE + R_UP) + o_r[:, None]
        if R_GATE > 0:
            b_s = tl.load(p_sm, mask=m_m[None, :] & (o_r < R_GATE)[:, None], other=0.0)
            acc_gate = tl.dot(b_s, b_dgate, acc_gate, input_precision=PRECISION)
        if R_UP > 0:
            b_s = tl.load(p_sm + R_GATE, mask=m_m[None, :] & (o_r < R_UP)[:, None], other=0.0)
            acc_up = tl.dot(b_s, b_dup, acc_up, input_precision=PRECISION)
    p_partial += i_split * total
    o_r = o_r[:, None].to(tl.int64)
    if R > 0:
        tl.store(p_partial + o_r * F + o_n[None, :], acc_a, mask=(o_r < R) & m_n[None, :])
    if R_GATE > 0:
        tl.store(p_partial + R * F + o_n[None, :] * R_GATE + o_r, acc_gate, mask=(o_r < R_GATE) & m_n[None, :])
    if R_UP > 0:
        p_partial += (R + R_GATE) * F
        tl.store(p_partial + o_n[None, :] * R_UP + o_r, acc_up, mask=(o_r < R_UP) & m_n[None, :])


Masks = Sequence[torch.Tensor | None]


def swiglu_bwd_reduce(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    ds: torch.Tensor,
    ranks: Sequence[int],
    masks: Masks,
    s: torch.Tensor,
    b_ranks: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dgate, dup (M, F), and flat in fp32 dA_g (R_g, F) of down_proj, dB (F, R_i) of gate_proj and of up_proj.

    dA_g = ds_gᵀ (mask_g ∘ h) with ds (M, ΣR_g); dB = dgateᵀ s and dupᵀ s with s (M, R_gate + R_up).
    """
    (M, F), R = gate.shape, ds.shape[1]
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    masked = tuple(mask is not None for mask in masks)
    most = max(R, *b_ranks)
    name = "swiglu_reduce_dropout" if any(masked) else "swiglu_reduce"
    choice = choose(name, gate, m=M, n=F, r=most, p=3)
    t = choice.tile
    br = block_r(most, t.r)
    tiles = cdiv(F, t.n) * max(1, cdiv(most, br))
    splits, rows = row_splits(M, tiles, t.m)
    total = (R + sum(b_ranks)) * F
    partials = torch.empty((splits, total), dtype=torch.float32, device=gate.device)
    launch(
        _swiglu_bwd_reduce_kernel,
        (cdiv(F, t.n), max(1, cdiv(most, br)), splits),
        *(dh, gate, up, ds, s, tuple(masks), dgate, dup, partials, M, F, cdiv(F, 8), rows, total),
        choice=choice,
        RANKS=tuple(ranks),
        MASKED=masked,
        R=R,
        R_GATE=b_ranks[0],
        R_UP=b_ranks[1],
        PRECISION=dot_precision(gate.dtype),
        BLOCK_M=t.m,
        BLOCK_N=t.n,
        BLOCK_R=br,
    )
    return dgate, dup, partials.sum(0)


def _reduce_h(gate, up, ds, ranks, masks):
    """lora_reduce of h; on a CPU _ROWS of h are made at a time, and stay in cache."""
    ops, total = torch.ops.fastlora, ds.new_zeros(ds.shape[1] * gate.shape[1], dtype=torch.float32)
    step = _ROWS if gate.is_cpu else max(1, len(gate))
    for first in range(0, len(gate), step):
        rows = slice(first, first + step)
        some = [mask if mask is None else mask[rows] for mask in masks]
        total += ops.lora_reduce(ds[rows], ops.swiglu_fwd(gate[rows], up[rows]), ranks, some)
    return total


def _aten(dh, gate, up, ds, ranks, masks, s, b_ranks):
    ops = torch.ops.fastlora
    dgate, dup = ops.swiglu_bwd(dh, gate, up)
    flat = [_reduce_h(gate, up, ds, ranks, masks)] if ds.shape[1] else []
    if sum(b_ranks):
        flat.append(ops.lora_reduce_t(s, [dgate, dup], b_ranks))
    return dgate, dup, torch.cat(flat) if len(flat) > 1 else flat[0] if flat else dh.new_empty(0, dtype=torch.float32)


def _fake(dh, gate, up, ds, ranks, masks, s, b_ranks):
    flat = gate.new_empty((ds.shape[1] + sum(b_ranks)) * gate.shape[1], dtype=torch.float32)
    return torch.empty_like(gate), torch.empty_like(up), flat


register(
    "swiglu_bwd_reduce(Tensor dh, Tensor gate, Tensor up, Tensor ds, SymInt[] ranks, Tensor?[] masks, Tensor s,"
    " SymInt[] b_ranks) -> (Tensor, Tensor, Tensor)",
    triton=swiglu_bwd_reduce,
    aten=_aten,
    fake=_fake,
    flops=_flops.swiglu_bwd_reduce,
)
