"""What a fused model may get wrong though every layer of it is right. Each fault is of the fused classes alone."""

from __future__ import annotations

import pytest
import torch

from fastlora.modules import _fused
from fastlora.modules import llama as fast


def _spoil(monkeypatch: pytest.MonkeyPatch, cls: type, change) -> None:
    forward = cls.forward

    def spoiled(self, *args, **kwargs):
        change(kwargs)
        return forward(self, *args, **kwargs)

    spoiled.__signature__ = forward.__signature__
    monkeypatch.setattr(cls, "forward", spoiled)


def drop_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer does not know the argument by its name, as when transformers renamed it."""

    def change(kwargs):
        kwargs.update({name: None for name in ("past_key_values", "cache") if name in kwargs})

    _spoil(monkeypatch, fast.LlamaDecoderLayer, change)


def drop_padding(monkeypatch: pytest.MonkeyPatch, decoding: bool = False) -> None:
    """Everywhere, or only where one token is run over a cache."""

    def change(kwargs):
        if kwargs.get("attention_mask") is not None and not (decoding and kwargs["input_ids"].shape[1] > 1):
            kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])

    _spoil(monkeypatch, fast.LlamaModel, change)


def shift_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is run over a cache stands one place too early."""

    def change(kwargs):
        if kwargs["input_ids"].shape[1] == 1:
            kwargs["position_ids"] = kwargs["position_ids"] - 1

    _spoil(monkeypatch, fast.LlamaModel, change)


class _Fading:
    """Logits that are a tenth less every time they are read."""

    def __init__(self, logits) -> None:
        self.logits, self.factor = logits, 1.0

    def __getitem__(self, index):
        read = self.logits[index] * self.factor
        self.factor *= 0.9
        return read


def fade_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_logits(monkeypatch, _Fading)


def _replace_logits(monkeypatch: pytest.MonkeyPatch, make) -> None:
    """Those of a training step, of the fused model."""
    forward = fast.LlamaForCausalLM.forward

    def spoiled(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        if kwargs.get("labels") is not None:
            outputs.logits = make(outputs.logits)
        return outputs

    spoiled.__signature__ = forward.__signature__
    monkeypatch.setattr(fast.LlamaForCausalLM, "forward", spoiled)


def detach_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_logits(monkeypatch, lambda logits: logits[...].detach())


def never_run(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """No call of this projection is counted."""
    count = _fused.Fused.count
    monkeypatch.setattr(_fused.Fused, "count", lambda self, name, *why: name == part or count(self, name, *why))
