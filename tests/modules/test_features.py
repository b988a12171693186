"""PEFT's features, alone and in pairs: loss, logits and every gradient within the budget of a float64 PEFT model.

Where adapters drop, the unpatched and the float64 model are given the masks that ours drew.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import combinations
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from masks import Drawn, dropping, share
from patching.tiny import MANY, Errors, assert_fused, assert_same, in_float64, llama, lora, randomise, step
from peft import LoraConfig
from torch import nn

import fastlora

TRAINS = ("norm", "embed_tokens", "lm_head", "v_proj.base_layer.weight", "up_proj.base_layer.weight")


class Feature(NamedTuple):
    """What it changes in the base, in the adapter's config, and afterwards."""

    base: Mapping[str, Any] = MappingProxyType({})
    config: Mapping[str, Any] = MappingProxyType({})
    apply: Any = None
    autocast: bool = False


def _second_adapter(model: nn.Module, config: dict[str, Any]) -> None:
    config = {"target_modules": "all-linear", **config, "r": 3, "lora_alpha": 5, "bias": "none"}
    model.add_adapter("second", LoraConfig(**config))
    model.base_model.set_adapter(["default", "second"])
    randomise(model)


def _train_the_base(model: nn.Module, config: dict[str, Any]) -> None:
    for name, parameter in model.named_parameters():
        if any(part in name for part in TRAINS):
            parameter.requires_grad_()


def _checkpoint(model: nn.Module, config: dict[str, Any], reentrant: bool = False) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()


FEATURES = {
    "dropout": Feature(config={"lora_dropout": 0.3}),
    "base bias": Feature(base={"attention_bias": True, "mlp_bias": True}, config={"bias": "lora_only"}),
    "lora bias": Feature(config={"lora_bias": True}),
    "rslora": Feature(config={"use_rslora": True}),
    "ranks": Feature(config={"rank_pattern": {"q_proj": 7, "o_proj": 1}, "alpha_pattern": {"v_proj": 3}}),
    "q and v": Feature(config={"target_modules": ["q_proj", "v_proj"]}),
    "two adapters": Feature(apply=_second_adapter),
    "dora": Feature(config={"use_dora": True}),
    "bf16 base": Feature(base={"dtype": torch.bfloat16}),
    "autocast": Feature(autocast=True),
    "base trains": Feature(apply=_train_the_base),
    "checkpointing": Feature(apply=_checkpoint),
}
IMPOSSIBLE = {("lora bias", "dora")}  # peft refuses
PAIRS = [pair for pair in combinations(FEATURES, 2) if pair not in IMPOSSIBLE]


def build(names: tuple[str, ...], seed: int) -> nn.Module:
    chosen = [FEATURES[name] for name in names]
    base, config = {}, {}
    for feature in chosen:
        base |= feature.base
        config |= feature.config
    # Multi-head and grouped attention in turn.
    model = lora(llama(seed, hidden_size=32, intermediate_size=48, kv_heads=(4, 2)[seed % 2], **base), **config)
    for feature in chosen:
        if feature.apply:
            feature.apply(model, config)
    return model


def run(names: tuple[str, ...], model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=any(FEATURES[name].autocast for name in names)):
        return step(model, seed, use_cache=False)


def exact(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Without checkpointing, whose second pass is outside the mode that makes float64 of float32."""
    model.gradient_checkpointing_disable()
    return step(model, seed, use_cache=False)


def judge(names: tuple[str, ...], seeds: int) -> nn.Module:
    """The loss, a single number whose error is luck, is judged over many seeds only."""
    errors = Errors()
    for seed in range(seeds):
        model = build(names, seed)
        fused = fastlora.patch(copy.deepcopy(model))
        with Drawn() as drawn:
            ours = run(names, fused, seed)
        if drawn.masks:
            first = len(list(dropping(model)))
            # Checkpointing comes back layer by layer from the last, and draws the same again.
            again = drawn.masks[first:]
            layers = len(again) // 2
            assert_all_equal(again[layers:] + again[:layers], drawn.masks[:first] if again else [])
            share(model, drawn.masks[:first])
        truth = in_float64(model, exact, seed)
        half = any(name in ("bf16 base", "autocast") for name in names)
        results = [ours, run(names, model, seed), truth]
        if seeds < MANY:
            results = [{name: t for name, t in found.items() if name != "loss"} for found in results]
        errors.add(*results, torch.bfloat16 if half else torch.float32)
    errors.check()
    return fused


def assert_all_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("name", FEATURES)
def test_alone(name):
    """As exact as PEFT, on the average of many seeds; and all of it fused."""
    assert_fused(judge((name,), MANY))


@pytest.mark.parametrize("names", PAIRS, ids=" + ".join)
def test_in_pairs(names):
    model = judge(names, 2)
    reasons = {row.why for row in fastlora.explain(model).unfused}
    if "dora" in names and "dropout" in names:
        assert reasons == {"DoRA with dropout"}
    elif "dora" in names and "two adapters" in names:
        assert reasons == {"DoRA among several adapters"}
    else:
        assert_fused(model)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["dropout", "two adapters", "dora"])
def test_checkpointing_changes_nothing(name, reentrant):
    """Neither a mask nor a bit of a gradient."""
    names = (name,) if name == "dropout" or name == "dora" else (name, "dropout")
    checkpointed = build(names, 0)
    _checkpoint(checkpointed, {}, reentrant)
    assert_same(run(names, fastlora.patch(checkpointed), 0), run(names, fastlora.patch(build(names, 0)), 0))
    assert_fused(checkpointed)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "q_proj.base_layer", "lora_B.default.bias", "magnitude"])
def test_the_judge_notices(part, monkeypatch):
    """A parameter of the fused model that is off by one part in ten thousand."""
    names = ("lora bias",) if part.endswith("bias") else ("dora",) if part == "magnitude" else ("dropout",)
    patch = fastlora.patch

    def off(model):
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.data.mul_(1 + 1e-4)
        return patch(model)

    monkeypatch.setattr(fastlora, "patch", off)
    with pytest.raises(AssertionError, match="error"):
        judge(names, 2)


def test_the_judge_notices_a_mask(monkeypatch):
    """Masks that go to the wrong projections."""

    rightly = share
    monkeypatch.setitem(globals(), "share", lambda model, masks: rightly(model, [masks[1], masks[0], *masks[2:]]))
    with pytest.raises(AssertionError, match="error"):
        judge(("dropout",), 2)
