"""Tiny models, and the judge: a patched model may err no more than the unpatched one, float64 being the truth."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from budget import FACTOR, ulp
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import fastlora
from fastlora.modules import lora as reader
from fastlora.patching.exact import InFloat64

VOCAB = 101
MANY = 16
# The cache of keys and values, as an argument and in outputs: transformers 5.24 renamed it.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
Tensors = dict[str, torch.Tensor]


def llama(
    seed: int = 0, *, kv_heads: int = 2, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **config
) -> LlamaForCausalLM:
    """Two layers, four heads, and weights large enough that every one of them matters to the loss."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": kv_heads, "max_position_embeddings": 64}
    model = LlamaForCausalLM(
        LlamaConfig(**{**sizes, **heads, "initializer_range": 0.15, "attn_implementation": attention, **config})
    )
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype)


def lora(
    model: nn.Module, *, adapter: str = "default", task_type: str | None = "CAUSAL_LM", autocast=True, **config
) -> PeftModel:
    """LoRA with a B that is not zero, so that every gradient is there to be compared."""
    chosen = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": task_type, **config})
    peft_model = get_peft_model(model, chosen, adapter_name=adapter, autocast_adapter_dtype=autocast)
    return randomise(peft_model)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every lora_B, and every bias of one, values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(seed: int = 0, rows: int = 3, tokens: int = 13) -> Tensors:
    """input_ids and labels, some of which are ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, tokens), generator=generator)
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: nn.Module) -> Tensors:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, seed: int = 0, **inputs) -> Tensors:
    """Loss, logits and what gradients there are, of one training step on ``batch(seed)``, dropout seeded."""
    model.train().zero_grad()
    torch.manual_seed(seed)
    outputs = model(**{**batch(seed), **inputs})
    if outputs.loss.requires_grad:
        outputs.loss.backward()
    return {"loss": outputs.loss.detach(), "logits": outputs.logits[...].detach(), **gradients(model)}


def padded_step(model: nn.Module, seed: int = 0, side: str = "right") -> Tensors:
    """A step on rows of unequal length; what is computed for the padding is nobody's business."""
    mask = torch.ones(3, 13, dtype=torch.int64)
    mask[1, slice(9, None) if side == "right" else slice(None, 4)] = 0
    found = step(model, seed, attention_mask=mask, labels=batch(seed)["labels"].masked_fill(mask == 0, -100))
    return found | {"logits": found["logits"][mask.bool()]}


def in_float64(model: nn.Module, run: Callable[[nn.Module, int], Tensors], seed: int) -> Tensors:
    """What ``run`` gives on a float64 copy of the model."""
    exact = copy.deepcopy(model).double()
    with InFloat64():
        truth = run(exact, seed)
    assert all(t.dtype == torch.float64 for t in truth.values()), "the truth was computed in less than float64"
    return truth


def judge(
    build: Callable[[int], nn.Module],
    run: Callable[[nn.Module, int], Tensors] = step,
    *,
    exact: Callable[[nn.Module, int], Tensors] | None = None,
    seeds: int = 4,
    whole: bool = True,
    head: bool = True,
    **options,
) -> nn.Module:
    """Run models of several seeds unpatched and patched, hold both against float64, and return the last one, patched.

    Args:
        exact: what to run in float64, where that is not ``run``.
        seeds: 4 tell whether the right thing is computed, ``MANY`` whether it is as exact as unpatched.
        whole: everything is expected to be fused, and to have run so.
        head: the loss, too, is expected to have run fused.
        options: of ``fastlora.patch``.
    """
    errors = Errors()
    for seed in range(seeds):
        model = build(seed)
        truth = in_float64(model, exact or run, seed)
        eager = run(model, seed)
        assert fastlora.patch(model, **options) is model
        errors.add(run(model, seed), eager, truth, next(model.parameters()).dtype)
    errors.check()
    if whole:
        assert_fused(model, head=head)
    return model


class Errors:
    """The errors of patched and unpatched runs of several seeds: in loss, in logits, and in the rest.

    Rounding errors are random, so no single tensor is judged, but a run: by the root mean square over its tensors of
    their relative errors, once in the rms norm and once in the maximum over each row. Over ``MANY`` seeds, patched
    runs may err no more than unpatched ones do on average, by the budget's factor and one rounding of the truth; over
    a few, or in a single number such as the loss, no more than the unpatched tensor that erred most.
    """

    def __init__(self) -> None:
        self.groups: dict[str, list[torch.Tensor]] = {}
        self.runs = 0

    def add(self, ours: Tensors, eager: Tensors, truth: Tensors, dtype: torch.dtype) -> None:
        assert ours.keys() == eager.keys() == truth.keys()
        self.runs += 1
        for name, t in truth.items():
            assert ours[name].shape == t.shape, name
            assert ours[name].dtype == eager[name].dtype, name
            size = t.square().mean().sqrt()
            if size == 0:
                assert not ours[name].any(), f"{name} should be zero"
                continue
            errors = [ours[name].double() - t, eager[name].double() - t, t.to(dtype).double() - t, ulp(t, dtype)]
            rows = (torch.stack(errors) / size).reshape(4, -1, t.shape[-1] if t.dim() else 1)
            rms, largest = rows.square().mean((1, 2)), rows.square().amax(2).mean(1)
            found = torch.stack([rms[[0, 1, 2]], largest[[0, 1, 3]]])
            self.groups.setdefault(name if name in ("loss", "logits") else "the rest", []).append(found)

    def check(self) -> None:
        assert self.groups, "nothing was compared"
        for group, tensors in self.groups.items():
            squares = torch.stack(tensors)
            average, worst = squares.mean(0).sqrt(), squares.amax(0).sqrt()
            yardstick = average if self.runs >= MANY and group != "loss" else worst
            for i, norm in enumerate(("rms", "max")):
                error, eager, rounding = average[i, 0], yardstick[i, 1], average[i, 2]
                if group != "loss" or norm == "max":  # of a single number there is no mean
                    assert error <= FACTOR * eager + rounding, (
                        f"{group}: {norm} error {error:.2e}, unpatched {eager:.2e}, rounding {rounding:.1e}"
                    )


def assert_same(ours: Tensors, theirs: Tensors) -> None:
    """The same tensors, bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def row(model: nn.Module, path: str) -> fastlora.patching.Row:
    """The line of explain whose path ends in this; the first layer's, where there are several."""
    return next(r for r in fastlora.explain(model).rows if r.path.endswith(path))


def assert_fused(model: nn.Module, calls: int | None = None, head: bool = True) -> None:
    """Everything that can be fused is, and ran so: that many times, or at least once.

    The attention kernel is left out: where nothing is padded or packed, SDPA's may be chosen.
    """
    plan = fastlora.explain(model)
    assert plan.rows
    assert plan.unfused == ()
    for r in plan.rows:
        assert r.passed == 0, r
        if r.path.endswith(".attention") or not (head or "linear_cross_entropy" not in r.runs):
            continue
        assert (r.fused > 0) if calls is None else (r.fused == calls), r


def misread(monkeypatch, module, factor):
    """From here on the fused layers read the scaling of one projection wrong, by a factor."""
    read = reader._read

    def wrong(projection, *args):
        found = read(projection, *args)
        if projection is module:
            (branch,) = found.projection.branches
            branch = branch._replace(scaling=factor * branch.scaling)
            found = found._replace(projection=found.projection._replace(branches=(branch,)))
        return found

    monkeypatch.setattr(reader, "_read", wrong)
