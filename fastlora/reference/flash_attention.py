from __future__ import annotations

import torch
import torch.nn.functional as F


def _visible(T, T_kv, causal, key_padding_mask, cu_seqlens, position_ids, window, device):
    """(B or 1, 1, T, T_kv): the mask as transformers defines it, query i at i + T_kv − T."""
    i = torch.arange(T, device=device)[:, None] + T_kv - T
    j = torch.arange(T_kv, device=device)
    visible = (j <= i if causal else torch.ones(T, T_kv, dtype=torch.bool, device=device))[None]
    if window is not None:
        visible = visible & (j > i - window)
    if position_ids is not None:
        visible = visible & (j >= i - position_ids[:, :, None])
    if cu_seqlens is not None:
        sequence = torch.bucketize(j, cu_seqlens, right=True)
        visible = visible & (sequence[:, None] == sequence) & (j < cu_seqlens[-1])
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None]
    return visible[:, None]


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
    """As transformers' eager_attention_forward: softmax in fp32 at least, rounded, times v. Empty rows give 0."""
    T, T_kv, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    visible = _visible(T, T_kv, causal, key_padding_mask, cu_seqlens, position_ids, window, q.device)
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~visible, torch.finfo(q.dtype).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    weights = F.dropout(weights.masked_fill(~visible, 0.0), dropout_p)
    return (weights @ v).transpose(1, 2).contiguous().transpose(1, 2)
