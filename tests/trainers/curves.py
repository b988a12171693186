"""Ten steps with a trainer, patched and not: losses and adapters drift from float64 training by the same amount.

The budget is that of docs/numerics.md, 'Loss curves'. The drift of the losses is the rms over the steps of their distance
from those of the same training in float64; the drift of the adapters is the rms over their tensors of the relative
error of what training did to them, ‖w − w*‖ / ‖w* − w₀‖. Over its seeds, patched training may drift (rms) as far as the
unpatched run that drifted most, by the budget's factor and one rounding of the truth; an excess is drawn again, since the
drift of ten losses is in part luck.

The optimizer is SGD: Adam divides a gradient by its own size, and makes a whole step of what rounding left of a zero.
Where the model is patched does not show in a single bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from budget import FACTOR
from patching.tiny import InFloat64, Tensors, lora
from patching.tiny import llama as tiny_llama
from torch import nn

import fastlora

STEPS = 10
MOST = 6
PLACES = ("adapters", "base", "trainer")


class Training(NamedTuple):
    losses: torch.Tensor
    adapters: Tensors
    before: Tensors
    model: nn.Module


# Trains the model; calls `made` with the model when the trainer is made; returns the loss of every step.
Case = Callable[..., Sequence[torch.Tensor]]


def adapters(model: nn.Module) -> Tensors:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name.removeprefix("_orig_mod."): p.detach().double().clone() for name, p in trained.items()}


def llama(seed: int, **config) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "kv_heads": (4, 2)[seed % 2], "vocab_size": 300}
    return tiny_llama(seed, **{**sizes, **config})


def train(
    case: Case, seed: int, patched: str | None, exact: bool = False, attach: Callable = lora, **config
) -> Training:
    """One training. ``patched``: the base before it gets adapters, the model with them, or the trainer's model."""
    base = llama(seed, **config)
    model = attach(fastlora.patch(base) if patched == "base" else base)
    if patched == "adapters":
        fastlora.patch(model)
    if exact:
        model.double()
    found: dict[str, Any] = {}

    def made(model: nn.Module) -> None:
        found.update(model=fastlora.patch(model) if patched == "trainer" else model, before=adapters(model))

    torch.manual_seed(seed)
    losses = case(model, exact=exact, made=made)
    assert len(losses) == STEPS
    return Training(torch.stack([loss.detach() for loss in losses]), adapters(found["model"]), **found)


def truth(case: Case, seed: int, **config) -> Training:
    return _truth(case, seed, **{**config, "dtype": torch.float32})


@functools.cache
def _truth(case: Case, seed: int, **config) -> Training:
    """Kept: several forms of one training have one truth."""
    with InFloat64():
        found = train(case, seed, None, exact=True, **config)
    assert found.losses.dtype == torch.float64
    return found


def drift(found: Training, exact: Training) -> torch.Tensor:
    """Of the losses, and of the adapters."""
    assert found.adapters.keys() == exact.adapters.keys()
    losses = (found.losses.double() - exact.losses).square().mean().sqrt()
    errors = [(found.adapters[name] - w).norm() / (w - exact.before[name]).norm() for name, w in exact.adapters.items()]
    return torch.stack([losses, torch.stack(errors).square().mean().sqrt()])


def judge(
    case: Case, *, exact: Case | None = None, runs: int = 2, places: Sequence[str] = PLACES, **config
) -> tuple[nn.Module, str]:
    """Hold patched training against float64 and unpatched training; the last patched model, and the figures.

    Args:
        case: the training.
        exact: what to train in float64, where that is not ``case``: what is said to be the same. Trained once per
            seed, whoever asks.
        runs: how many, each with another seed; an excess is drawn again, up to ``MOST`` in all.
        places: where to patch. All give the same bits.
        attach: gives the base its adapters; LoRA on all linear layers, if the trainer does not do it.
        config: of the Llama.
    """
    drifts = []
    for seed in range(MOST):
        true = truth(exact or case, seed, **config)
        patched = train(case, seed, places[0], **config)
        rounded = true._replace(
            losses=true.losses.float(), adapters={name: w.float() for name, w in true.adapters.items()}
        )
        unpatched = train(case, seed, None, **config)
        drifts.append(torch.stack([drift(one, true) for one in (patched, unpatched, rounded)]))
        assert drifts[-1].isfinite().all(), "an adapter was not trained"
        every = torch.stack(drifts)
        ours, _, rounding = every.square().mean(0).sqrt()
        largest = every[:, 1].amax(0)
        if seed + 1 >= runs and (ours <= FACTOR * largest + rounding).all():
            break
    figures = "; ".join(
        f"{what}: drift {a:.2e}, unpatched {b:.2e}, rounding {c:.1e}"
        for what, a, b, c in zip(("losses", "adapters"), ours, largest, rounding, strict=True)
    )
    print(f"{figures}, {len(drifts)} runs")
    assert (ours <= FACTOR * largest + rounding).all(), figures
    for place in places[1:]:
        other = train(case, seed, place, **config)
        assert torch.equal(other.losses, patched.losses), place
        assert all(torch.equal(w, patched.adapters[name]) for name, w in other.adapters.items()), place
    return patched.model, figures
