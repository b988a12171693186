"""Copies, pickles and checkpoints: what is saved never knows of fastlora, a copy of a patched model is patched."""

import copy
import json
import pickle
import sys

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

import fastlora

from .tiny import assert_fused, assert_same, llama, lora, padded_step, step


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model, path="model.pt"):
    import io

    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch])
@pytest.mark.parametrize("build", [llama, lambda: lora(llama(tie_word_embeddings=True))], ids=["full", "tied lora"])
def test_copies(duplicate, build):
    """A copy is patched, has its own counters, and is unpatched on its own."""
    model = fastlora.patch(build())
    first = padded_step(model)
    other = duplicate(model)
    assert fastlora.explain(other) == fastlora.explain(model)
    plan = fastlora.explain(model)
    assert_same(padded_step(other), first)
    assert_fused(other, calls=2)
    assert fastlora.explain(model) == plan
    fastlora.unpatch(other)
    assert_same(padded_step(other), padded_step(build()))
    assert_same(padded_step(model), first)
    assert type(other) is type(build())


def test_load_state_dict():
    source, target = llama(1), fastlora.patch(llama(2))
    assert list(target.state_dict()) == list(source.state_dict())
    target.load_state_dict(source.state_dict())
    assert_same(step(target), step(fastlora.patch(source)))


def files(path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("build", [llama, lambda: lora(llama()), lambda: lora(llama(), task_type=None)])
def test_saved_files_are_the_unpatched_ones(build, tmp_path):
    """Byte for byte, patched at any time; so nothing in them needs fastlora."""
    build().save_pretrained(tmp_path / "unpatched")
    model = fastlora.patch(build())
    step(model)
    model.save_pretrained(tmp_path / "patched")
    saved = files(tmp_path / "patched")
    assert len(saved) >= 2
    assert saved == files(tmp_path / "unpatched")
    assert not any(b"fastlora" in content for content in saved.values())


def test_adapter_of_a_base_patched_first(tmp_path):
    """Without a task type PEFT records the base's class: Hugging Face's."""
    lora(fastlora.patch(llama()), task_type=None).save_pretrained(tmp_path)
    recorded = json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]
    assert recorded == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }


def test_loads_without_fastlora(tmp_path, monkeypatch):
    base = fastlora.patch(llama())
    base.save_pretrained(tmp_path / "base")
    model = lora(base)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    expected = step(lora(llama()))
    for name in [name for name in sys.modules if name.partition(".")[0] == "fastlora"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        import fastlora as _  # noqa: F401
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "adapter", is_trainable=True)
    assert_same(step(loaded), expected)
