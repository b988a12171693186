"""Attention through transformers' attention interface: our kernel where a batch is padded or packed, SDPA elsewhere.

SDPA runs FlashAttention-2 on an A100, which is on record ahead of Triton for plain causal batches; a mask would take it
off that path, and ours skips what a mask hides. FASTLORA_ATTENTION forces either.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, flash_attention_mask

from .. import ops
from ._fused import Fused, why_not_plain

NAME = "fastlora"


def register() -> None:
    """Add our key to transformers' registries of attention and mask functions; nothing that is there changes."""
    AttentionInterface.register(NAME, attend)
    # Without a mask function of its own, transformers drops the padding of an implementation it does not know.
    AttentionMaskInterface.register(NAME, make_mask)


def make_mask(*, kv_length: int, **kwargs: Any) -> torch.Tensor | None:
    """The padding (B, T) where queries and keys are the same tokens; over a cache, which may be static, SDPA's mask."""
    queries = kwargs["q_length"] if "q_length" in kwargs else len(kwargs["cache_position"])  # transformers 5 and 4
    make = flash_attention_mask if queries == kv_length else ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    return make(kv_length=kv_length, **kwargs)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query (B, H, T, D), key and value (B, H_kv, T_kv, D), attention_mask what make_mask or the caller gave.

    Returns (B, T, H, D) and no weights.
    """
    if query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)
    positions = None
    if attention_mask is None:
        positions = _packed(kwargs.get("position_ids"), query.shape[0])
    window = kwargs.get("sliding_window")
    why = _why_not(query, key, attention_mask, positions, window, dropout)
    sdpa = why is not None or _chosen_sdpa(query, key, attention_mask, positions, window)
    if isinstance(module, Fused) and (why or not sdpa):
        module.count("attention", why)
    if not sdpa:
        out = ops.flash_attention(
            query,
            key,
            value,
            scale=scaling,
            key_padding_mask=None if attention_mask is None else attention_mask.bool(),
            position_ids=positions,
            window=window,
        )
        return out.transpose(1, 2), None
    if attention_mask is None or attention_mask.dim() == 2:
        attention_mask = _full_mask(query, key, attention_mask, positions, window)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)


def _packed(position_ids: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """position_ids if they hold more than one sequence in a row: asked once per forward, since a GPU must answer.

    A traced graph cannot ask, and takes them as they are.
    """
    if position_ids is None or position_ids.dim() != 2:
        return None
    if not torch.compiler.is_compiling():
        # The answer stays on the tensor until it is written to; inference tensors do not tell when.
        version = None if position_ids.is_inference() else position_ids._version
        known, packed = getattr(position_ids, "_fastlora_packed", (None, False))
        if known is None or known != version:
            packed = bool((position_ids.diff(dim=-1) != 1).any())
            position_ids._fastlora_packed = version, packed  # type: ignore[attr-defined]
        if not packed:
            return None
    return position_ids.expand(batch, -1)


def _why_not(query, key, mask, positions, window, dropout) -> str | None:
    if mask is not None and mask.dim() != 2:
        return "a mask of the caller's own: SDPA"
    if dropout:
        return "attention dropout: SDPA"
    if not 32 <= query.shape[-1] <= 256:
        return f"head dimension {query.shape[-1]}: SDPA"
    return why_not_plain(query, key)


def _plain(query, key, mask, positions, window) -> bool:
    """Whether SDPA's own causal flag says all there is to say."""
    return mask is None and positions is None and window is None


def _chosen_sdpa(query, key, mask, positions, window) -> bool:
    forced = os.environ.get("FASTLORA_ATTENTION")
    if forced not in (None, "flash", "sdpa"):
        raise ValueError(f"FASTLORA_ATTENTION is {forced!r}, needs 'flash' or 'sdpa'")
    return forced == "sdpa" if forced else _plain(query, key, mask, positions, window)


def _full_mask(query, key, padding, positions, window) -> torch.Tensor | None:
    """The (B, 1, T, T) mask that says the same; None where SDPA's own causal flag does."""
    if _plain(query, key, padding, positions, window):
        return None
    keys = torch.arange(key.shape[2], device=query.device)
    at = keys[:, None]
    seen = (keys <= at)[None]
    if window is not None:
        seen = seen & (keys > at - window)
    if positions is not None:
        seen = seen & (keys >= at - positions[:, :, None])
    if padding is not None:
        seen = seen & padding[:, None, :].bool()
    return seen[:, None]
