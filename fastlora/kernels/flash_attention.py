"""Attention without the score matrix: launchers of its kernels, tiles by head dimension, registration."""

from __future__ import annotations

from typing import Any

import torch

from . import _flops, flash_attention_cpu
from ._library import register
from ._tiles import Choice, choose
from ._tl import cdiv, dot_precision, launch, next_power_of_2, require_no_capture
from .flash_attention_bwd import flash_attention_dkdv_kernel, flash_attention_dq_kernel
from .flash_attention_fwd import flash_attention_fwd_kernel

_DECODE = 16  # queries up to which a small tile serves


def _choose(kernel: str, q: torch.Tensor, k: torch.Tensor, padded: bool = False, dropout: bool = False) -> Choice:
    _, H, T, D = q.shape
    half, sizes = q.dtype != torch.float32, {"m": T, "n": H * D, "k": D, "p": H // k.shape[1]}
    if kernel == "fwd" and T <= _DECODE and half and not dropout:
        return choose("flash_attention_decode", q, **sizes)
    bucket = max(64, next_power_of_2(D))
    variant = "_padded" if padded and bucket == 128 and half else ""
    variant = "_dropout" if dropout else variant
    return choose(f"flash_attention_{kernel}_d{bucket}{variant}", q, **sizes)


def _like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor of the shape of x (B, H, T, D) in (B, T, H, D) memory."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _rows(mask: torch.Tensor | None) -> int:
    """The batch stride of a (B or 1, T) tensor; 0 where all rows are the same."""
    return mask.stride(0) if mask is not None and mask.shape[0] > 1 else 0


def _dropout(seed: torch.Tensor | None, p: float) -> tuple[int | None, int, float]:
    """Seed, the least random word that is kept, and what kept probabilities are multiplied by: 0 if none is kept."""
    if seed is None:
        return None, 0, 1.0
    require_no_capture("attention dropout")
    return int(seed), min(round(p * 2**32), 2**32 - 1), 1 / (1 - p) if p < 1 else 0.0


def _meta(choice: Choice, q: torch.Tensor, causal: bool, window: int | None) -> dict[str, Any]:
    D, t = q.shape[3], choice.tile
    return {
        "choice": choice,
        "CAUSAL": causal,
        "WINDOW": window is not None,
        "PRECISION": dot_precision(q.dtype),
        "D": D,
        "BLOCK_M": t.m,
        "BLOCK_N": t.n,
        "BLOCK_D": max(16, next_power_of_2(D)),
    }


def flash_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    visited: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, H, T, D) in (B, T, H, D) memory, and lse (B, H, T) fp32: +inf for a query that sees no key.

    In fp32 the largest score stands in the place of lse: the backward sums anew. seed, an int64 scalar on the CPU, is
    given where dropout is wanted: score (b, h, i, j) is kept as a function of it and of b, h, i and j alone.
    visited, for tests: a (1,) int32 that counts the tiles of scores computed.
    """
    (B, H, T, _), (H_kv, T_kv) = q.shape, k.shape[1:3]
    out, lse = _like(q), q.new_empty((B, H, T), dtype=torch.float32)
    choice = _choose("fwd", q, k, key_padding_mask is not None, seed is not None)
    launch(
        flash_attention_fwd_kernel,
        (cdiv(T, choice.tile.m), H, B),
        *(q, k, v, out, lse, key_padding_mask, position_ids, visited, T, T_kv, H // H_kv, scale, window or 0),
        *_dropout(seed, dropout_p),
        *(*_strides(q, k, v, out), _rows(key_padding_mask), _rows(position_ids)),
        **_meta(choice, q, causal, window),
    )
    return out, lse


def flash_attention_bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    visited: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, each in (B, T, H, D) memory: two kernels, three in fp32. The one for dq also makes delta.

    visited, for tests: a (2,) int32 that counts the tiles of scores computed for dq, and for dk and dv.
    """
    (B, H, T, _), (H_kv, T_kv) = q.shape, k.shape[1:3]
    dq, dk, dv = _like(q), _like(k), _like(v)
    delta = torch.empty_like(lse)
    norm = torch.empty_like(lse) if q.dtype == torch.float32 else None
    masks = (_rows(key_padding_mask), _rows(position_ids))
    visited_dq, visited_dkdv = visited.split(1) if visited is not None else (None, None)
    shapes = (T, T_kv, H // H_kv, scale, window or 0, *_dropout(seed, dropout_p))
    choice = _choose("dq", q, k, dropout=seed is not None)
    for norm_pass in (True, False) if norm is not None else (False,):
        launch(
            flash_attention_dq_kernel,
            (cdiv(T, choice.tile.m), H, B),
            *(q, k, v, out, dout, lse, delta, norm, dq, key_padding_mask, position_ids, visited_dq, *shapes),
            *(*_strides(q, k, v, out, dout, dq), *masks),
            NORM=norm_pass,
            **_meta(choice, q, causal, window),
        )
    choice = _choose("dkdv", q, k, dropout=seed is not None)
    launch(
        flash_attention_dkdv_kernel,
        (cdiv(T_kv, choice.tile.n), H_kv, B),
        *(q, k, v, dout, lse, delta, norm, dk, dv, key_padding_mask, position_ids, visited_dkdv, *shapes),
        *(*_strides(q, k, v, dout, dk, dv), *masks),
        **_meta(choice, q, causal, window),
    )
    return dq, dk, dv


register(
    "flash_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, Tensor? position_ids, float scale,"
    " bool causal, int? window, float dropout_p, Tensor? seed) -> (Tensor, Tensor)",
    triton=flash_attention_fwd,
    aten=flash_attention_cpu.fwd,
    fake=lambda q, *rest: (_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)),
    flops=_flops.attention,
)
register(
    "flash_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? key_padding_mask,"
    " Tensor? position_ids, float scale, bool causal, int? window, float dropout_p, Tensor? seed)"
    " -> (Tensor, Tensor, Tensor)",
    triton=flash_attention_bwd,
    aten=flash_attention_cpu.bwd,
    fake=lambda dout, q, k, v, *rest: (_like(q), _like(k), _like(v)),
    flops=_flops.attention_bwd,
)
