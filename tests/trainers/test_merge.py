"""After training patched, merging the adapters keeps the model's logits."""

from __future__ import annotations

import copy

import pytest
import torch
from budget import FACTOR
from patching.tiny import InFloat64, batch

import fastlora

from .curves import train
from .test_loops import loop


def logits(model: torch.nn.Module, seed: int) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch(seed, rows=4)["input_ids"]).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_logits_are_those_of_the_adapters(dtype, record_property):
    """Against float64 with adapters on: merged and patched, merged and unpatched, err no more than unpatched PEFT with
    adapters on, by the budget's factor and one rounding. In bf16 that rounding is the merged weights' own."""
    errors = []
    for seed in range(4):
        case = loop(autocast=torch.bfloat16 if dtype == torch.bfloat16 else None)
        model = train(case, seed, "adapters", dtype=dtype).model
        plain = fastlora.unpatch(copy.deepcopy(model))
        with InFloat64():
            truth = logits(copy.deepcopy(plain).double(), seed)
        adapters_on = logits(plain, seed)
        merged = model.merge_and_unload()
        assert any(row.fused for row in fastlora.explain(merged).rows)
        found = [logits(merged, seed), logits(fastlora.unpatch(merged), seed), adapters_on, truth.to(dtype)]
        errors.append([(one.double() - truth).norm() / truth.norm() for one in found])
    patched, unpatched, yardstick, rounding = torch.tensor(errors).square().mean(0).sqrt()
    figures = f"merged: patched {patched:.2e}, unpatched {unpatched:.2e}; adapters on {yardstick:.2e}, rounding {rounding:.1e}"
    record_property("figures", figures)
    print(figures)
    assert max(patched, unpatched) <= FACTOR * yardstick + rounding, figures
