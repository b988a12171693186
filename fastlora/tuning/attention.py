"""Attention's kernels: their calls in Llama 2, the operands of a call, and what it computes in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from .. import ops
from ..kernels import _tiles
from ..kernels._rows import ROWS
from ..kernels._tiles import Call

New = Callable[..., torch.Tensor]
# What a batch hides beside the future; the first that a row serves takes the most registers.
KINDS = ("padded", "packed", "plain")
KERNELS = list(dict.fromkeys(row.kernel for row in ROWS if re.match(r"flash_attention_\w*(?<!_fp32)$", row.kernel)))
DECODE_KEYS = 4096  # in the cache


def head_dim(kernel: str) -> int:
    """The head dimension that a row is for, of up to which it serves all."""
    return int(found.group(1)) if (found := re.search(r"_d(\d+)", kernel)) else 128


def call(kernel: str, T: int, heads: int, kv_heads: int, D: int, dtype: torch.dtype, device: torch.device) -> Call:
    """Of a sequence of T queries; of one, over a cache, where the kernel decodes."""
    return Call(kernel, dtype, device, 1 if "decode" in kernel else T, heads * D, D, 0, heads // kv_heads)


def kinds(kernel: str) -> tuple[str, ...]:
    """The kinds of batches whose code a row serves."""
    if "padded" in kernel:
        return KINDS[:1]
    return KINDS[1:] if f"{kernel}_padded" in KERNELS else KINDS


def forward_arguments(c: Call, new: New, kind: str = "plain") -> tuple[Any, ...]:
    """Of flash_attention_fwd. Dropout is of rate 0: it draws and keeps everything, so that there is a truth."""
    D = c.k
    heads, T_kv = c.n // D, DECODE_KEYS if "decode" in c.kernel else c.m
    q = new(1, c.m, heads, D).transpose(1, 2)
    k, v = (new(1, T_kv, heads // c.p, D).transpose(1, 2) for _ in range(2))
    keys = torch.arange(T_kv, device=c.device)[None]
    padding = keys >= T_kv // 3 if kind == "padded" else None
    positions = keys[:, : c.m] % (c.m // 2 + 1) if kind == "packed" else None
    seed = torch.tensor(2**61) if "dropout" in c.kernel else None
    return q, k, v, padding, positions, D**-0.5, True, None, 0.0, seed


def backward_arguments(c: Call, new: New, kind: str = "plain") -> tuple[Any, ...]:
    """Of flash_attention_bwd."""
    q, k, v, *rest = forward_arguments(c, new, kind)
    out, lse = torch.ops.fastlora.flash_attention_fwd(q, k, v, *rest)
    return new(1, c.m, q.shape[1], c.k).transpose(1, 2), q, k, v, out, lse, *rest


def forward_truth(q, k, v, padding, positions, scale, causal, window, p, seed):
    T, T_kv, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    i, j = torch.arange(T, device=q.device)[:, None] + T_kv - T, torch.arange(T_kv, device=q.device)
    hidden = (j > i)[None]
    if positions is not None:
        hidden = hidden | (j < i - positions[:, :, None])
    if padding is not None:
        hidden = hidden | ~padding[:, None]
    scores = (scale * q.double() @ k.mT).masked_fill(hidden[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    return [(scores - lse[..., None]).exp().nan_to_num(0.0) @ v, lse]


def backward_truth(dout, q, k, v, out, lse, *rest):
    q, k, v = (t.double().requires_grad_() for t in (q, k, v))
    with torch.enable_grad():
        return list(torch.autograd.grad(forward_truth(q, k, v, *rest)[0], (q, k, v), dout.double()))


def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Forward and backward of the attention that is chosen for batches that nothing masks."""
    _, heads, T, D = q.shape
    method = _tiles.choose("attention", q, m=T, n=heads * D, k=D, p=heads // k.shape[1]).method
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    with torch.enable_grad():
        if method == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        else:
            out = ops.flash_attention(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def layer_arguments(c: Call, new: New) -> tuple[Any, ...]:
    q, k, v, *_ = forward_arguments(c, new)
    return q, k, v, new(1, c.m, q.shape[1], c.k).transpose(1, 2)


def layer_truth(q, k, v, dout):
    plain = None, None, q.shape[-1] ** -0.5, True, None, 0.0, None
    return [forward_truth(q, k, v, *plain)[0], *backward_truth(dout, q, k, v, None, None, *plain)]
