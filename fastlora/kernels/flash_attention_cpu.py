"""Attention on the CPU: ATen's flash kernels on pieces whose mask is causal, absent or one slab of rows.

ATen's causal mask starts at the first key and its mask argument is a whole matrix. So a packed batch is cut into its
sequences, and any other mask is given BLOCK rows of queries at a time: the largest mask is (B, BLOCK, T_kv).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

BLOCK = 128

_fwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Piece(NamedTuple):
    rows: slice  # of the batch
    queries: slice
    keys: slice
    causal: bool
    mask: torch.Tensor | None  # additive, (B or 1, 1, queries, keys)


def _sequences(position_ids: torch.Tensor, B: int, T: int) -> list[tuple[slice, list[int]]] | None:
    """The bounds of the sequences in every row of a packed batch; None where position_ids are not 0, 1, 2, … in runs."""
    index = torch.arange(T)
    start = (index - position_ids).clamp(min=0)
    begins = start == index
    begins[:, :1] = True
    if not torch.equal(start, torch.where(begins, index, 0).cummax(1).values):
        return None
    rows = [slice(0, B)] if position_ids.shape[0] == 1 else [slice(b, b + 1) for b in range(B)]
    return [(row, [*begin.nonzero().flatten().tolist(), T]) for row, begin in zip(rows, begins, strict=True)]


def _mask(lo, hi, first, n_lo, n_hi, shift, key_padding_mask, causal, dtype):
    """0 where queries lo … hi − 1 see keys n_lo … n_hi − 1, −inf elsewhere."""
    i, j = torch.arange(lo, hi)[:, None] + shift, torch.arange(n_lo, n_hi)
    visible = j <= i if causal else torch.ones(hi - lo, n_hi - n_lo, dtype=torch.bool)
    visible = visible & (j >= first[:, lo:hi, None])
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, n_lo:n_hi]
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))[:, None]


def _pieces(q, k, key_padding_mask, position_ids, causal, window) -> Iterator[_Piece]:
    """The calls that together are one attention; a query belongs to one piece."""
    (B, _, T, _), T_kv = q.shape, k.shape[2]
    shift, whole = T_kv - T, slice(0, B)
    if 0 in (B, T, T_kv):
        return
    plain = key_padding_mask is None and window is None
    if plain and position_ids is None and (not causal or shift == 0 or T == 1):
        yield _Piece(whole, slice(0, T), slice(0, T_kv), causal and shift == 0, None)
        return
    if plain and position_ids is not None and shift == 0:
        packed = _sequences(position_ids, B, T)
        if packed is not None:
            for row, bounds in packed:
                for lo, hi in zip(bounds, bounds[1:], strict=False):
                    yield _Piece(row, slice(lo, hi), slice(lo, hi), True, None)
            return
    position = torch.arange(T)[None] + shift
    first = torch.zeros(1, T, dtype=torch.int64)
    if position_ids is not None:
        first = position - position_ids
    if window is not None:
        first = torch.maximum(first, position - window + 1)
    for lo in range(0, T, BLOCK):
        hi = min(lo + BLOCK, T)
        n_hi = hi + shift if causal else T_kv
        n_lo = min(max(0, int(first[:, lo:hi].min())), n_hi)
        if n_lo < n_hi:
            mask = _mask(lo, hi, first, n_lo, n_hi, shift, key_padding_mask, causal, q.dtype)
            yield _Piece(whole, slice(lo, hi), slice(n_lo, n_hi), False, mask)


def _like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Zeros of the shape of x (B, H, T, D) in (B, T, H, D) memory."""
    B, H, T, D = x.shape
    return torch.zeros(B, T, H, D, dtype=dtype or x.dtype).transpose(1, 2)


def fwd(q, k, v, key_padding_mask, position_ids, scale, causal, window):
    """As flash_attention_fwd."""
    out, lse = _like(q), torch.full(q.shape[:3], float("inf"))
    for rows, queries, keys, is_causal, mask in _pieces(q, k, key_padding_mask, position_ids, causal, window):
        out[rows, :, queries], lse[rows, :, queries] = _fwd(
            q[rows, :, queries], k[rows, :, keys], v[rows, :, keys], 0.0, is_causal, attn_mask=mask, scale=scale
        )
    return out, lse


def bwd(dout, q, k, v, out, lse, key_padding_mask, position_ids, scale, causal, window):
    """As flash_attention_bwd."""
    pieces = list(_pieces(q, k, key_padding_mask, position_ids, causal, window))
    # Keys of several pieces gather their gradient in fp32.
    dtype = torch.float32 if any(piece.mask is not None for piece in pieces) else q.dtype
    dq, dk, dv = _like(q), _like(k, dtype), _like(v, dtype)
    for rows, queries, keys, is_causal, mask in pieces:
        dq[rows, :, queries], dk_piece, dv_piece = _bwd(
            *(dout[rows, :, queries], q[rows, :, queries], k[rows, :, keys], v[rows, :, keys]),
            *(out[rows, :, queries], lse[rows, :, queries], 0.0, is_causal),
            attn_mask=mask,
            scale=scale,
        )
        dk[rows, :, keys] += dk_piece
        dv[rows, :, keys] += dv_piece
    return dq, dk.to(k.dtype), dv.to(v.dtype)
