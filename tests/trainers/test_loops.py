"""Loops of one's own, and Lightning's."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from patching.tiny import assert_fused, batch

import fastlora
from fastlora.modules._fused import Fused

from .curves import STEPS, judge, llama, lora
from .options import OPTIONS, assert_taken


def loop(*, autocast: torch.dtype | None = None, scaler: bool = False, compiled: bool = False):
    """A training loop as people write it. Compiled where the model is patched: the yardstick is eager."""

    def run(model, exact, made):
        call = torch.compile(model, backend="aot_eager") if compiled else model
        context = torch.autocast("cpu", autocast) if autocast and not exact else nullcontext()
        scale = torch.amp.GradScaler("cpu", enabled=scaler and not exact, init_scale=2.0**10)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        made(call)
        call = call if any(isinstance(module, Fused) for module in model.modules()) else model
        losses = []
        model.train()
        for i in range(STEPS):
            with context:
                loss = call(**batch(i % 2, rows=4), use_cache=False).loss
            scale.scale(loss).backward()
            scale.step(optimizer)
            scale.update()
            optimizer.zero_grad()
            losses.append(loss)
        return losses

    return run


LOOPS = {
    "plain": {},
    "autocast bf16": {"autocast": torch.bfloat16},
    "autocast fp16, GradScaler": {"autocast": torch.float16, "scaler": True},
}


@pytest.mark.parametrize("name", LOOPS)
def test_loop(name, record_property):
    model, figures = judge(loop(**LOOPS[name]))
    record_property("figures", figures)
    assert_fused(model, calls=STEPS)


def test_compiled(record_property):
    """The compiled model runs our operators, which test_compile of tests/patching sees in its graph."""
    torch.compiler.reset()
    _, figures = judge(loop(compiled=True), runs=1, num_hidden_layers=1)
    record_property("figures", figures)


def test_the_budget_notices(monkeypatch):
    """A scaling that is off by one part in ten thousand."""
    patch = fastlora.patch

    def off(model):
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling = {name: value * (1 + 1e-4) for name, value in module.scaling.items()}
        return patch(model)

    monkeypatch.setattr(fastlora, "patch", off)
    with pytest.raises(AssertionError, match="drift"):
        judge(loop(), runs=1, places=("adapters",))


def lightning_case(callback: dict | None = None, **options):
    import lightning.pytorch as pl

    from fastlora.integrations import LightningCallback

    class Module(pl.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, inputs, _):
            loss = self.model(**inputs, use_cache=False).loss
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.05)

    def run(model, exact, made):
        own = {**options, "precision": "64-true"} if exact else options
        module = Module(model)
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=STEPS, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=None if callback is None else [LightningCallback(**callback)], **own,
        )  # fmt: skip
        made(model)
        data = torch.utils.data.DataLoader([batch(i % 2, rows=4) for i in range(STEPS)], batch_size=None)
        trainer.fit(module, data)
        return module.losses

    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision, record_property):
    model, figures = judge(lightning_case(precision=precision))
    record_property("figures", figures)
    assert_fused(model, calls=STEPS)


@pytest.mark.filterwarnings("ignore")
def test_lightning_callback(capsys):
    model = lora(llama(0))
    lightning_case({"strict": True})(model, exact=False, made=lambda model: model)
    assert_fused(model, calls=STEPS)
    assert "fastlora: 28 of 28 modules are fused" in capsys.readouterr().out
    with pytest.raises(fastlora.NotFused, match="gelu"):
        lightning_case({"strict": True})(lora(llama(0, hidden_act="gelu")), exact=False, made=lambda model: model)
    lightning_case(OPTIONS)(model, exact=False, made=lambda model: model)
    assert_taken(model)
