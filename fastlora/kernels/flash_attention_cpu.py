"""Attention on the CPU: eager's own arithmetic, on BLOCK rows of queries and the keys they see at a time.

A slab of scores holds all keys of its queries, so the softmax is the ordinary one and the backward repeats it: neither
out nor lse is needed there, and the error is eager's. The query heads of a key head are rows of one matrix product.
Dropout draws slab after slab from a generator of its own, which the backward starts anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

BLOCK = 128

# (rows of the batch, queries, keys, (B or 1, 1, 1, queries, keys) True where a key is hidden)
_Slab = tuple[slice, slice, slice, torch.Tensor]


def _slabs(q, k, key_padding_mask, position_ids, causal, window) -> Iterator[_Slab]:
    """A query belongs to one slab; one that sees no key may belong to none."""
    (B, _, T, _), T_kv = q.shape, k.shape[2]
    position = torch.arange(T)[None] + T_kv - T
    first = torch.zeros(1, T, dtype=torch.int64)
    if position_ids is not None:
        first = position - position_ids
    if window is not None:
        first = torch.maximum(first, position - window + 1)
    # Rows of the batch that see different keys are taken one by one.
    alike = first.shape[0] == 1 and key_padding_mask is None
    for rows in [slice(0, B)] if alike else [slice(b, b + 1) for b in range(B)]:
        lefts = first if first.shape[0] == 1 else first[rows]
        for lo in range(0, T, BLOCK):
            hi = min(lo + BLOCK, T)
            n_hi = hi + T_kv - T if causal else T_kv
            n_lo = max(0, int(lefts[:, lo:hi].min()))
            if n_lo >= n_hi:
                continue
            j = torch.arange(n_lo, n_hi)
            hidden = j < lefts[:, lo:hi, None]
            if causal:
                hidden = hidden | (j > position[:, lo:hi, None])
            if key_padding_mask is not None:
                hidden = hidden | ~key_padding_mask[rows, None, n_lo:n_hi]
            yield rows, slice(lo, hi), slice(n_lo, n_hi), hidden[:, None, None]


def _like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Zeros of the shape of x (B, H, T, D) in (B, T, H, D) memory."""
    B, H, T, D = x.shape
    return torch.zeros(B, T, H, D, dtype=dtype or x.dtype).transpose(1, 2)


def _grouped(x: torch.Tensor, H_kv: int) -> torch.Tensor:
    """(B, H, T, D) as (B, H_kv, H / H_kv, T, D)."""
    return x.unflatten(1, (H_kv, x.shape[1] // H_kv))


def _probabilities(b_q, b_k, hidden, scale):
    """Scores and probabilities (B, H_kv, H / H_kv · queries, keys) of queries (B, H_kv, H / H_kv · queries, D)."""
    scores = (b_q @ b_k.mT).mul_(scale)
    edge = hidden.flatten(0, -2).any(0).nonzero()
    if len(edge):  # under a causal mask alone, the last columns
        columns = slice(int(edge[0]), int(edge[-1]) + 1)
        by_query = scores.unflatten(2, (-1, hidden.shape[3]))
        by_query[..., columns].masked_fill_(hidden[..., columns], torch.finfo(scores.dtype).min)
    p = scores.softmax(-1, dtype=torch.float32).to(b_k.dtype)
    empty = hidden.all(-1, keepdim=True)
    if empty.any():
        p.unflatten(2, (-1, hidden.shape[3])).masked_fill_(empty, 0.0)
    return scores, p


def _kept(generator, p, scores) -> Callable[[torch.Tensor], torch.Tensor]:
    """What multiplies probabilities by 1 / (1 − p) or 0, as drawn for these scores."""
    kept = torch.rand(scores.shape, generator=generator) >= p
    factor = 1 / (1 - p) if p < 1 else 0.0
    return lambda x: x.mul(kept).mul_(factor)


def _generator(seed: torch.Tensor | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(int(seed))


def fwd(q, k, v, key_padding_mask, position_ids, scale, causal, window, dropout_p, seed):
    """As flash_attention_fwd."""
    generator = _generator(seed)
    H_kv, k, v = k.shape[1], k.contiguous(), v.contiguous()  # bmm would copy every slice of a transposed view
    out, lse = _like(q), torch.full(q.shape[:3], float("inf"))
    q_, out_, lse_ = _grouped(q, H_kv), _grouped(out, H_kv), lse.unflatten(1, (H_kv, -1))
    for rows, queries, keys, hidden in _slabs(q, k, key_padding_mask, position_ids, causal, window):
        scores, p = _probabilities(q_[rows, :, :, queries].flatten(2, 3), k[rows, :, keys], hidden, scale)
        # The largest probability is exp(largest score − lse).
        b_lse = scores.amax(-1).float() - p.amax(-1).float().log()
        if generator is not None:
            p = _kept(generator, dropout_p, scores)(p)
        out_[rows, :, :, queries] = (p @ v[rows, :, keys]).unflatten(2, (-1, hidden.shape[3]))
        lse_[rows, :, :, queries] = b_lse.unflatten(2, (-1, hidden.shape[3]))
    return out, lse


def _over_group(left, right, queries):
    """leftᵀ right of every query head, then their sum: one long sum over all of them would round more."""
    return (left.unflatten(2, (-1, queries)).mT @ right.unflatten(2, (-1, queries))).sum(2)


def bwd(dout, q, k, v, out, lse, key_padding_mask, position_ids, scale, causal, window, dropout_p, seed):
    """As flash_attention_bwd."""
    generator = _generator(seed)
    H_kv, k, v = k.shape[1], k.contiguous(), v.contiguous()
    # Keys gather their gradient from many slabs: in fp32.
    dq, dk, dv = _like(q), _like(k, torch.float32), _like(v, torch.float32)
    q_, do_, dq_ = _grouped(q, H_kv), _grouped(dout, H_kv), _grouped(dq, H_kv)
    for rows, queries, keys, hidden in _slabs(q, k, key_padding_mask, position_ids, causal, window):
        b_q, b_do = q_[rows, :, :, queries].flatten(2, 3), do_[rows, :, :, queries].flatten(2, 3)
        b_k, b_v, n = k[rows, :, keys], v[rows, :, keys], hidden.shape[3]
        scores, p = _probabilities(b_q, b_k, hidden, scale)
        dropped, dp = p, b_do @ b_v.mT
        if generator is not None:
            kept = _kept(generator, dropout_p, scores)
            dropped, dp = kept(p), kept(dp)
        dv[rows, :, keys] += _over_group(dropped, b_do, n)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale)
        dq_[rows, :, :, queries] = (ds @ b_k).unflatten(2, (-1, n))
        dk[rows, :, keys] += _over_group(ds, b_q, n)
    return dq, dk.to(k.dtype), dv.to(v.dtype)
