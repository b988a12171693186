"""The error budget: a fused op may be as far from float64 truth as the eager code it replaces, plus one rounding.

    err(ours) <= 1.1 · err(eager in the same dtype) + err(one rounding of the truth)

in the root mean square and in the maximum. Nothing in it is chosen by hand, so it tightens and loosens with the
computation: a long fp32 sum has the error that eager's own sum has.

The rounding is what each norm makes of it. In the root mean square it is the rounding that happens: truth rounded to
the dtype, minus truth. In the maximum it is the largest rounding step, one ulp of the largest element of truth: where
a small element is what cancellation left of large terms, it carries their rounding and not its own.

Errors are random and both sides are samples: the largest of a few, or the rms of a single number, is a matter of luck.
Who draws inputs passes several draws, over which each figure is averaged. Where a verdict is one of many, of tensors
of any size, an average of 16 is still luck for some: there the budget is widened by eager's own luck, the ratio of its
largest error on one draw to its average. For the rms of a large tensor that is next to 1, for a single number about 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FACTOR = 1.1


def ulp(number: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Spacing of the dtype's numbers at each number, in float64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(number.double().abs().clamp(min=info.smallest_normal)).exponent
    return torch.ldexp(torch.full_like(number, info.eps, dtype=torch.float64), exponent - 1)


class OverBudget(AssertionError):
    """What no further draw can mend: another shape, NaN or infinity."""


class Figures(NamedTuple):
    """In one norm: the error of ours, of eager, and of one rounding of the truth; and eager's luck."""

    norm: str
    ours: float
    eager: float
    rounding: float
    luck: float = 1.0

    @property
    def allowed(self) -> float:
        return FACTOR * self.luck * self.eager + self.rounding

    @property
    def times(self) -> float:
        """The error in budgets: over 1 is over budget."""
        return self.ours / self.allowed if self.allowed else (torch.inf if self.ours else 0.0)


class Budget:
    """The errors of one quantity, over one draw or several.

    Args:
        name: what to call the quantity.
        luck: widen the budget by eager's largest error over its average one. The first draw is averaged, and left out
            of this: it may be of another kind than the rest, which are drawn alike.
    """

    def __init__(self, name: str, luck: bool = False) -> None:
        self.name = name
        self._luck = luck
        self._squares: list[torch.Tensor] = []
        self._maxima: list[torch.Tensor] = []
        self._dtype = ""

    def add(self, ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> None:
        """Take one draw in.

        Raises:
            OverBudget: the shapes differ, or a number is NaN or infinite.
        """
        name = self.name
        _need(truth.dtype == torch.float64, f"{name}: the truth is {truth.dtype}")
        _need(ours.shape == truth.shape == eager.shape, f"{name}: {ours.shape}, needs {truth.shape}")
        self._dtype = str(ours.dtype).removeprefix("torch.")
        if not truth.numel():
            return
        _need(bool(truth.isfinite().all()), f"{name}: the truth is not finite: choose other inputs")
        bad = int((~ours.isfinite()).sum())
        _need(not bad, f"{name}: over budget: {bad} of {ours.numel()} elements are NaN or infinite")
        errors = torch.stack([t.double().sub(truth).flatten() for t in (ours, eager, truth.to(ours.dtype))]).abs()
        finite = bool(errors.isfinite().all())
        _need(finite, f"{name}: eager or one rounding overflows {self._dtype}: choose other inputs")
        self._squares.append(errors.square().mean(1))
        self._maxima.append(errors.amax(1))
        self._maxima[-1][2] = ulp(truth.abs().max(), ours.dtype)

    def figures(self) -> tuple[Figures, ...]:
        """In the root mean square and in the maximum; none of an empty tensor."""
        if not self._squares:
            return ()
        squares, maxima = torch.stack(self._squares), torch.stack(self._maxima)
        rms = Figures("rms", *squares.mean(0).sqrt().tolist())
        maximum = Figures("max", *maxima.mean(0).tolist())
        if self._luck:
            rms = rms._replace(luck=_luck(squares[1:, 1]) ** 0.5)
            maximum = maximum._replace(luck=_luck(maxima[1:, 1]))
        return rms, maximum

    def excess(self) -> str | None:
        """The figures where the budget is exceeded, None where it is kept."""
        for figures in self.figures():
            norm, own, eager, rounding, luck = figures
            if own > figures.allowed:
                factor = f"{FACTOR}" if luck == 1 else f"{FACTOR} × luck {luck:.2f}"
                return (
                    f"{self.name}: over budget in {norm}: error {own:.3e} > {factor} × eager {eager:.3e} + rounding "
                    f"{rounding:.3e} = {figures.allowed:.3e} ({figures.times:.3g} times; {self._dtype}, "
                    f"{len(self._squares)} draws)"
                )
        return None


def _luck(errors: torch.Tensor) -> float:
    """The largest over the average; 1 of nothing, and where all are zero."""
    return float(errors.max() / errors.mean()) if len(errors) and errors.any() else 1.0


def _need(kept: bool, message: str) -> None:
    if not kept:
        raise OverBudget(message)
