"""The Axolotl plugin. Axolotl pins other versions of torch and transformers than ours and cannot be installed beside
them: the plugin meets a stand-in of the one class that it extends and of what Axolotl 0.19 does with it."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
from patching.tiny import assert_fused, batch, llama, lora

from .options import OPTIONS, assert_taken


class BasePlugin:
    def post_model_build(self, cfg, model):
        """The base is loaded."""

    def post_model_load(self, cfg, model):
        """The model is loaded, with its adapters."""


@pytest.fixture
def load_plugin(monkeypatch):
    """As Axolotl finds a plugin: by the name in its YAML."""
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = BasePlugin
    monkeypatch.delitem(sys.modules, "fastlora.integrations.axolotl", raising=False)

    def load(name):
        module, _, cls = name.rpartition(".")
        return getattr(importlib.import_module(module), cls)()

    yield load
    sys.modules.pop("fastlora.integrations.axolotl", None)


def test_a_loaded_model_is_patched(load_plugin, capsys):
    plugin = load_plugin("fastlora.integrations.AxolotlPlugin")
    assert isinstance(plugin, BasePlugin)
    base = llama()
    plugin.post_model_build(None, base)
    model = lora(base)
    plugin.post_model_load(SimpleNamespace(fastlora=None), model)
    assert "fastlora: 28 of 28 modules are fused" in capsys.readouterr().out
    model.train()(**batch()).loss.backward()
    assert_fused(model, calls=1)


def test_options_are_axolotls_to_read(load_plugin):
    """The YAML's, by a schema that Axolotl adds to its own."""
    plugin = load_plugin("fastlora.integrations.AxolotlPlugin")
    module, _, name = plugin.get_input_args().rpartition(".")
    schema = getattr(importlib.import_module(module), name)
    read = schema(fastlora=OPTIONS).model_dump(exclude_none=True)
    model = lora(llama())
    plugin.post_model_load(SimpleNamespace(**read), model)
    assert_taken(model)
    with pytest.raises(ValueError, match=r"fastlora\.memry"):
        schema(fastlora={"memry": "lean"})
    assert schema().model_dump(exclude_none=True) == {}


def test_other_ranks_are_silent(load_plugin, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    load_plugin("fastlora.integrations.AxolotlPlugin").post_model_load(SimpleNamespace(fastlora=None), llama())
    assert not capsys.readouterr().out
