"""SwiGLU's elementwise part, silu(gate) · up, forward and backward."""

from __future__ import annotations

import torch

from ._library import register
from ._tiles import choose
from ._tl import cdiv, launch, silu_mul, tl, triton


@triton.jit
def _swiglu_fwd_kernel(p_gate, p_up, p_h, numel, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    b_gate = tl.load(p_gate + o, mask=m, other=0.0)
    b_up = tl.load(p_up + o, mask=m, other=0.0)
    tl.store(p_h + o, silu_mul(b_gate, b_up), mask=m)


@triton.jit
def silu_mul_bwd(b_dh, b_gate, b_up):
    """dgate and dup of silu(gate) · up, in fp32 throughout and rounded once."""
    b_dh, b_gf, b_uf = b_dh.to(tl.float32), b_gate.to(tl.float32), b_up.to(tl.float32)
    b_sig = tl.sigmoid(b_gf)
    b_dgate = b_dh * b_uf * b_sig * (1 + b_gf * (1 - b_sig))
    return b_dgate.to(b_gate.dtype), (b_dh * (b_gf * b_sig)).to(b_gate.dtype)


@triton.jit
def _swiglu_bwd_kernel(p_dh, p_gate, p_up, p_dgate, p_dup, numel, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    b_dh = tl.load(p_dh + o, mask=m, other=0.0)
    b_gate = tl.load(p_gate + o, mask=m, other=0.0)
    b_up = tl.load(p_up + o, mask=m, other=0.0)
    b_dgate, b_dup = silu_mul_bwd(b_dh, b_gate, b_up)
    tl.store(p_dgate + o, b_dgate, mask=m)
    tl.store(p_dup + o, b_dup, mask=m)


def swiglu_fwd(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """h = round(silu(gate)) · up, elementwise."""
    h = torch.empty_like(gate)
    choice, n = choose("swiglu", gate, n=gate.numel()), gate.numel()
    block = choice.tile.n
    launch(_swiglu_fwd_kernel, (cdiv(n, block),), gate, up, h, n, choice=choice, BLOCK=block)
    return h


def swiglu_bwd(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dgate and dup, elementwise."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    choice, n = choose("swiglu", gate, n=gate.numel()), gate.numel()
    block = choice.tile.n
    launch(_swiglu_bwd_kernel, (cdiv(n, block),), dh, gate, up, dgate, dup, n, choice=choice, BLOCK=block)
    return dgate, dup


def _fwd_aten(gate, up):
    return torch.nn.functional.silu(gate) * up


def _bwd_aten(dh, gate, up):
    dh, g, u = dh.float(), gate.float(), up.float()
    sig = torch.sigmoid(g)
    return (dh * u * sig * (1 + g * (1 - sig))).to(gate.dtype), (dh * (g * sig)).to(up.dtype)


register(
    "swiglu_fwd(Tensor gate, Tensor up) -> Tensor",
    triton=swiglu_fwd,
    aten=_fwd_aten,
    fake=lambda gate, up: torch.empty_like(gate),
    flops=None,
)
register(
    "swiglu_bwd(Tensor dh, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    triton=swiglu_bwd,
    aten=_bwd_aten,
    fake=lambda dh, gate, up: (torch.empty_like(gate), torch.empty_like(up)),
    flops=None,
)
