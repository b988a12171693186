"""Whole-model LoRA training steps: the setting, the gate, and providers timed in turns."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import machine, memory, models, record, truth
from .gate import Red, budget, judge_mean
from .harness import interleave
from .record import Record
from .step_providers import BY_NAME, PROVIDERS, Globals, StepProvider

# What is judged in float64 where the timed model has more: layers, weights, and tokens.
_FEW_LAYERS, _FEW_WEIGHTS = 8, 2e9
_FEW_TOKENS = {"cpu": 2048, "cuda": 4096}


@dataclass(frozen=True)
class Setting:
    """One row group of the table."""

    model: str
    dtype: torch.dtype
    device: str
    rows: int
    sequence: int
    layers: int
    rank: int = 16
    dropout: float = 0.0
    batch: str = "dense"
    checkpointing: bool = False
    autocast: bool = True

    @property
    def shape(self) -> models.Shape:
        return models.shape(self.model, self.layers)

    def record(self) -> Record:
        return {
            "bench": "train_step",
            "op": self.model,
            "shape": {"B": self.rows, "T": self.sequence, "layers": self.layers, "r": self.rank},
            "dtype": str(self.dtype).removeprefix("torch."),
            "mode": " ".join(
                filter(
                    None,
                    (
                        "" if self.batch == "dense" else self.batch,
                        f"dropout={self.dropout:g}" if self.dropout else "",
                        "checkpointing" if self.checkpointing else "",
                        "" if self.autocast or self.dtype == torch.float32 else "no autocast",
                        "" if memory.allocator() == "default" else f"allocator={memory.allocator()}",
                    ),
                )
            ),
        }

    def context(self) -> AbstractContextManager:
        """Autocast in the model's dtype, as transformers' Trainer(bf16=True) trains; nothing for fp32."""
        if self.autocast and self.dtype != torch.float32:
            return torch.autocast(self.device, self.dtype)
        return nullcontext()


def batch(setting: Setting, seed: int = 2) -> dict[str, torch.Tensor]:
    """Random tokens: dense rows; rows of random length, padded; or sequences of random length in one packed row."""
    g = torch.Generator().manual_seed(seed)
    B, T = setting.rows, setting.sequence
    ids = torch.randint(setting.shape.vocab, (B, T), generator=g)
    made = {"input_ids": ids, "labels": ids.clone()}
    if setting.batch == "padded":
        lengths = torch.randint(T // 4, T + 1, (B, 1), generator=g)
        made["attention_mask"] = (torch.arange(T) < lengths).long()
        made["labels"][made["attention_mask"] == 0] = -100
    elif setting.batch == "packed":
        starts = torch.rand(B * T, generator=g) < 4 / T
        starts[0] = True
        index = torch.arange(B * T)
        positions = index - torch.where(starts, index, 0).cummax(0).values
        made = {name: t.view(1, -1) for name, t in made.items()} | {"position_ids": positions[None]}
        made["labels"][made["position_ids"] == 0] = -100
    return {name: t.to(setting.device) for name, t in made.items()}


def tokens(made: dict[str, torch.Tensor]) -> int:
    """Real tokens of a batch."""
    mask = made.get("attention_mask")
    return int(mask.sum()) if mask is not None else made["input_ids"].numel()


class Trainee:
    """One provider's model, its optimizer, and the step that is timed."""

    def __init__(self, provider: StepProvider, base: nn.Module, setting: Setting) -> None:
        self.provider, self.setting, self.globals = provider, setting, Globals()
        with self.globals.active():
            self.model = provider.build(base, setting.rank, setting.dropout)
            if setting.checkpointing:
                self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(models.adapters(self.model).values(), lr=1e-5)

    def gradients(self, made: dict[str, torch.Tensor]) -> tuple[float, truth.Gradients]:
        """Loss and adapter gradients with dropout off."""
        models.set_dropout(self.model, 0.0)
        self.optimizer.zero_grad()
        loss = self._forward_backward(made)
        found = {name: p.grad.clone() for name, p in models.adapters(self.model).items()}
        self.optimizer.zero_grad()
        models.set_dropout(self.model, self.setting.dropout)
        return loss.item(), found

    def terms(self, made: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of every counted token, from the logits, with dropout off."""
        models.set_dropout(self.model, 0.0)
        labels = truth.shifted(made["labels"])
        with torch.no_grad(), self.globals.active(), self.setting.context():
            logits = self.model(**{name: t for name, t in made.items() if name != "labels"}).logits
            losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        models.set_dropout(self.model, self.setting.dropout)
        return losses[labels.flatten() != -100]

    def step(self, made: dict[str, torch.Tensor]) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self._forward_backward(made)
        self.optimizer.step()
        return loss

    def _forward_backward(self, made: dict[str, torch.Tensor]) -> torch.Tensor:
        with self.globals.active():
            with self.setting.context():
                loss = self.model(**made).loss
            loss.backward()
        return loss.detach()


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


def measure(
    setting: Setting, names: tuple[str, ...], seconds: float, ceilings: machine.Ceilings, rounds: int = 3
) -> Iterator[Record]:
    """Gate every provider, time the green ones in turns, then say each one's peak memory."""
    base = models.base_model(setting.shape, setting.dtype, setting.device)
    judged = _judged(setting)
    gate = Gate(judged, base if judged == setting else models.base_model(judged.shape, setting.dtype, setting.device))
    common = setting.record()
    trainees: dict[str, Trainee] = {}
    gates: dict[str, dict[str, float]] = {}
    for provider in PROVIDERS:
        if provider.name not in names:
            continue
        refused = common | {"provider": provider.name, "title": provider.title}
        if why := provider.why_not(setting.device, setting.dtype):
            yield refused | {"parity": None, "why": why}
            continue
        try:
            trainee = Trainee(provider, gate.base, judged)
            gates[provider.name] = gate.check(trainee)
            trainees[provider.name] = trainee if judged == setting else Trainee(provider, base, setting)
        except Red as error:
            yield refused | {"parity": False, "why": f"parity is red: {error}"}
        except Exception as error:
            yield refused | {"parity": None, "why": f"{type(error).__name__}: {str(error).strip()[:200]}"}
        gc.collect()
    made = batch(setting)
    del gate
    thunks = {name: lambda t=t: t.step(made) for name, t in trainees.items()}
    if judged != setting or setting.device == "cuda":  # else the gate has run them
        thunks = dict(_that_fit(thunks))
    thunks["floor"] = _floor_thunk(base, setting)
    times = interleave(thunks, setting.device, seconds, least=rounds, warm=1 if setting.device == "cuda" else 0)
    real, flops = tokens(made), setting.shape.flops(made["input_ids"].numel(), setting.sequence)
    floor_ms = record.spread(times.pop("floor"))
    for name, t in trainees.items():
        line = common | {"provider": name, "title": t.provider.title, "parity": True, "gate": gates[name]}
        if name not in times:
            yield line | {"why": "out of memory"}
            continue
        ms = record.spread(times[name])
        yield line | {
            "ms": ms,
            "tokens_per_s": round(1e3 * real / ms["median"], 1),
            "mfu": round(flops / (ms["median"] / 1e3) / ceilings.flops, 4),
            "floor_ms": floor_ms["median"],
            "fraction": round(floor_ms["median"] / ms["median"], 4),
            "peak_bytes": memory.peak_cuda(thunks[name]) if setting.device == "cuda" else None,
            "explain": _explain(t.model) if "fastlora" in name else None,
        }


def _judged(setting: Setting) -> Setting:
    """The setting that is judged: the timed one, or fewer layers and tokens of it where float64 would not fit."""
    most = _FEW_TOKENS[setting.device]
    sequence = min(setting.sequence, most)
    few = max(1, min(_FEW_LAYERS, int(_FEW_WEIGHTS // setting.shape.layer_weights())))
    return replace(
        setting, layers=min(setting.layers, few), sequence=sequence, rows=max(1, min(setting.rows, most // sequence))
    )


def _that_fit(thunks: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, run in thunks.items():
        try:
            run()
        except torch.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()
            continue
        yield name, run


def _floor_thunk(base: nn.Module, setting: Setting):
    """The frozen products alone, forward and dx, of every projection and the head: what no exact step runs below."""
    weights = [m.weight for m in base.modules() if isinstance(m, nn.Linear)]
    M = setting.rows * setting.sequence
    like = {w.shape for w in weights}
    x = {s: torch.randn(M, s[1], device=setting.device).to(setting.dtype) for s in like}
    dy = {s: torch.randn(M, s[0], device=setting.device).to(setting.dtype) for s in like}

    def run() -> None:
        with torch.no_grad():
            for w in weights:
                x[w.shape] @ w.t()
                dy[w.shape] @ w

    return run


def _explain(model: nn.Module) -> str:
    import fastlora

    plan = fastlora.explain(model)
    left = sorted({f"{row.runs}: {row.why}" for row in plan.unfused})
    return f"{plan.backend} " + (f"Left alone: {'; '.join(left)}" if left else "Everything is fused.")


def largest_batch(setting: Setting, provider: StepProvider, base: nn.Module, most: int = 256) -> int:
    """The most rows of the setting's sequence length that one training step fits on the GPU; doubling, then halving."""
    trainee = Trainee(provider, base, setting)

    def fits(rows: int) -> bool:
        try:
            trainee.step(batch(replace(setting, rows=rows)))
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            trainee.optimizer.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()

    low = 0
    high = 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def layers_that_fit(model: str, dtype: torch.dtype, device: str, tokens: int, checkpointing: bool) -> int:
    """Layers of a model whose weights and PEFT's activations (204 KB per token and layer at 7B width) fit the GPU."""
    shape = models.shape(model)
    if device != "cuda":
        return shape.layers
    free = 0.85 * torch.cuda.mem_get_info()[0] - 4 * shape.vocab * shape.hidden * dtype.itemsize
    free -= tokens * shape.vocab * 12  # logits: bf16, fp32 and their gradient
    kept = 2 * shape.hidden if checkpointing else 204e3 * shape.hidden / 4096
    return max(1, min(shape.layers, int(free / (shape.layer_weights() * dtype.itemsize + kept * tokens))))
