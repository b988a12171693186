"""One provider's training step, and the gate that judges its loss and gradients against float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from . import models, truth
from .gate import Red, budget, judge_mean
from .providers import environment
from .setting import Batch, Setting, batch
from .step_providers import BY_NAME, Globals, StepProvider


class Trainee:
    """One provider's model, its optimizer, and the step that is timed."""

    def __init__(self, provider: StepProvider, base: nn.Module, setting: Setting) -> None:
        self.provider, self.setting, self.globals = provider, setting, Globals()
        with self._its_own():
            self.model = provider.build(base, setting.rank, setting.dropout)
            if setting.checkpointing:
                self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(models.adapters(self.model).values(), lr=1e-5)

    def gradients(self, made: Batch) -> tuple[float, truth.Gradients]:
        """Loss and adapter gradients with dropout off."""
        models.set_dropout(self.model, 0.0)
        self.optimizer.zero_grad()
        loss = self._forward_backward(made)
        found = {name: p.grad.clone() for name, p in models.adapters(self.model).items()}
        self.optimizer.zero_grad()
        models.set_dropout(self.model, self.setting.dropout)
        return loss.item(), found

    def terms(self, made: Batch) -> torch.Tensor:
        """The loss of every counted token, from the logits, with dropout off."""
        models.set_dropout(self.model, 0.0)
        labels = truth.shifted(made["labels"])
        with torch.no_grad(), self._its_own(), self.setting.context():
            logits = self.model(**{name: t for name, t in made.items() if name != "labels"}).logits
            losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        models.set_dropout(self.model, self.setting.dropout)
        return losses[labels.flatten() != -100]

    def step(self, made: Batch) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self._forward_backward(made)
        self.optimizer.step()
        return loss

    def forward(self, made: Batch) -> torch.Tensor:
        """The loss, its graph kept."""
        with self._its_own():
            return self._loss(made)

    @contextmanager
    def _its_own(self) -> Iterator[None]:
        """The provider's variables and its names in transformers' module."""
        with environment(self.provider.environment), self.globals.active():
            yield

    def _forward_backward(self, made: Batch) -> torch.Tensor:
        with self._its_own():
            loss = self._loss(made)
            loss.backward()
        return loss.detach()

    def _loss(self, made: Batch) -> torch.Tensor:
        with self.setting.context():
            return self.model(**made).loss


class Gate:
    """The truth of one setting and the errors of the eager yardsticks, made as they are asked for."""

    def __init__(self, setting: Setting, base: nn.Module) -> None:
        self.setting, self.base = setting, base
        self.made = batch(setting)
        self._truth: tuple[float, torch.Tensor, truth.Gradients] | None = None
        self._yardsticks: dict[str, tuple[torch.Tensor, dict[str, float]]] = {}

    def check(self, trainee: Trainee) -> dict[str, float]:
        """Raise Red if a figure is over budget; return every figure's error as a fraction of what it may be.

        Gradients are pooled over layers and projections, A and B apart, each tensor relative to its own size.
        """
        if self._truth is None:
            model = models.with_lora(models.shared_copy(self.base), self.setting.rank, 0.0, fp32_adapters=True)
            self._truth = truth.step(model, self.setting.shape, self.made)
        loss, errors, rounding = self._errors(trainee)
        name = trainee.provider.yardstick
        if name not in self._yardsticks:
            same = name == trainee.provider.name
            eager = trainee if same else Trainee(BY_NAME[name], self.base, self.setting)
            self._yardsticks[name] = eager.terms(self.made), errors if same else self._errors(eager)[1]
        terms, eager_errors = self._yardsticks[name]
        judge_mean(loss, self._truth[0], terms, self._truth[1], "loss")
        of_budget = {}
        for figure, error in errors.items():
            allowed = budget.FACTOR * eager_errors[figure] + rounding[figure]
            if not error <= allowed:  # NaN is red
                raise Red(f"{figure}: relative error {error:.3e} > {budget.FACTOR} × eager {eager_errors[figure]:.3e}")
            of_budget[figure] = round(error / allowed, 3)
        return of_budget

    def _errors(self, trainee: Trainee) -> tuple[float, dict[str, float], dict[str, float]]:
        """Loss, and the relative errors of the gradients and of rounding the truth to their dtype."""
        loss, gradients = trainee.gradients(self.made)
        squares = {kind: {"dA": [], "dB": []} for kind in ("error", "rounding")}
        for name, expected in self._truth[2].items():
            figure, ours = "dA" if "lora_A" in name else "dB", gradients[name]
            for kind, other in (("error", ours), ("rounding", expected.to(ours.dtype))):
                squares[kind][figure].append(((other.double() - expected).norm() / expected.norm()).item() ** 2)
        pooled = {kind: {f: (sum(s) / len(s)) ** 0.5 for f, s in two.items()} for kind, two in squares.items()}
        return loss, pooled["error"], pooled["rounding"]
