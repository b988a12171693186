"""A layer that is computed again in backward finds what the first forward found, or says that it does not."""

import pytest
import torch
from peft.tuners.lora import LoraLayer

import fastlora

from .tiny import CACHE, assert_same, batch, gradients, judge, llama, lora, row, step


def scaled(model, mask):
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", 5.0)


def written(model, mask):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.detach().mul_(2)


def hooked(model, mask):
    norm = model.base_model.model.model.layers[0].input_layernorm
    norm.register_forward_hook(lambda module, args, out: 2 * out)


CHANGES = {
    "weights": written,
    "hooks": hooked,
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


def test_a_cache_with_tokens_in_it_is_read():
    """As prefix tuning's: what is recomputed would not see them."""
    ids = batch()["input_ids"]

    def run(model):
        with torch.no_grad():
            cache = model.eval()(ids[:, :8], use_cache=True)[CACHE]
        return float(model.train()(input_ids=ids[:, 8:], labels=ids[:, 8:], **{CACHE: cache}).loss)

    model = fastlora.patch(lora(llama()), memory="lean")
    assert run(model) == pytest.approx(run(lora(llama())), rel=1e-5)
    assert row(model, "layers.0.memory").why == "a cache with tokens in it: nothing is recomputed"


def test_position_ids_that_were_made_in_inference_mode():
    with torch.inference_mode():
        positions = torch.arange(13)[None]
    step(fastlora.patch(lora(llama()), memory="lean"), position_ids=positions, use_cache=False)


def test_models_of_different_depth_share_a_policy():
    models = torch.nn.ModuleDict({"a": llama(num_hidden_layers=1), "b": llama(num_hidden_layers=3)})
    fastlora.patch(models, memory="auto")
    for model in (*models.values(), *models.values()):
        step(model, use_cache=False)
