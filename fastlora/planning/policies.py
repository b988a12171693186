"""Which layers keep their activations and which compute them again: the least work that fits."""

from __future__ import annotations

from dataclasses import dataclass

from .activations import KEEP, LAYER, MLP, POLICIES


@dataclass(frozen=True)
class StepBytes:
    """What one training step adds to a model, for a given number of tokens.

    Attributes:
        saved: by policy, what one layer keeps.
        work: what the backward of a layer needs beside it.
        loss: what is alive beside the layers between forward and backward, the loss's own chunk included.
        outside: the part of it that stays to the end of the step.
    """

    saved: dict[str, float]
    work: float
    loss: float
    outside: float

    def peak(self, layers: int, mlp: int, layer: int) -> float:
        """The most bytes at once with ``layer`` layers checkpointed, then ``mlp`` recomputing the MLP, the rest kept.

        The backward of a layer needs all of it, kept or computed anew, when the layers after it are gone. So the last
        layer is the one to keep: recomputing it saves nothing where the memory runs high.
        """
        counts = {LAYER: layer, MLP: mlp, KEEP: layers - layer - mlp}
        total = sum(n * self.saved[policy] for policy, n in counts.items())
        last = next(self.saved[policy] for policy in POLICIES if counts[policy])
        return max(total + self.loss, total - last + self.saved[KEEP] + self.work + self.outside)


def least(layers: int, need: StepBytes, budget: float, costs: dict[str, float]) -> tuple[str, ...] | None:
    """The policy of every layer, first to last, that fits the budget and costs least; None where none fits.

    All layers being alike, only the numbers of each policy matter, and the order by what they keep.
    """
    best: tuple[float, float, tuple[str, ...]] | None = None
    for layer in range(layers + 1):
        for mlp in range(layers - layer + 1):
            peak = need.peak(layers, mlp, layer)
            if peak <= budget:
                cost = layer * costs[LAYER] + mlp * costs[MLP]
                if best is None or (cost, peak) < best[:2]:
                    best = cost, peak, (LAYER,) * layer + (MLP,) * mlp + (KEEP,) * (layers - layer - mlp)
                break  # more would only cost more
    return best[2] if best else None


def counts(policies: tuple[str, ...]) -> dict[str, int]:
    """How many layers follow each policy."""
    return {policy: policies.count(policy) for policy in POLICIES}
