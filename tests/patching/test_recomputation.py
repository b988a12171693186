"""A layer that is computed again in backward finds what the first forward found, or says that it does not."""

import pytest
import torch
from peft.tuners.lora import LoraLayer

import fastlora

from .tiny import assert_same, batch, gradients, judge, llama, lora, row, step


def scaled(model, mask):
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", 5.0)


CHANGES = {
    "scale": scaled,
    "adapters": lambda model, mask: model.base_model.disable_adapter_layers(),
    "mode": lambda model, mask: model.eval(),
    "mask of the caller's": lambda model, mask: mask.fill_(True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_recomputed_layer_depends_on_may_not_change_before_backward(change):
    """Else the second forward would compute something else, and the gradients would be silently wrong."""
    model = fastlora.patch(lora(llama(), lora_dropout=0.1), memory="lean")
    mask = torch.ones(3, 1, 13, 13, dtype=torch.bool).tril()
    outputs = model.train()(**batch(), attention_mask=mask, use_cache=False)
    change(model, mask)
    with pytest.raises(RuntimeError, match=r'fastlora recomputes this layer .*patch with memory="fast"'):
        outputs.loss.backward()


def test_changes_that_were_undone_before_backward_are_none():
    """As DPO's reference forward with the adapters switched off."""
    model = fastlora.patch(lora(llama()), memory="lean")
    loss = model.train()(**batch(), use_cache=False).loss
    with model.disable_adapter():
        loss = loss - model(**batch(1), use_cache=False).loss
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    model(**batch(), use_cache=False).loss.backward()
    assert_same(found, gradients(model))


@pytest.mark.parametrize("wanted", ["lean", 1], ids=["lean", "a budget"])
def test_activated_lora_is_not_recomputed(wanted):
    """Its hooks, which say where it begins, are gone in backward: the layer keeps what it needs, and says so."""

    def build(seed):
        return lora(llama(seed), alora_invocation_tokens=[40, 41], target_modules=["q_proj", "v_proj", "up_proj"])

    def run(model, seed):
        ids = batch(seed)["input_ids"]
        ids[0, 6:8], ids[1, 10:12] = torch.tensor([40, 41]), torch.tensor([40, 41])
        return step(model, seed, input_ids=ids, labels=ids, use_cache=False)

    model = judge(build, run, whole=False, memory=wanted)
    assert "ALoraLinearVariant" in row(model, "layers.0.memory").why


def pruned(seed=0):
    model = lora(llama(seed, num_hidden_layers=4))
    inner = model.base_model.model.model
    inner.layers = torch.nn.ModuleList([inner.layers[0], inner.layers[3]])
    inner.config.num_hidden_layers = 2
    return model


def replicated(seed=0):
    return lora(llama(seed), target_modules=r".*_proj", layer_replication=[[0, 2], [0, 2]])


@pytest.mark.parametrize(("build", "layers"), [(pruned, 2), (replicated, 4)], ids=["pruned", "replicated"])
@pytest.mark.parametrize("wanted", ["auto", 1], ids=["auto", "a budget"])
def test_layers_are_counted_as_they_are(build, layers, wanted):
    """Whatever the config, or layer_idx, says."""
    model = judge(build, lambda model, seed: step(model, seed, use_cache=False), memory=wanted)
    rows = [r for r in fastlora.explain(model).rows if r.path.endswith("memory") or r.path.endswith(".mlp")]
    assert sum(r.path.endswith(".mlp") for r in rows) == layers
    assert sum(r.path.endswith("memory") for r in rows) == (layers if wanted == 1 else 0)
