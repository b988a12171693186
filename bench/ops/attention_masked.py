"""Causal self-attention where more than causality is masked; tensors are laid out as in attention.py.

attention packed  documents of T/20 to T/2 tokens in one row of T, the last one cut to fit; a token sees its document
attention padded  B rows of T/4 to T real tokens, padded on the right to T; no query sees a key of the padding

FLOPs and bytes are of the real work: 2·heads·D·Σ length² forward, 2.5 times that backward, and the real tokens of q, k,
v and out (backward: of dout and three gradients too). Whatever shapes a mask (position_ids, a boolean mask, bounds and
lengths on the host) is an input, made beforehand as a model makes it once for all layers.

The witness goes document by document or row by row, by the query heads that share a key head, and computes scores
anew in backward: it holds one such square in float64. "eager" is its time, not that of eager attention.

Padding on the right hides nothing that causality does not, but from the queries of the padding, which nobody reads:
"sdpa causal alone" masks nothing, and "varlen unpadded" leaves these queries out, so each is judged on what it
computes. The others are judged at every query.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..case import Case, Function, Inputs, Work
from ..providers import Provider, attribute, foreign, ours
from .attention import eager, heads_of

# T, heads, kv_heads, D
PACKED = {
    "cpu": [(1024, 16, 16, 64)],
    "cuda": [(T, *heads, 128) for T in (4096, 16384) for heads in ((32, 32), (64, 8))],
    "quick": [(64, 4, 2, 32)],
}
# B, T, heads, kv_heads, D
PADDED = {
    "cpu": [(4, 512, 16, 16, 64)],
    "cuda": [(2, 4096, 32, 32, 128), (8, 1024, 32, 32, 128)],
    "quick": [(2, 32, 4, 2, 32)],
}


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    size = "quick" if quick else device
    for shape in PACKED[size]:
        yield _packed(shape, device, dtype)
    for shape in PADDED[size]:
        yield _padded(shape, device, dtype)


def _packed(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Case:
    T, heads, kv_heads, D = shape
    lengths = documents(T)
    return _case(
        "attention packed",
        {"T": T, "documents": len(lengths), "heads": heads, "kv_heads": kv_heads, "D": D},
        lengths,
        dtype,
        inputs=lambda new: heads_of(new, 1, *shape) | _packed_masks(lengths, new.device),
        reference=_by_document,
        providers=(
            _ours("position_ids"),
            Provider("sdpa mask", _sdpa_mask),
            foreign("varlen", "torch.nn.attention.varlen", device, lambda: packed_by(_varlen())),
            foreign("flash-attn varlen", "flash_attn", device, lambda: packed_by(_flash_attn_varlen())),
        ),
    )


def _padded(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Case:
    B, T, heads, kv_heads, D = shape
    draw = random.Random(3)
    lengths = [draw.randint(T // 4, T) for _ in range(B)]
    return _case(
        "attention padded",
        {"B": B, "T": T, "real": sum(lengths), "heads": heads, "kv_heads": kv_heads, "D": D},
        lengths,
        dtype,
        inputs=lambda new: heads_of(new, *shape) | _padded_masks(lengths, T, new.device),
        reference=by_row,
        providers=(
            _ours("key_padding_mask"),
            Provider("sdpa mask", _sdpa_mask),
            Provider("sdpa causal alone", _sdpa_causal, witness=by_row_unmasked),
            foreign("varlen unpadded", "torch.nn.attention.varlen", device, lambda: unpadded_by(_varlen()))._replace(
                witness=by_row_unpadded
            ),
        ),
    )


def _case(op: str, shape: dict[str, int], lengths: list[int], dtype: torch.dtype, **rest: Any) -> Case:
    tokens, pairs = sum(lengths), sum(n * n for n in lengths)
    q, kv = (tokens * shape[name] * shape["D"] * dtype.itemsize for name in ("heads", "kv_heads"))
    flops = 2 * shape["heads"] * shape["D"] * pairs
    forward, backward = Work(2 * q + 2 * kv, flops), Work(4 * q + 4 * kv, 2.5 * flops)
    return Case(op=op, shape=shape, wrt=("q", "k", "v"), forward=forward, backward=backward, **rest)


def documents(T: int) -> list[int]:
    """Lengths, always the same of the same T."""
    draw, lengths = random.Random(3), []
    while sum(lengths) < T:
        lengths.append(min(draw.randint(T // 20, T // 2), T - sum(lengths)))
    return lengths


def _packed_masks(lengths: list[int], device: str) -> Inputs:
    sizes = torch.tensor(lengths)
    number = torch.arange(len(lengths)).repeat_interleave(sizes).to(device)
    index = torch.arange(len(number), device=device)
    return {
        "position_ids": torch.cat([torch.arange(n, device=device) for n in lengths])[None],
        "mask": ((number[:, None] == number) & (index[:, None] >= index))[None, None],
        "bounds": F.pad(sizes.cumsum(0), (1, 0)).int().to(device),
        "lengths": lengths,
    }


def _padded_masks(lengths: list[int], T: int, device: str) -> Inputs:
    sizes, index = torch.tensor(lengths), torch.arange(T, device=device)
    real = index < sizes[:, None].to(device)
    return {
        "key_padding_mask": real,
        "mask": real[:, None, None] & (index[:, None] >= index),
        "real": (torch.arange(T) < sizes[:, None]).flatten().nonzero()[:, 0].to(device),
        "bounds": F.pad(sizes.cumsum(0), (1, 0)).int().to(device),
        "lengths": lengths,
    }


def _by_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """eager, by the query heads of one key head after the other; nothing but q, k and v is kept for backward."""
    groups = q.shape[1] // k.shape[1]
    each = zip(q.split(groups, 1), k.split(1, 1), v.split(1, 1), strict=True)
    return torch.cat([checkpoint(eager, *one, use_reentrant=False, preserve_rng_state=False) for one in each], 2)


def _by_document(q, k, v, lengths, **_):
    each = zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)
    return torch.cat([_by_heads(*one) for one in each], 1)


def by_row(q, k, v, lengths, **_):
    """Every query, of the padding too, sees the real keys up to its place."""
    each = zip(q.split(1), k.split(1), v.split(1), lengths, strict=True)
    return torch.cat([_by_heads(q, k[:, :, :n], v[:, :, :n]) for q, k, v, n in each])


def by_row_unmasked(q, k, v, **_):
    """Every query sees all keys up to its place."""
    return torch.cat([_by_heads(*row) for row in zip(q.split(1), k.split(1), v.split(1), strict=True)])


def by_row_unpadded(q, k, v, lengths, **_):
    """Zeros for the queries of the padding."""
    T = q.shape[2]
    each = zip(q.split(1), k.split(1), v.split(1), lengths, strict=True)
    real = ((n, _by_heads(*(t[:, :, :n] for t in row))) for *row, n in each)
    return torch.cat([F.pad(out, (0, 0, 0, 0, 0, T - n)) for n, out in real])


def _ours(mask: str) -> Provider:
    provider = ours("flash_attention")
    if provider.why:
        return provider
    return Provider("fastlora", lambda q, k, v, **inputs: provider.run(q, k, v, **{mask: inputs[mask]}).transpose(1, 2))


def _sdpa_mask(q, k, v, mask, **_):
    """As transformers, which repeats the heads where there is a mask."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _sdpa_causal(q, k, v, **_):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def packed_by(function: Function) -> Function:
    """By a function of (tokens, ·, D), bounds and the longest sequence."""

    def run(q, k, v, bounds, lengths, **_):
        return function(*(t[0].transpose(0, 1) for t in (q, k, v)), bounds, max(lengths))[None]

    return run


def unpadded_by(function: Function) -> Function:
    """By the same of the real tokens alone, taken out and put back."""

    def run(q, k, v, bounds, lengths, real, **_):
        B, _, T, _ = q.shape
        flat = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
        out = function(*(t.index_select(0, real) for t in flat), bounds, max(lengths))
        return torch.zeros_like(flat[0]).index_copy(0, real, out).unflatten(0, (B, T))

    return run


def _varlen() -> Function:
    """PyTorch's own. Where it has no switch for GQA, its kernels take fewer key heads as they come."""
    function = attribute("torch.nn.attention.varlen.varlen_attn")
    has_switch = "enable_gqa" in inspect.signature(function).parameters

    def run(q, k, v, bounds, longest):
        gqa = {"enable_gqa": q.shape[1] != k.shape[1]} if has_switch else {}
        return function(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), **gqa)

    return run


def _flash_attn_varlen() -> Function:
    function = attribute("flash_attn.flash_attn_varlen_func")
    return lambda q, k, v, bounds, longest: function(q, k, v, bounds, bounds, longest, longest, causal=True)
