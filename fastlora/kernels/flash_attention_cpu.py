"""Attention on the CPU, and where no tile runs: csrc's fused kernel, or slabs; `_fused` says which.

A slab is BLOCK queries of a few heads, with all the keys they see. The products are the library's; between them one
kernel scales, masks and normalises a slab in place. A slab holds whole rows of scores, so the softmax is the ordinary
one and the backward repeats it: neither out nor lse is needed there. It stays in cache, and the query heads of a key
head are rows of one product. Dropout draws slab after slab from a generator of its own, which the backward starts anew.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from . import _flops, _library
from ._library import register

BLOCK = 128
_SLAB_BYTES = 1 << 21  # of scores: a core's cache


class _Slab(NamedTuple):
    """What its queries see: the keys first ≤ j < last, of those in `keys`, whose bias is not −∞."""

    row: int
    heads: slice  # of the keys
    queries: slice
    keys: slice
    first: torch.Tensor
    last: torch.Tensor
    bias: torch.Tensor | None


def _first(q, k, position_ids, window) -> torch.Tensor:
    """(B or 1, T) int64: the first key that a query sees, were all of them real."""
    T, T_kv = q.shape[2], k.shape[2]
    position = torch.arange(T, device=q.device)[None] + T_kv - T
    first = torch.zeros_like(position)
    if position_ids is not None:
        first = position - position_ids
    if window is not None:
        first = torch.maximum(first, position - window + 1)
    return first.clamp(min=0)


def _slabs(q, k, real, first, causal) -> Iterator[_Slab]:
    """Every query of every head once; where none of a slab sees a key, it has no keys."""
    (B, H, T, _), (H_kv, T_kv) = q.shape, k.shape[1:3]
    first = first.expand(B, -1)
    last = torch.arange(T_kv - T + 1, T_kv + 1, device=q.device) if causal else first.new_full((T,), T_kv)
    for row in range(B):
        bias = None
        if real is not None:
            bias = torch.where(real[row], 0.0, float("-inf"))
        for lo in range(0, T, BLOCK):
            queries = slice(lo, min(lo + BLOCK, T))
            start, stop = int(first[row, queries].min()), max(0, int(last[queries][-1]))
            keys = slice(min(start, stop), stop)
            bounds = first[row, queries] - keys.start, last[queries] - keys.start
            size = H // H_kv * (queries.stop - lo) * (keys.stop - keys.start) * q.element_size()
            some = max(1, _SLAB_BYTES // max(1, size))
            for head in range(0, H_kv, some):
                heads = slice(head, min(head + some, H_kv))
                yield _Slab(row, heads, queries, keys, *bounds, None if bias is None else bias[keys])


def _like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor of the shape of x (B, H, T, D) in (B, T, H, D) memory."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


def _grouped(x: torch.Tensor, H_kv: int) -> torch.Tensor:
    """(B, H, T, D) as (B, H_kv, H / H_kv, T, D)."""
    return x.unflatten(1, (H_kv, x.shape[1] // H_kv))


class _Scratch:
    """Memory for the scores of one slab after the other, on the device and of the dtype of a tensor."""

    def __init__(self, like: torch.Tensor) -> None:
        self._memory = like.new_empty(0)

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """left rightᵀ (heads, rows, keys), valid until the next."""
        shape = *left.shape[:2], right.shape[1]
        if self._memory.numel() < torch.Size(shape).numel():
            self._memory = left.new_empty(torch.Size(shape).numel())
        return torch.bmm(left, right.mT, out=self._memory[: torch.Size(shape).numel()].view(shape))


def _by_head(scores: torch.Tensor, slab: _Slab) -> torch.Tensor:
    """(heads of the keys, query heads of each · queries, keys) as (query heads, queries, keys)."""
    return scores.view(-1, len(slab.first), scores.shape[2])


def _kept(generator, p, scores) -> Callable[[torch.Tensor], torch.Tensor]:
    """What multiplies probabilities by 1 / (1 − p) or 0, as drawn for these scores."""
    kept = torch.rand(scores.shape, generator=generator) >= p
    factor = 1 / (1 - p) if p < 1 else 0.0
    return lambda x: x.mul(kept).mul_(factor)


def _generator(seed: torch.Tensor | None, device: torch.device) -> torch.Generator | None:
    if seed is not None and device.type != "cpu":
        # Another of the three kernels may have run, and it has dropped by numbers of its own.
        raise RuntimeError(f"flash_attention: no tile with dropout runs on {device}; FASTLORA_ATTENTION=sdpa has one")
    return None if seed is None else torch.Generator().manual_seed(int(seed))


def slabs_fwd(q, k, v, real, first, scale, causal, dropout_p=0.0, generator=None):
    H_kv, k, v = k.shape[1], k.contiguous(), v.contiguous()  # bmm would copy every slice of a transposed view
    out, lse = _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    q_, out_, lse_ = _grouped(q, H_kv), _grouped(out, H_kv), lse.unflatten(1, (H_kv, -1))
    scratch = _Scratch(q)
    for slab in _slabs(q, k, real, first, causal):
        query, key = (slab.row, slab.heads, slice(None), slab.queries), (slab.row, slab.heads, slab.keys)
        p = scratch.product(q_[query].flatten(1, 2), k[key])
        b_lse = torch.ops.fastlora.attention_softmax(_by_head(p, slab), *slab[4:], scale)
        if generator is not None:
            p = _kept(generator, dropout_p, p)(p)
        out_[query] = (p @ v[key]).view(out_[query].shape)
        lse_[query] = b_lse.view(lse_[query].shape)
    return out, lse


def _add(total, left, right, slab):
    """total += leftᵀ right, a product for every query head: one long sum over all of them would round more."""
    torch.ops.fastlora.accumulate(total, _by_head(left, slab).mT @ _by_head(right, slab))


def slabs_bwd(dout, q, k, v, out, lse, real, first, scale, causal, dropout_p=0.0, generator=None):
    H_kv, k, v = k.shape[1], k.contiguous(), v.contiguous()
    # Keys gather their gradient from many slabs: in fp32.
    dq, dk, dv = _like(q), *(torch.zeros(k.shape, device=k.device) for _ in range(2))
    q_, do_, dq_ = _grouped(q, H_kv), _grouped(dout, H_kv), _grouped(dq, H_kv)
    scratch, scratch_d = _Scratch(q), _Scratch(q)
    for slab in _slabs(q, k, real, first, causal):
        query, key = (slab.row, slab.heads, slice(None), slab.queries), (slab.row, slab.heads, slab.keys)
        b_q, b_do = q_[query].flatten(1, 2), do_[query].flatten(1, 2)
        b_k, b_v = k[key].contiguous(), v[key].contiguous()
        p, ds = scratch.product(b_q, b_k), scratch_d.product(b_do, b_v)
        kept = None if generator is None else _kept(generator, dropout_p, p)
        ds = ds if kept is None else kept(ds)
        torch.ops.fastlora.attention_softmax_bwd(_by_head(p, slab), _by_head(ds, slab), *slab[4:], scale)
        _add(dv[key], p if kept is None else kept(p), b_do, slab)
        _add(dk[key], ds, b_q, slab)
        dq_[query] = (ds @ b_k).view(dq_[query].shape)
    return dq, _like(k).copy_(dk), _like(v).copy_(dv)


@functools.cache
def _has_amx() -> bool:
    """Whether the library's 16-bit products have a unit of the processor to themselves."""
    has_amx = ctypes.CDLL(str(_library.EXTENSION)).fastlora_cpu_has_amx
    has_amx.restype = ctypes.c_bool
    return bool(has_amx())


def _fused(q: torch.Tensor, generator: torch.Generator | None) -> bool:
    """Whether csrc's kernel serves (docs/decisions/attention-on-the-cpu.md): not for dropout, which it has not; not in
    16 bits on AMX, which the library's products use and ours do not; nor in fp32 for a few queries, whose products the
    library makes with a smaller error."""
    if _library.csrc_state != "loaded" or q.device.type != "cpu" or generator is not None:
        return False
    return q.shape[2] >= 16 if q.dtype == torch.float32 else not _has_amx()


def fwd(q, k, v, key_padding_mask, position_ids, scale, causal, window, dropout_p, seed):
    """As flash_attention_fwd."""
    generator = _generator(seed, q.device)
    arguments = q, k, v, key_padding_mask, _first(q, k, position_ids, window), scale, causal
    if _fused(q, generator):
        return torch.ops.fastlora.fused_attention_fwd(*arguments)
    return slabs_fwd(*arguments, dropout_p, generator)


def bwd(dout, q, k, v, out, lse, key_padding_mask, position_ids, scale, causal, window, dropout_p, seed):
    """As flash_attention_bwd."""
    generator = _generator(seed, q.device)
    arguments = dout, q, k, v, out, lse, key_padding_mask, _first(q, k, position_ids, window), scale, causal
    if _fused(q, generator):
        return torch.ops.fastlora.fused_attention_bwd(*arguments)
    return slabs_bwd(*arguments, dropout_p, generator)


register(
    "fused_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? real, Tensor first, float scale, bool causal)"
    " -> (Tensor, Tensor)",
    triton=slabs_fwd,
    aten=slabs_fwd,
    fake=lambda q, *rest: (_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)),
    flops=_flops.attention,
)
register(
    "fused_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? real,"
    " Tensor first, float scale, bool causal) -> (Tensor, Tensor, Tensor)",
    triton=slabs_bwd,
    aten=slabs_bwd,
    fake=lambda dout, q, k, v, *rest: (_like(q), _like(k), _like(v)),
    flops=_flops.attention_bwd,
)


def _hidden(scores, first, last, bias):
    j = torch.arange(scores.shape[2], device=scores.device)
    hidden = (j < first[:, None]) | (j >= last[:, None])
    return hidden if bias is None else hidden | (bias == float("-inf"))


def _softmax(scores, hidden, scale):
    x = (scores.float() * scale).masked_fill_(hidden, float("-inf"))
    return x.softmax(-1).masked_fill_(hidden.all(-1)[:, None], 0.0), x


def _softmax_aten(scores, first, last, bias, scale):
    hidden = _hidden(scores, first, last, bias)
    p, x = _softmax(scores, hidden, scale)
    scores.copy_(p)
    return x.logsumexp(-1).masked_fill_(hidden.all(-1), float("inf"))


def _softmax_bwd_aten(scores, dp, first, last, bias, scale):
    p, _ = _softmax(scores, _hidden(scores, first, last, bias), scale)
    dp.copy_(torch._softmax_backward_data(dp.float(), p, -1, torch.float32).mul_(scale))
    scores.copy_(p)


register(
    "attention_softmax(Tensor(a!) scores, Tensor first, Tensor last, Tensor? bias, float scale) -> Tensor",
    triton=_softmax_aten,
    aten=_softmax_aten,
    fake=lambda scores, first, last, bias, scale: scores.new_empty(scores.shape[:2], dtype=torch.float32),
    flops=None,
)


def _accumulate_aten(total, parts):
    total += parts.unflatten(0, (len(total), -1)).float().sum(1)


register(
    "accumulate(Tensor(a!) total, Tensor parts) -> ()",
    triton=_accumulate_aten,
    aten=_accumulate_aten,
    fake=lambda total, parts: None,
    flops=None,
)
register(
    "attention_softmax_bwd(Tensor(a!) scores, Tensor(b!) dp, Tensor first, Tensor last, Tensor? bias, float scale)"
    " -> ()",
    triton=_softmax_bwd_aten,
    aten=_softmax_bwd_aten,
    fake=lambda scores, dp, first, last, bias, scale: None,
    flops=None,
)
