"""Ten steps of a tiny Llama on two ranks: what every engine's training has in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from patching.tiny import batch, llama, lora
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import fastlora
from fastlora.modules.lazy_logits import Product

STEPS = 10
ROWS = 2
WHEN = ("never", "before", "after")
SIZES = {"hidden_size": 32, "intermediate_size": 48}


class Engine(NamedTuple):
    """wrap gives the model a loop calls; state gives every parameter whole, by the engine's own means."""

    wrap: Callable[[nn.Module], Any]
    state: Callable[[Any], dict[str, torch.Tensor]]
    build: Callable[[], nn.Module]
    strict: bool  # everything can be fused
    shared: bool = False  # both ranks see the whole batch


def adapters(dtype: torch.dtype = torch.float32) -> nn.Module:
    return lora(llama(1, dtype=dtype, **SIZES)).train()


def whole() -> nn.Module:
    """Without an adapter, every weight trained."""
    return llama(1, **SIZES).train()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """A learning rate at which rounding is not amplified from step to step."""
    return torch.optim.AdamW(trained(model), lr=1e-3, weight_decay=0.0, foreach=False)


def rows(step: int, rank: int | None) -> dict[str, torch.Tensor]:
    """The rows of a rank, or of both."""
    whole = batch(step, 2 * ROWS, 12)
    return whole if rank is None else {name: t[rank * ROWS :][:ROWS] for name, t in whole.items()}


def train(engine: Engine, when: str, out: Path) -> None:
    """Train, and leave losses, weights and the plan in ``out``; of adapters, the files that PEFT writes."""
    model = engine.build()
    if when == "before":
        fastlora.patch(model)
    wrapped = engine.wrap(model)
    if when == "after":
        fastlora.patch(wrapped, strict=engine.strict)
    rank = None if engine.shared else dist.get_rank()
    update = None if hasattr(wrapped, "step") else optimizer(wrapped)
    losses = {}
    for i in range(STEPS):
        loss = wrapped(**rows(i, rank), use_cache=False).loss
        if update is None:  # DeepSpeed's engine has its own
            wrapped.backward(loss)
            wrapped.step()
        else:
            loss.backward()
            update.step()
            update.zero_grad()
        losses[f"loss {i}"] = loss.detach().float()
    plan = fastlora.explain(wrapped)
    state = engine.state(wrapped)
    if dist.get_rank() == 0:
        out.mkdir(parents=True)
        torch.save({"losses": losses, "plan": plan, "text": str(plan)}, out / "run.pt")
        if hasattr(model, "peft_config"):
            # PEFT 0.21 looks in the state of an FSDP1 model for names with FSDP1's prefixes, which are not there.
            writer = engine.build() if isinstance(wrapped, FullyShardedDataParallel) else model
            writer.save_pretrained(out, state_dict=state, save_embedding_layers=False)
        else:
            torch.save(state, out / "state.pt")
    if hasattr(wrapped, "destroy"):
        wrapped.destroy()


def train_all(engines: dict[str, Engine], out: str) -> None:
    for name, engine in engines.items():
        for when in WHEN:
            with patch.object(Product, "compute", None):  # whatever an engine does with outputs, it reads no logits
                train(engine, when, Path(out) / name / when)
