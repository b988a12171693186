"""The parity gate: outputs and gradients of a provider within the error budget of float64 truth, or no time for it.

The budget is the tests' own (tests/budget.py): err(provider) ≤ 1.1 · err(eager in the same dtype) + one rounding.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from .case import Case, Function, Inputs, Provider, tensors
from .machine import ROOT

Figures = dict[str, torch.Tensor]


class Red(AssertionError):
    """The provider is further from the truth than the budget allows; the message names the figure."""


def _load_budget() -> ModuleType:
    spec = importlib.util.spec_from_file_location("budget", ROOT / "tests" / "budget.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


budget = _load_budget()


class Witness:
    """Truth in float64 and the eager yardstick in the dtype of the case, for as many draws of the inputs as it takes.

    The largest error of one draw is a matter of luck on both sides. Who is over budget on the first draw is judged on
    the average of several, as the tests judge.
    """

    def __init__(self, case: Case, device: str, dtype: torch.dtype) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        self._first: dict[Function, tuple[Figures, Figures]] = {}

    def check(self, provider: Provider) -> None:
        """Raise Red if the provider is over budget; whatever the provider raises passes through."""
        witness = provider.witness or self.case.reference
        budgets: dict[str, Any] = {}
        excess: list[str] = []
        draw, draws = 0, 1
        while draw < draws:
            inputs = self.case.prepare(self.device, self.dtype, draw)
            eager, truth = self._yardstick(witness, inputs, draw)
            ours = self._figures(provider.run, inputs)
            for name, expected in truth.items():
                if expected.dim() == 0:
                    terms = self.case.terms
                    assert terms, f"{self.case.op} returns a number and needs the terms it is the mean of"
                    judge_mean(ours[name].item(), expected.item(), terms(**inputs), terms(**_double(inputs)), name)
                    continue
                one = budgets.setdefault(name, budget.Budget(name))
                try:
                    one.add(ours[name], eager[name].to(ours[name].dtype), expected)
                except AssertionError as error:
                    raise Red(str(error)) from None
            excess = [text for one in budgets.values() if (text := one.excess())]
            if excess and draw == 0:
                small = sum(t.numel() for t in truth.values()) < 1e6
                draws = 16 if small else 4
            draw += 1
        if excess:
            raise Red(excess[0])

    def _yardstick(self, witness: Function, inputs: Inputs, draw: int) -> tuple[Figures, Figures]:
        """Eager's figures and the truth; kept for the first draw, which every provider sees."""
        if draw == 0 and witness in self._first:
            return self._first[witness]
        pair = self._figures(witness, inputs), self._figures(witness, _double(inputs))
        if draw == 0:
            self._first[witness] = pair
        return pair

    def _figures(self, run: Function, inputs: Inputs) -> Figures:
        """Outputs by number and gradients by name; the incoming gradients are the same for every provider."""
        wrt = [inputs[name] for name in self.case.wrt]
        outputs = tensors(run(**inputs))
        figures = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
        if wrt:
            gradients = torch.autograd.grad(outputs, wrt, random_like(outputs, seed=1))
            figures |= {f"d{name}": g for name, g in zip(self.case.wrt, gradients, strict=True)}
        return figures


def judge_mean(ours: float, truth: float, terms: torch.Tensor, true_terms: torch.Tensor, name: str) -> None:
    """Raise Red for a mean over budget: further from the truth than 1.1 times the rms error of eager's own terms.

    The error of eager's mean itself would be one sample, and as good as zero by luck; it is never more than that rms.
    """
    yardstick = (terms.double() - true_terms).square().mean().sqrt().item()
    allowed = budget.FACTOR * yardstick + abs(truth) * torch.finfo(torch.float32).eps / 2
    # Written so that NaN is red.
    if not abs(ours - truth) <= allowed:
        raise Red(f"{name}: over budget: {ours:.9g} against {truth:.9g}, allowed error {allowed:.3g}")


def random_like(outputs: tuple[torch.Tensor, ...], seed: int) -> list[torch.Tensor]:
    """Incoming gradients: the same normal numbers whatever the dtype of the outputs."""
    made = []
    for i, out in enumerate(outputs):
        generator = torch.Generator(out.device).manual_seed(seed + i)
        made.append(torch.randn(out.shape, generator=generator, device=out.device).bfloat16().to(out.dtype))
    return made


def _double(inputs: Inputs) -> Inputs:
    def double(value: object) -> object:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return {name: double(value) for name, value in inputs.items()}


def reason(provider: Provider, check: Callable[[Provider], None]) -> tuple[bool | None, str | None]:
    """(green, why not): (True, None), (False, over which budget) or (None, why it cannot run)."""
    if provider.why:
        return None, provider.why
    try:
        check(provider)
    except Red as error:
        return False, f"parity is red: {error}"
    except Exception as error:  # a provider that cannot run says why, and the others run on
        first = str(error).strip().splitlines()[:1]
        return None, f"{type(error).__name__}: {first[0] if first else ''}"[:300]
    return True, None
