from __future__ import annotations

import torch

from ..kernels import flash_attention as _kernels  # noqa: F401  registers the operators
from . import _check
from ._once import once
from ._transforms import refuse


def _unit_stride(x):
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, key_padding_mask, position_ids, seed, *arguments):
        tensors = q, k, v, key_padding_mask, position_ids
        out, lse = torch.ops.fastlora.flash_attention_fwd(*tensors, *arguments, seed)
        ctx.op = "flash_attention"
        ctx.save_for_backward(q, k, v, out, lse, key_padding_mask, position_ids, seed)
        ctx.arguments = arguments
        return out

    @staticmethod
    @once
    def backward(ctx, saved, dout):
        *tensors, seed = saved
        grads = torch.ops.fastlora.flash_attention_bwd(_unit_stride(dout), *tensors, *ctx.arguments, seed)
        return *grads, *(None,) * 7


def _packed_positions(cu_seqlens: torch.Tensor, T: int) -> torch.Tensor:
    """(1, T) position of every token in its sequence; −1, which sees nothing, past the last."""
    index = torch.arange(T, dtype=torch.int32, device=cu_seqlens.device)
    start = cu_seqlens[torch.searchsorted(cu_seqlens, index, right=True) - 1]
    return torch.where(index < cu_seqlens[-1], index - start, -1)[None]


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Attention, ``out = softmax(scale · q kᵀ + mask) v``, without ever holding the (T, T_kv) scores.

    Query i stands at p(i) = i + T_kv − T among the keys: the last query sees the last key, as in cached decoding. It
    sees the real keys j with ``first(i) ≤ j ≤ p(i)``, or up to the last key where not causal, where first(i) is the
    largest of 0, ``p(i) − window + 1`` and ``p(i) − position_ids[i]``. A query that sees no key gives 0 and takes no
    gradient. Tiles of scores outside the mask are skipped. Scores, softmax and sums are fp32; probabilities are
    rounded to the dtype of v before they meet it. Same inputs, same bits, gradients included. Under autocast q, k and
    v take autocast's dtype.

    Args:
        q: (B, H, T, D), any strides; fp32, bf16 or fp16; D from 32 to 256.
        k, v: (B, H_kv, T_kv, D), dtype of q, H a multiple of H_kv. Query heads h·H/H_kv … share head h; nothing is
            repeated in memory.
        scale: greater than 0; D^-½ by default.
        causal: see above.
        key_padding_mask: (B, T_kv) bool, True for real keys, on either side.
        cu_seqlens: (n + 1,) int32, for a packed batch of one row: sequence s is tokens cu_seqlens[s] to
            cu_seqlens[s + 1] − 1. Tokens past the last see nothing.
        position_ids: (B, T) or (1, T), int32 or int64, for packed batches: the position of every token in its own
            sequence. Read on the device, with no host synchronisation. Not together with cu_seqlens.
        window: keys a query sees, itself included, as transformers' sliding_window.
        dropout_p: the rate at which probabilities, once summed, are set to 0; the others are multiplied by
            1 / (1 − dropout_p). Nothing is kept in memory: the mask is a function of place and of a seed, drawn
            from torch's CPU generator. Gradient checkpointing replays it, and nothing waits for the device.

    Returns:
        (B, H, T, D), dtype of q, in (B, T, H, D) memory, so that ``out.transpose(1, 2)`` is contiguous. Saved for
        backward: q, k, v, out and the log-sum-exp (B, H, T) fp32.

    Raises:
        ValueError, TypeError: a wrong shape, device or combination of arguments, or dtype, by the name of the argument.

    Source: Dao, FlashAttention-2, arXiv:2307.08691. Philox: Salmon et al., Parallel random numbers, SC 2011.
    """
    op = "flash_attention"
    refuse(op)
    q, k, v = _check.autocast(q.device, q, k, v)
    _check.dtype(op, "q", q, _check.FLOATS)
    _check.shape(op, "q", q, (None,) * 4, "as (B, H, T, D)")
    B, H, T, D = q.shape
    if not 32 <= D <= 256:
        raise ValueError(f"{op}: q has head dimension {D}, needs one from 32 to 256")
    _check.shape(op, "k", k, (B, None, None, D), "as (B, H_kv, T_kv, D) with B and D of q")
    _check.shape(op, "v", v, tuple(k.shape), "to match k")
    H_kv, T_kv = k.shape[1:3]
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"{op}: k has {H_kv} heads, needs a divisor of the {H} heads of q")
    _check.dtype(op, "k", k, (q.dtype,), "to match q")
    _check.dtype(op, "v", v, (q.dtype,), "to match q")
    if key_padding_mask is not None:
        _check.shape(op, "key_padding_mask", key_padding_mask, (B, T_kv), "as (B, T_kv)")
        _check.dtype(op, "key_padding_mask", key_padding_mask, (torch.bool,))
    if position_ids is not None:
        rows = 1 if position_ids.shape[0] == 1 else B
        _check.shape(op, "position_ids", position_ids, (rows, T), "as (B, T) or (1, T)")
        _check.dtype(op, "position_ids", position_ids, (torch.int32, torch.int64))
    if cu_seqlens is not None:
        _check.shape(op, "cu_seqlens", cu_seqlens, (None,), "as (n + 1,)")
        _check.dtype(op, "cu_seqlens", cu_seqlens, (torch.int32,))
        if position_ids is not None:
            raise ValueError(f"{op}: cu_seqlens and position_ids were both given, needs one of them")
        if B != 1 or T != T_kv:
            raise ValueError(f"{op}: cu_seqlens goes with one row and T = T_kv, got B = {B}, T = {T}, T_kv = {T_kv}")
    _check.same_device(
        op, "q", q, k=k, v=v, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens, position_ids=position_ids
    )
    if not causal and (window is not None or position_ids is not None or cu_seqlens is not None):
        raise ValueError(f"{op}: window, position_ids and cu_seqlens go with causal=True, got causal=False")
    if window is not None and window < 1:
        raise ValueError(f"{op}: window is {window}, needs at least 1")
    scale = D**-0.5 if scale is None else float(scale)
    if not scale > 0:
        raise ValueError(f"{op}: scale is {scale}, needs more than 0")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{op}: dropout_p is {dropout_p}, needs a probability")
    seed = torch.randint(2**62, (), device="cpu") if dropout_p else None
    if cu_seqlens is not None:
        position_ids = _packed_positions(cu_seqlens, T)
    tensors = map(_unit_stride, (q, k, v, key_padding_mask, position_ids))
    return _FlashAttention.apply(*tensors, seed, scale, causal, window, float(dropout_p))
