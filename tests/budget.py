"""The error budget of fastlora.budget, as an assertion."""

from __future__ import annotations

import torch

from fastlora.budget import FACTOR, Budget, ulp

__all__ = ["FACTOR", "Budget", "assert_within_budget", "ulp"]


def assert_within_budget(ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, name: str) -> None:
    """Fail, with the figures, unless ours is within the budget of truth.

    Args:
        ours: what the op returned; its dtype is the one judged.
        eager: the same quantity from the eager code at that precision: the yardstick.
        truth: the same quantity in float64, from the same rounded inputs; finite.
        name: what to call the quantity in the message.
    """
    budget = Budget(name)
    budget.add(ours, eager, truth)
    excess = budget.excess()
    assert excess is None, excess
