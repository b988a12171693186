from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .rms_norm import rms_norm
from .rope import rope


def _project(n, weight, bias, branches, masks):
    y = F.linear(n, weight, bias)
    for (a, b, scaling, rate), mask in zip(branches, masks, strict=True):
        kept = n if mask is None else n * mask / (1 - rate)
        y = y + F.linear(F.linear(kept, a.to(n.dtype)), b.to(n.dtype)) * scaling
    return y


def lora_group(
    x: torch.Tensor,
    projections: Sequence[tuple],
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    masks: Sequence[torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, ...]:
    """As transformers' norm, PEFT's lora.Linear and the rotary embedding one after the other; masks: what each adapter
    keeps, in order."""
    n = x if norm_weight is None else rms_norm(x, norm_weight, eps).to(projections[0][0].dtype)
    left = list(masks) if masks is not None else [None] * sum(len(one[2]) for one in projections)
    y = []
    for weight, bias, branches in projections:
        mine, left = left[: len(branches)], left[len(branches) :]
        y.append(_project(n, weight, bias, branches, mine))
    if rotary is not None:
        D = rotary[0].shape[-1]
        q, k = (one.unflatten(-1, (-1, D)).transpose(1, 2) for one in y[:2])
        y[:2] = (one.transpose(1, 2).flatten(-2).to(y[0].dtype) for one in rope(q, k, *rotary))
    if residual is not None:
        y[0] = residual + y[0]
    return tuple(y) if norm_weight is None else (*y, x)
