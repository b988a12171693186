"""Adapters may be merged, added, switched, disabled and deleted, before patching or after it."""

import pytest
import torch
from peft import LoraConfig

import fastlora

from .tiny import assert_fused, assert_same, batch, judge, llama, lora, randomise, row, step


def second(model, active):
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"]))
    randomise(model, seed=1)
    model.base_model.set_adapter(active)
    return model


def unmerged(model):
    model.merge_adapter()
    model.unmerge_adapter()
    return model


def merged(model):
    model.merge_adapter()
    return model


def disabled(model):
    model.base_model.disable_adapter_layers()
    return model


def deleted(model):
    second(model, "second").delete_adapter("second")
    model.set_adapter("default")
    return model


def weighted(model):
    second(model, "default").add_weighted_adapter(["default"], [0.5], "halved")
    model.set_adapter("halved")
    return model


ACTIONS = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "unload": lambda model: model.unload(),
    "merge_adapter": merged,
    "unmerge_adapter": unmerged,
    "disable_adapter_layers": disabled,
    "add_adapter, not active": lambda model: second(model, "default"),
    "set_adapter": lambda model: second(model, "second"),
    "two active adapters": lambda model: second(model, ["default", "second"]),
    "delete_adapter": deleted,
    "add_weighted_adapter": weighted,
}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_actions(action):
    """As exact as unpatched; and the same to the bit whether patched before the action or after it."""
    after = judge(lambda seed: action(lora(llama(seed))))
    before = action(fastlora.patch(lora(llama(3))))
    assert_same(step(before, 3), step(after, 3))
    assert [(r.path, r.runs, r.why) for r in fastlora.explain(before).rows] == [
        (r.path, r.runs, r.why) for r in fastlora.explain(after).rows
    ]


def test_every_active_adapter_trains():
    model = fastlora.patch(second(lora(llama()), ["default", "second"]))
    names = [name for name in step(model) if ".second." in name]
    assert len(names) == 2 * 2 * 2


def test_disable_adapter_for_a_while():
    """As DPO does for its reference model."""

    def run(model, seed):
        model.eval()
        ids = batch(seed)["input_ids"]
        with torch.no_grad(), model.disable_adapter():
            reference = model(ids).logits
        return {"reference": reference, **step(model, seed)}

    found = run(judge(lambda seed: lora(llama(seed)), run), 3)
    assert not torch.equal(found["reference"], found["logits"])


def test_merged_weights_are_the_unpatched_ones():
    ours = fastlora.patch(lora(llama())).merge_and_unload().state_dict()
    assert_same(dict(ours), dict(lora(llama()).merge_and_unload().state_dict()))


def test_merged_and_disabled():
    """PEFT unmerges the weights when disabled adapters are called."""

    def build(seed):
        model = lora(llama(seed))
        model.merge_adapter()
        return disabled(model)

    model = judge(build, whole=False)
    assert not model.base_model.model.model.layers[0].mlp.up_proj.merged


def test_an_adapter_on_a_new_target():
    """A projection that had no adapter when the model was patched."""
    model = fastlora.patch(lora(llama(), target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    randomise(model).base_model.set_adapter(["second"])
    names = step(model).keys()
    assert any("down_proj.lora_A.second" in name for name in names)
    assert_fused(model)
    assert "r=3" in row(model, "down_proj").runs
