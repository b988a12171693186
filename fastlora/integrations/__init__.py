"""fastlora for trainers that take plugins: each is a few lines over ``fastlora.patch``, which serves all others.

    Trainer(..., callbacks=[fastlora.integrations.FastLoraCallback()])       # transformers, TRL
    Trainer(callbacks=[fastlora.integrations.LightningCallback()])           # Lightning
    plugins: [fastlora.integrations.AxolotlPlugin]                           # Axolotl, in its YAML

Each trainer is imported when its plugin is first named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .axolotl import AxolotlPlugin
    from .lightning import LightningCallback
    from .transformers import FastLoraCallback

__all__ = ["AxolotlPlugin", "FastLoraCallback", "LightningCallback"]
_HOMES = {"AxolotlPlugin": "axolotl", "FastLoraCallback": "transformers", "LightningCallback": "lightning"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
