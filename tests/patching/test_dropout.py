"""LoRA dropout: PEFT's semantics with masks of our own.

For a batch of one token the gradient of lora_A is an outer product with the dropped input, so it tells the mask. The
unpatched model is then given that mask in place of its dropout, and must agree. (One token attends to itself whatever
q and k say: their gradients are zero.)
"""

import copy

import pytest
import torch
from torch import nn

import fastlora

from .tiny import MANY, VOCAB, Errors, assert_fused, assert_same, in_float64, llama, lora, step


class Mask(nn.Module):
    def __init__(self, kept: torch.Tensor, rate: float) -> None:
        super().__init__()
        self.factor = kept / (1 - rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor.to(x.dtype)


def one_token(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[seed % VOCAB]])
    found = step(model, seed, input_ids=ids, labels=ids, shift_labels=(ids + 1) % VOCAB)
    return {name: t for name, t in found.items() if "q_proj" not in name and "k_proj" not in name}


def masks(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What was kept, per projection, read off the gradients of lora_A."""
    return {n.partition(".lora_A")[0]: (g != 0).any(0).double() for n, g in found.items() if "lora_A" in n}


def fix(model: nn.Module, kept: dict[str, torch.Tensor], rate: float) -> nn.Module:
    for path, mask in kept.items():
        model.get_submodule(path).lora_dropout["default"] = Mask(mask, rate)
    return model


def build(seed: int = 0, rate: float = 0.3) -> nn.Module:
    return lora(llama(seed), lora_dropout=rate)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_results_under_the_same_masks(rate):
    errors, dropped = Errors(), []
    for seed in range(2 * MANY):
        model = build(seed, rate)
        unpatched = copy.deepcopy(model)
        ours = one_token(fastlora.patch(model), seed)
        kept = masks(ours)
        fix(unpatched, kept, rate)
        errors.add(ours, one_token(unpatched, seed), in_float64(unpatched, one_token, seed), torch.float32)
        dropped += [1 - mask for mask in kept.values()]
    errors.check()
    assert_fused(model, calls=1)
    dropped = torch.cat(dropped)
    deviation = (rate * (1 - rate) / len(dropped)) ** 0.5
    assert abs(dropped.mean() - rate) < 4 * deviation, "the rate"


def test_masks_are_independent():
    """Per projection, per layer and per step; the same from the same seed."""
    model = fastlora.patch(build())
    first, again, other = (masks(one_token(model, seed)) for seed in (1, 1, 2))
    assert_same(first, again)
    assert all(not torch.equal(first[name], other[name]) for name in first)
    assert len(first) == 2 * 5
    assert len({tuple(mask[:48].tolist()) for mask in first.values()}) == 2 * 5


def test_a_rate_of_one():
    """Drops the adapters altogether."""
    ours = step(fastlora.patch(build(rate=1.0)))
    bare = step(fastlora.patch(build().base_model.unload()))
    assert_same({k: ours[k] for k in ("loss", "logits")}, {k: bare[k] for k in ("loss", "logits")})
    assert all(not gradient.any() for name, gradient in ours.items() if "lora" in name)


def test_not_in_eval_mode():
    model, plain = fastlora.patch(build()).eval(), fastlora.patch(build(rate=0.0)).eval()
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_draws_from_torchs_generator():
    """A step moves the generator on, and two steps in a row drop differently."""
    model = fastlora.patch(build()).train()
    ids = torch.arange(12).view(2, 6)
    torch.manual_seed(0)
    first, second = (model(ids, labels=ids).loss for _ in range(2))
    assert first != second
    torch.manual_seed(0)
    assert model(ids, labels=ids).loss == first


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_drops_the_same_again(reentrant):
    model = build()
    stored = step(fastlora.patch(build()), use_cache=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(step(fastlora.patch(model), use_cache=False), stored)
    assert_fused(model)
