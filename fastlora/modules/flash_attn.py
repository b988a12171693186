"""flash-attn 2 and 3, where a user has installed them: what they can serve, and the call."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch

from ..kernels._tiles import METHODS

# By transformers' names.
PACKAGES = METHODS["attention"].packages
FA2, FA3 = PACKAGES
_DEVICES = ("cuda",)


class Sequences(NamedTuple):
    """A packed batch, all rows one after the other: where sequences begin and end (n + 1,) int32, and the longest."""

    bounds: torch.Tensor
    longest: int


def why_not(name: str, query: torch.Tensor, kind: str, dropout: float) -> str | None:
    """Why it cannot serve queries (B, H, T, D) of a kind of batch."""
    if query.device.type not in _DEVICES:
        return f"{name} needs a GPU"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"{name} needs bf16 or fp16, not {str(query.dtype).removeprefix('torch.')}"
    if query.shape[-1] > 256:
        return f"{name} takes head dimensions to 256, not {query.shape[-1]}"
    if kind == "padded":
        return f"{name} takes no padding"
    if name == FA3 and dropout:
        return f"{name} has no dropout"
    return None


def sequences(positions: torch.Tensor) -> Sequences:
    """Of each token's index (B, T) in its own sequence. Waits for the device: once per forward, not per layer."""
    begins = (positions == 0).flatten().nonzero()[:, 0]
    bounds = torch.cat([begins, begins.new_tensor([positions.numel()])]).int()
    return Sequences(bounds, int(bounds.diff().max()))


def attend(
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: Sequences | None,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """Causal attention of (B, H, T, D) with (B, H_kv, T, D), as (B, T, H, D)."""
    package = importlib.import_module(PACKAGES[name])
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    options = {
        "softmax_scale": scale,
        "causal": True,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **({"dropout_p": dropout} if name == FA2 else {}),
    }
    if packed is None:
        out = package.flash_attn_func(q, k, v, **options)
    else:
        bounds, longest = packed
        flat = (t.flatten(0, 1) for t in (q, k, v))
        out = package.flash_attn_varlen_func(*flat, bounds, bounds, longest, longest, **options)
    out = out[0] if isinstance(out, tuple) else out  # flash-attn 3 returned the log-sum-exp too in its first versions
    return out.view(q.shape)
