"""A patched model that is off is red, in training and in decoding."""

import pytest
import torch

from bench import parity
from bench.setting import Setting
from bench.step_providers import BY_NAME

BF16, FASTLORA = torch.bfloat16, BY_NAME["fastlora"]


def off(model):
    """fastlora with one scaling five per cent off."""
    model.base_model.model.model.layers[1].mlp.down_proj.scaling["default"] *= 1.05
    return FASTLORA.after(model)


def tokens_off(model):
    """fastlora with a mask that no longer hides the padding."""
    model = FASTLORA.after(model)
    forward = model.forward
    model.forward = lambda **inputs: forward(**inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])})
    return model


def judged(setting):
    return [*parity.steps(setting, ("fastlora",)), *parity.decoding(setting, ("fastlora",))]


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_a_sound_model_is_green(dtype):
    lines = judged(Setting("tiny", dtype, "cpu", 2, 40, 2))
    assert [line["parity"] for line in lines] == [True] * 5, lines
    assert len({line["mode"] for line in lines}) == 5


def test_a_wrong_scaling_is_red(monkeypatch):
    monkeypatch.setitem(BY_NAME, "fastlora", FASTLORA._replace(after=off))
    assert [line["parity"] for line in judged(Setting("tiny", torch.float32, "cpu", 2, 40, 2))] == [False] * 5


def test_a_lost_padding_is_red(monkeypatch):
    monkeypatch.setitem(BY_NAME, "fastlora", FASTLORA._replace(after=tokens_off))
    lines = list(parity.decoding(Setting("tiny", torch.float32, "cpu", 2, 40, 2), ("fastlora",)))
    assert [line["parity"] for line in lines] == [False] * 2 and "over budget" in lines[0]["why"]


def test_a_tile_that_fails_is_red(monkeypatch):
    """What serves in its place is right, and hides it."""
    lost = [[], ["swiglu triton"]]
    monkeypatch.setattr(parity._tiles, "given_up", lambda: lost.pop(0))
    line = parity._judged(lambda: {"dA": 0.5})
    assert line["parity"] is False and line["why"] == "parity is red: a tile does not run here: swiglu triton"
