from __future__ import annotations

import torch
import torch.nn.functional as F


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | float | torch.Tensor | None = None,
) -> torch.Tensor:
    """As transformers' lm_head and ForCausalLMLoss, labels unshifted: full logits, upcast to fp32 at least."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    loss = F.cross_entropy(
        logits, labels.flatten(), ignore_index=ignore_index, reduction="sum" if num_items is not None else reduction
    )
    if num_items is not None:
        loss = loss / num_items
    return loss.view(labels.shape) if reduction == "none" else loss
