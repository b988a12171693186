from __future__ import annotations

import torch
import torch.nn.functional as F


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As PEFT's lora.Linear without dropout, with adapters in the dtype of x."""
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * scaling
