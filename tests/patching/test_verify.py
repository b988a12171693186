"""verify finds what is wrong, where it is, and nothing where nothing is; and leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn

import fastlora
from fastlora.modules import llama as fast
from fastlora.modules import lora as reader
from fastlora.patching.verification import WHOLE
from patching.tiny import batch, llama, lora, misread, row, step


def padded(side: str = "right"):
    mask = torch.ones(3, 13, dtype=torch.int64)
    mask[1, slice(9, None) if side == "right" else slice(None, 4)] = 0
    inputs = batch()
    return {**inputs, "attention_mask": mask, "labels": inputs["labels"].masked_fill(mask == 0, -100)}


SOUND = {
    "fp32": (lambda: lora(llama()), batch),
    "bf16 base, fp32 adapters": (lambda: lora(llama(dtype=torch.bfloat16)), batch),
    "bf16, padded": (lambda: lora(llama(dtype=torch.bfloat16), autocast=False), padded),
    "padded on the left": (lambda: lora(llama(kv_heads=4)), lambda: padded("left")),
    "dropout, some projections": (lambda: lora(llama(), lora_dropout=0.5, target_modules=["v_proj", "up_proj"]), batch),
    "the head trains": (lambda: lora(llama(), modules_to_save=["lm_head"]), batch),
    "no adapters": (lambda: llama(), batch),
}


@pytest.mark.parametrize("name", SOUND)
def test_within(name):
    build, inputs = SOUND[name]
    model = build()
    found = fastlora.verify(model, inputs())
    assert found.within, str(found)
    trained = sum(p.requires_grad for p in model.parameters())
    if name == "no adapters":
        trained -= 1  # the embedding is no part of a layer or of the head
    layers = 2
    of_whole = sum(check.module == WHOLE for check in found.checks)
    assert of_whole == 6 and len(found.checks) == of_whole + 2 * (layers + 1) + trained
    assert all(row.fused for row in found.fused)
    assert all(check.figures for check in found.checks)
    assert "Within the budget" in str(found)


def test_autocast():
    model = lora(llama(dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert fastlora.verify(model, batch()).within


def snapshot(model: nn.Module):
    values = {name: t.clone() for name, t in model.state_dict().items()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    flags = [(type(m), m.training, getattr(m, "p", None), m._forward_pre_hooks.copy()) for m in model.modules()]
    config = model.config.to_dict(), model.generation_config, model.generation_config.to_dict()
    return values, grads, flags, config, fastlora.explain(model), torch.get_rng_state()


@pytest.mark.parametrize("patched", [False, True])
def test_leaves_the_model_as_it_was(patched):
    model = lora(llama(), lora_dropout=0.1)
    if patched:
        fastlora.patch(model)
    step(model)
    model.eval()
    model.base_model.model.model.layers[0].train()
    before = snapshot(model)
    fastlora.verify(model, batch())
    values, grads, flags, config, plan, state = snapshot(model)
    assert all(torch.equal(values[name], t) for name, t in before[0].items())
    assert all((g is None) == (grads[name] is None) for name, g in before[1].items())
    assert all(torch.equal(grads[name], g) for name, g in before[1].items() if g is not None)
    assert (flags, config, plan) == before[2:5]
    assert torch.equal(state, before[5])


def test_finds_a_wrong_scaling_and_names_the_projection(monkeypatch):
    """Off by a tenth, in one projection of one layer; the other layers are fed what the original gave."""
    model = lora(llama())
    misread(monkeypatch, model.base_model.model.model.layers[1].mlp.down_proj, 1.1)
    found = fastlora.verify(model, batch())
    assert not found.within
    assert {".layers.1" in check.module or check.module == WHOLE for check in found.exceeded} == {True}
    assert found.exceeded[0].module.endswith("layers.1.mlp.down_proj")
    assert "OVER BUDGET" in str(found) and "layers.1.mlp.down_proj" in found.verdict()


def test_finds_a_perturbed_operand_of_a_kernel(monkeypatch):
    """RoPE's sine off by one part in a thousand: attention's projections, and no head."""
    group = reader.ops.lora_group

    def turned(*args, rotary=None, **options):
        return group(*args, rotary=rotary and (rotary[0], rotary[1] * 1.001), **options)

    monkeypatch.setattr(reader.ops, "lora_group", turned)
    found = fastlora.verify(lora(llama()), batch())
    over = {check.module for check in found.exceeded}
    assert any(path.endswith("layers.0.self_attn.q_proj") for path in over)
    assert not any(check.module == "base_model.model" for check in found.exceeded)


def test_finds_a_wrong_loss(monkeypatch):
    loss = fast.linear_cross_entropy
    monkeypatch.setattr(fast, "linear_cross_entropy", lambda *args, **kwargs: loss(*args, **kwargs) * 1.001)
    found = fastlora.verify(lora(llama()), batch())
    assert {check.module for check in found.exceeded} == {"base_model.model"}
    assert float(found.loss) == pytest.approx(1.001 * float(found.unfused_loss), rel=1e-5)


def test_finds_nan(monkeypatch):
    lora_mlp = reader.ops.lora_mlp
    monkeypatch.setattr(reader.ops, "lora_mlp", lambda *args, **options: lora_mlp(*args, **options) * torch.nan)
    found = fastlora.verify(lora(llama()), batch())
    assert not found.within and "NaN or infinite" in str(found)


def test_what_is_passed_through_is_said():
    model = lora(llama())
    model.base_model.model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    found = fastlora.verify(model, batch())
    assert found.within
    assert "Not fused, so compared with itself: hooks on the Linear" in str(found)
    assert found.to_dict()["within"] is True


def test_checkpointing_is_off_for_the_check_and_on_again():
    model = lora(llama())
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert fastlora.verify(model, batch()).within
    assert model.base_model.model.model.layers[0].gradient_checkpointing


def test_several_adapters():
    model = lora(llama())
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    found = fastlora.verify(model, batch())
    assert found.within, str(found)
    assert any("second" in check.quantity for check in found.checks)


@pytest.mark.parametrize("patched", [False, True])
def test_takes_what_patch_takes(patched, monkeypatch):
    """A patched model is verified as it is: with its own ops and its own policy of memory."""
    options = {"ops": {"rms_norm", "swiglu", "lora_linear"}, "memory": "lean", "strict": True}
    model = lora(llama())
    if patched:
        fastlora.patch(model, **options)
    again = []
    checkpoint = fast.memory.checkpoint
    monkeypatch.setattr(
        fast.memory, "checkpoint", lambda *args, **kwargs: again.append(1) or checkpoint(*args, **kwargs)
    )
    found = fastlora.verify(model, batch(), **({} if patched else options))
    assert found.within, str(found)
    assert len(again) >= 2, "a layer that is computed again in backward"
    assert {row.runs for row in found.passed_through} >= {"transformers LlamaForCausalLM"}
    if patched:
        with pytest.raises(ValueError, match="the model is patched, and keeps its own of ops, strict, memory"):
            fastlora.verify(model, batch(), memory="lean")


def test_strict_says_what_is_not_fused():
    with pytest.raises(fastlora.NotFused, match="gelu"):
        fastlora.verify(lora(llama(hidden_act="gelu")), batch(), strict=True)


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), batch, ValueError, "model has 0 LlamaForCausalLM within"),
        (lambda: "llama", batch, TypeError, "model is a str"),
        (llama, lambda: {"input_ids": batch()["input_ids"]}, ValueError, "needs labels too"),
        (llama, lambda: [1], TypeError, "batch is a list"),
        (lambda: llama(attention="flex_attention"), batch, ValueError, "attention is 'flex_attention', which has no"),
    ],
)
def test_errors_say_what_is_needed(model, inputs, error, message):
    with pytest.raises(error, match=message):
        fastlora.verify(model(), inputs())


def test_a_patched_model_trains_on_as_before():
    first, second = (fastlora.patch(lora(llama(), lora_dropout=0.3)) for _ in range(2))
    fastlora.verify(second, batch())
    ours, theirs = step(first), step(second)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert row(second, "layers.0.mlp.up_proj").fused == 1
    copy.deepcopy(second)
