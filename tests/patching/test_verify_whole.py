"""What verify asks of the whole model: greedy tokens, logits over a cache and read twice, and whether all of it ran."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GenerationConfig
from transformers.models.llama import modeling_llama as hf

import fastlora
from fastlora.modules import llama as fast
from fastlora.patching import verifying, whole
from fastlora.patching.verification import AGAIN, CACHED, TRAINING, UNCACHED, UNFUSED, WHOLE
from patching import faults
from patching.tiny import batch, llama, lora, step

LOGITS = [TRAINING, AGAIN, f"logits {UNCACHED}", f"logits {CACHED}"]
TOKENS = [f"greedy tokens {CACHED}", f"greedy tokens {UNCACHED}"]


@pytest.fixture(autouse=True)
def whole_only(monkeypatch):
    """Layer by layer is another file's, and time."""
    monkeypatch.setattr(verifying._Check, "_layers", lambda *steps: None)


def over(found: fastlora.Verification) -> set[str]:
    assert {check.module for check in found.exceeded} <= {WHOLE}
    return {check.quantity for check in found.exceeded}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(8))
def test_no_false_alarm(seed, dtype):
    model = lora(llama(seed, dtype=dtype, kv_heads=2 if seed % 2 else 4))
    found = fastlora.verify(model, batch(seed, rows=1 + seed % 4))
    assert found.within, str(found)
    assert [check.quantity for check in found.checks] == [*LOGITS, *TOKENS]
    assert all(check.figures and check.wrong is None for check in found.checks)
    assert not found.skipped and all(row.fused for row in found.fused)


CACHE = {f"logits {CACHED}", f"greedy tokens {CACHED}"}
FAULTS = {
    "no cache": (faults.drop_cache, CACHE, CACHE),
    "no padding": (faults.drop_padding, {*LOGITS, *TOKENS}, {*LOGITS}),
    "no padding over a cache": (lambda patch: faults.drop_padding(patch, decoding=True), CACHE, {f"logits {CACHED}"}),
    "wrong positions": (faults.shift_positions, CACHE, {f"logits {CACHED}"}),
    "logits fade": (faults.fade_logits, {AGAIN}, {AGAIN}),
    "logits without a gradient": (faults.detach_logits, {AGAIN}, {AGAIN}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAULTS)
def test_finds_what_no_layer_knows(name, dtype, monkeypatch):
    """At most these quantities, and at least those: a worse token is not chosen each time the logits are wrong."""
    spoil, most, least = FAULTS[name]
    spoil(monkeypatch)
    found = fastlora.verify(lora(llama(dtype=dtype)), batch())
    assert least <= over(found) <= most, str(found)
    assert found.to_dict()["within"] is False
    assert f"worst the {found.exceeded[0].quantity} of {WHOLE}" in found.verdict()


def test_finds_what_generate_alone_gets_wrong(monkeypatch):
    prepare = hf.LlamaForCausalLM.prepare_inputs_for_generation

    def blind(self, *args, **kwargs):
        inputs = prepare(self, *args, **kwargs)
        return {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}

    monkeypatch.setattr(fast.LlamaForCausalLM, "prepare_inputs_for_generation", blind, raising=False)
    found = fastlora.verify(lora(llama()), batch())
    assert over(found) == {*TOKENS}
    assert f"other {UNFUSED} in 1" in found.notes()


def test_what_raises_when_fused_is_said(monkeypatch):
    def refuse(self, *args, **kwargs):
        raise RuntimeError("no such cache\nmore")

    monkeypatch.setattr(fast.LlamaForCausalLM, "prepare_inputs_for_generation", refuse, raising=False)
    found = fastlora.verify(lora(llama()), batch())
    assert {check.quantity: check.wrong for check in found.exceeded} == dict.fromkeys(
        TOKENS, "RuntimeError: no such cache"
    )
    assert found.tokens.keys() == {UNFUSED}


def test_logits_that_cannot_be_had_are_said(monkeypatch):
    def change(self, *args, **kwargs):
        if kwargs.get("past_key_values", kwargs.get("cache")) is not None:
            raise TypeError("an unexpected keyword argument")
        return forward(self, *args, **kwargs)

    forward = fast.LlamaDecoderLayer.forward
    monkeypatch.setattr(fast.LlamaDecoderLayer, "forward", change)
    found = fastlora.verify(lora(llama()), batch())
    assert over(found) == {f"logits {CACHED}", f"greedy tokens {CACHED}"}
    assert "TypeError: an unexpected keyword argument" in str(found)


def test_every_module_that_is_said_to_be_fused_must_run(monkeypatch):
    faults.never_run(monkeypatch, "up_proj")
    found = fastlora.verify(lora(llama()), batch())
    paths = [f"base_model.model.model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    assert [check.module for check in found.exceeded] == paths
    assert {check.wrong for check in found.exceeded} == {"said to be fused, but did not run"}
    assert "24 of 26 modules said to be fused ran" in str(found)
    assert [row["path"] for row in found.to_dict()["fused"] if not row["fused"]] == paths


def test_what_does_not_run_unfused_either_is_no_finding():
    """Of a wrapper that holds two norms, one runs."""
    found = fastlora.verify(lora(llama(), modules_to_save=["norm"]), batch())
    assert found.within, str(found)
    assert any(row.path.endswith("norm.modules_to_save.default") for row in found.fused)
    assert not any("original_module" in row.path for row in found.fused)


def test_calls_that_a_compiler_does_not_count_are_no_finding():
    model = lora(llama())
    model.base_model.model.model.norm.compile(backend="eager")
    found = fastlora.verify(model, batch())
    assert found.within, str(found)
    assert found.fused == () and "a compiler traces some" in found.notes()


def test_nothing_is_kept_for_a_backward_that_does_not_come(monkeypatch):
    forward, losses = fast.LlamaForCausalLM.forward, []

    def watched(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        losses.append(outputs.loss)
        return outputs

    watched.__signature__ = forward.__signature__
    monkeypatch.setattr(fast.LlamaForCausalLM, "forward", watched)
    fastlora.verify(lora(llama()), batch())
    losses = [loss for loss in losses if loss is not None and loss.requires_grad]
    assert len(losses) >= 3, "the batch, and the sample for either reading"
    for loss in losses:
        with pytest.raises((RuntimeError, TypeError)):
            loss.backward()


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_the_losses_are_the_whole_model_s(memory):
    """Bit for bit those of a training step."""
    found = fastlora.verify(lora(llama()), batch(), memory=memory)
    unfused = step(lora(llama()))["loss"]
    fused = step(fastlora.patch(lora(llama()), memory=memory))["loss"]
    assert torch.equal(found.loss, fused) and torch.equal(found.unfused_loss, unfused)
    assert f"Loss of the whole model {float(fused):.6g}, unfused {float(unfused):.6g}" in found.verdict()


def test_a_generation_config_is_neither_heeded_nor_changed():
    """With these, nothing would be generated but one token, and that at random."""
    model = llama(use_cache=False)
    own = GenerationConfig(eos_token_id=list(range(101)), do_sample=True, temperature=9.0, repetition_penalty=3.0)
    model.generation_config = own
    before = own.to_dict()
    found = fastlora.verify(model, batch())
    assert found.within and {len(row) for rows in found.tokens.values() for row in rows} == {whole.NEW}
    assert model.generation_config is own and own.to_dict() == before
    json.dumps(found.to_dict())
    assert found.to_dict()["tokens"] == found.tokens


def test_the_tokens_are_those_of_generate():
    """Of the first tokens of the rows, every other row cut to half and padded on the left."""
    model, inputs = lora(llama(eos_token_id=None)).eval(), batch()
    ids = inputs["input_ids"][:, : whole.PROMPT].clone()
    mask = torch.ones_like(ids)
    half = whole.PROMPT // 2
    ids[1] = torch.cat([torch.zeros(half, dtype=ids.dtype), ids[1, :half]])
    mask[1, :half] = 0
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=whole.NEW)[:, whole.PROMPT :]
    assert fastlora.verify(model, inputs).tokens == dict.fromkeys((UNFUSED, CACHED, UNCACHED), expected.tolist())


def prefix():
    from peft import PrefixTuningConfig, get_peft_model

    return get_peft_model(llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def encoder():
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model


def silent():
    model = llama()
    model.can_generate = lambda: False
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (prefix, "PrefixTuningConfig writes to the cache before the prompt"),
        (encoder, "its attention is not causal"),
        (silent, "LlamaForCausalLM does not generate"),
    ],
)
def test_what_does_not_generate_is_skipped_and_said(build, reason):
    found = fastlora.verify(build(), batch())
    assert f"Not checked: greedy tokens: {reason}" in found.notes()
    assert [check.quantity for check in found.checks] == LOGITS[:3]
    assert found.tokens == {} and found.to_dict()["skipped"] == list(found.skipped)


def test_an_original_that_cannot_generate_is_no_finding(monkeypatch):
    def refuse(self, *args, **kwargs):
        raise ValueError("a prompt is wanted")

    monkeypatch.setattr(hf.LlamaForCausalLM, "prepare_inputs_for_generation", refuse)
    found = fastlora.verify(lora(llama()), batch())
    assert found.within and [check.quantity for check in found.checks] == LOGITS[:3]
    assert "the original cannot generate them (ValueError: a prompt is wanted)" in found.notes()


def test_a_batch_of_padding_alone():
    inputs = batch()
    with pytest.raises(ValueError, match="attention_mask of zeros alone"):
        fastlora.verify(llama(), {**inputs, "attention_mask": torch.zeros_like(inputs["input_ids"])})


def test_a_token_is_judged_up_to_the_first_that_differs():
    truth = torch.tensor([[[3.0, 1.0, 0.0], [0.0, 2.0, 1.75], [9.0, 0.0, 0.0]]]).double()
    chosen = torch.tensor([[0, 1, 0]])
    assert whole._lost(chosen, chosen, truth) == 0
    assert whole._lost(torch.tensor([[0, 2, 2]]), chosen, truth) == 0.25
    assert whole._lost(torch.tensor([[1, 2, 0]]), chosen, truth) == 2
    assert whole._lost(torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 2]]), truth) == 9
