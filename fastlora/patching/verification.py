"""What verify returns: checks, and a table a person can read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..budget import FACTOR, Figures
from .plan import Row

# What is no module of it, where a module is named.
WHOLE = "the whole model"
TRAINING, AGAIN, RUNS = "logits of a training step", "logits, read again", "fused calls"
# How greedy tokens are made, and logits in inference.
CACHED, UNCACHED, UNFUSED = "over a cache", "without a cache", "unfused"
_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Check:
    """One quantity of one module against its budget.

    Attributes:
        module: name in ``model.named_modules()``, or WHOLE.
        quantity: its output, the gradient of its input, or of a parameter; of the whole model logits, greedy tokens.
        figures: errors in the root mean square and in the maximum; none of what is empty. Of greedy tokens one, how far
            below the best logit the worst choice is, beside twice what a logit may err.
        wrong: what no error measures, such as NaN, or a module that did not run; None where there is nothing of it.
    """

    module: str
    quantity: str
    figures: tuple[Figures, ...]
    wrong: str | None = None

    @property
    def times(self) -> float:
        """The error in budgets, in the worse of the two norms: over 1 is over budget."""
        if self.wrong:
            return torch.inf
        return max((figures.times for figures in self.figures), default=0.0)

    @property
    def exceeded(self) -> bool:
        return self.times > 1


@dataclass(frozen=True)
class Verification:
    """What verify found. ``print(verification)`` is a table: of each quantity the layer that is nearest its budget.

    Attributes:
        checks: everything that was compared.
        passed_through: what ran the original forward, with the reason; compared with itself.
        loss, unfused_loss: of the batch, by the whole model, fused and not. For the eye: they are not judged.
        fused: what the plan calls fused, of all that a training step runs, with the fused calls of that step.
        tokens: the greedy tokens of the sample's prompts: over a cache, without a cache, and unfused.
        skipped: what was not checked, and why.
    """

    checks: tuple[Check, ...]
    passed_through: tuple[Row, ...]
    loss: torch.Tensor
    unfused_loss: torch.Tensor
    fused: tuple[Row, ...] = ()
    tokens: Mapping[str, list[list[int]]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    @property
    def exceeded(self) -> tuple[Check, ...]:
        """The checks over budget, worst first; those of the whole model, which has the errors of all modules, last."""
        over = (check for check in self.checks if check.exceeded)
        return tuple(sorted(over, key=lambda check: (check.module == WHOLE, -check.times)))

    @property
    def within(self) -> bool:
        return not self.exceeded

    def lines(self) -> list[tuple[str, ...]]:
        """Of each quantity the worst layer, then all that is over budget: module, quantity, errors, budgets."""
        worst: dict[tuple[str, str], Check] = {}
        for check in self.checks:
            key = _LAYER.sub("*", check.module), check.quantity
            if key not in worst or check.times > worst[key].times:
                worst[key] = check
        shown = dict.fromkeys((*worst.values(), *self.exceeded))
        return [("module", "quantity", "norm", "error", "original's", "allowed", "of budget"), *map(_line, shown)]

    def verdict(self) -> str:
        """One sentence."""
        losses = f"Loss of the whole model {float(self.loss):.6g}, unfused {float(self.unfused_loss):.6g}."
        if self.within:
            return f"Within the budget: all {len(self.checks)} quantities. {losses}"
        worst = self.exceeded[0]
        return (
            f"OVER BUDGET: {len(self.exceeded)} of {len(self.checks)} quantities, worst the {worst.quantity} of"
            f" {worst.module}{f': {worst.wrong}' if worst.wrong else ''}. {losses}"
        )

    def notes(self) -> str:
        """How to read the table, and what was not fused."""
        rule = (
            f"Allowed: {FACTOR} × the original's error (× its luck, where drawn again) + one rounding, against float64."
            " Of each quantity, the worst."
        )
        ran = sum(row.fused > 0 for row in self.fused)
        lines = [
            rule,
            *self._greedy(),
            f"{ran} of {len(self.fused)} modules said to be fused ran so in a training step.",
        ]
        lines += [f"Not checked: {reason}" for reason in self.skipped]
        reasons = dict.fromkeys(row.why for row in self.passed_through)
        return "\n".join([*lines, *(f"Not fused, so compared with itself: {reason}" for reason in reasons)])

    def _greedy(self) -> list[str]:
        """A sentence about the greedy tokens, where there are any."""
        rows = self.tokens.get(CACHED)
        if not rows:
            return []
        words = []
        for how in (UNCACHED, UNFUSED):
            differ = sum(a != b for a, b in zip(rows, self.tokens.get(how, rows), strict=True))
            words.append(f"other {how} in {differ}" if differ else f"the same {how}")
        return [f"Greedy tokens of {len(rows)} prompts over a cache: {', '.join(words)}."]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "within": self.within,
            "loss": float(self.loss),
            "unfused_loss": float(self.unfused_loss),
            "checks": [
                {
                    "module": check.module,
                    "quantity": check.quantity,
                    "exceeded": check.exceeded,
                    "wrong": check.wrong,
                    "figures": [figures._asdict() for figures in check.figures],
                }
                for check in self.checks
            ],
            "tokens": dict(self.tokens),
            "skipped": list(self.skipped),
            "fused": [asdict(row) for row in self.fused],
            "passed_through": [asdict(row) for row in self.passed_through],
        }

    def __str__(self) -> str:
        lines = self.lines()
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        text.insert(1, "  ".join("─" * width for width in widths))
        return "\n".join([*text, "", self.notes(), self.verdict()])


def _line(check: Check) -> tuple[str, ...]:
    if check.wrong or not check.figures:
        return check.module, check.quantity, check.wrong or "empty", "", "", "", "OVER" if check.wrong else ""
    f = max(check.figures, key=lambda figures: figures.times)
    times = f"{f.times:.2f}" if f.times < 1000 else f"{f.times:.1e}"
    numbers = f"{f.ours:.2e}", f"{f.eager:.2e}", f"{f.allowed:.2e}", f"{times}{' OVER' if check.exceeded else ''}"
    return check.module, check.quantity, f.norm, *numbers
