from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .lora_group import lora_group


def lora_mlp(
    x: torch.Tensor,
    gate: tuple,
    up: tuple,
    down: tuple,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    masks: Sequence[torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """As transformers' LlamaMLP behind its norm, with PEFT's lora.Linear; masks: what each adapter keeps, in order."""
    first = len(gate[2]) + len(up[2])
    before, after = (masks[:first], masks[first:]) if masks is not None else (None, None)
    g, u, *_ = lora_group(x, [gate, up], norm_weight=norm_weight, eps=eps, masks=before)
    residual = None if norm_weight is None else x
    return lora_group(F.silu(g) * u, [down], residual=residual, masks=after)[0]
