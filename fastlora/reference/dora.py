from __future__ import annotations

import torch


def dora(
    y: torch.Tensor,
    magnitude: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As PEFT's DoraLinearLayer, from the direction's output."""
    adapted = weight + scaling * (lora_b @ lora_a).to(weight.dtype)
    norms = torch.linalg.norm(adapted, dim=1).to(weight.dtype).detach()
    out = (magnitude / norms).to(y.dtype) * y
    return out if bias is None else out + bias
