"""Dequantisation of bitsandbytes' 4-bit weights."""

from __future__ import annotations

import torch

from ._library import register
from ._tiles import choose
from ._tl import cdiv, launch, tl, triton


@triton.jit
def _dequantize_4bit_kernel(
    p_packed, p_absmax, p_code, p_absmax2, p_code2, p_offset, p_out, n_bytes, numel,
    NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    o = start + tl.arange(0, BLOCK)  # bytes, of two elements each
    m = o < n_bytes
    b_packed = tl.load(p_packed + o, mask=m, other=0).to(tl.int32)
    i_block = 2 * o // BLOCKSIZE
    if NESTED:
        b_absmax = tl.load(p_absmax + i_block, mask=m, other=0).to(tl.int32)
        b_scale = tl.load(p_code2 + b_absmax) * tl.load(p_absmax2 + i_block // BLOCKSIZE2, mask=m, other=0.0)
        b_scale += tl.load(p_offset)
    else:
        b_scale = tl.load(p_absmax + i_block, mask=m, other=0.0)
    b_first = tl.load(p_code + (b_packed >> 4)) * b_scale
    b_second = tl.load(p_code + (b_packed & 15)) * b_scale
    o_out = 2 * start + tl.arange(0, 2 * BLOCK)
    tl.store(p_out + o_out, tl.interleave(b_first, b_second).to(p_out.dtype.element_ty), mask=o_out < numel)


def dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    absmax2: torch.Tensor | None,
    code2: torch.Tensor | None,
    offset: torch.Tensor | None,
    blocksize: int,
    blocksize2: int,
    numel: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(numel,), from packed bytes (⌈numel / 2⌉,), the high half of each first; absmax has one number per blocksize."""
    out, n_bytes = packed.new_empty(numel, dtype=dtype), cdiv(numel, 2)
    choice = choose("dequantize_4bit", out, n=numel)
    block = choice.tile.n
    launch(
        _dequantize_4bit_kernel,
        (cdiv(n_bytes, block),),
        *(packed, absmax, code, absmax2, code2, offset, out, n_bytes, numel),
        NESTED=absmax2 is not None,
        BLOCKSIZE=blocksize,
        BLOCKSIZE2=blocksize2,
        choice=choice,
        BLOCK=block,
        # code2 · absmax2 is rounded before offset is added, as it is where bitsandbytes does so in two kernels.
        enable_fp_fusion=False,
    )
    return out


def _aten(packed, absmax, code, absmax2, code2, offset, blocksize, blocksize2, numel, dtype):
    if absmax2 is not None:
        absmax = (code2[absmax.int()] * _spread(absmax2, blocksize2, absmax.numel())).add_(offset)
    halves = torch.arange(256, device=packed.device)
    pairs = torch.stack((code[halves >> 4], code[halves & 15]), 1)
    out = pairs[packed.int()].view(-1)[:numel]
    return out.mul_(_spread(absmax, blocksize, numel)).to(dtype, copy=True)


def _spread(absmax, blocksize, numel):
    return absmax[:, None].expand(-1, blocksize).reshape(-1)[:numel]


def _fake(packed, absmax, code, absmax2, code2, offset, blocksize, blocksize2, numel, dtype):
    return packed.new_empty(numel, dtype=dtype)


register(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor code, Tensor? absmax2, Tensor? code2, Tensor? offset,"
    " int blocksize, int blocksize2, SymInt numel, ScalarType dtype) -> Tensor",
    triton=dequantize_4bit,
    aten=_aten,
    fake=_fake,
    flops=None,
)
