"""Axolotl, which builds the model from YAML."""

from __future__ import annotations

import os
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

import fastlora


class Options(BaseModel, extra="forbid"):
    """Args of ``fastlora.patch``."""

    ops: list[str] | str | None = None
    strict: bool = False
    memory: str | int = "fast"


class AxolotlArgs(BaseModel):
    """What the plugin adds to Axolotl's YAML."""

    fastlora: Options | None = None


class AxolotlPlugin(BasePlugin):
    """``plugins: [fastlora.integrations.AxolotlPlugin]`` in the YAML: patches every model that Axolotl loads.

    Options are ``fastlora.patch``'s: ``fastlora: {memory: auto, strict: true}``.

    Leave Axolotl's own ``lora_mlp_kernel``, ``lora_qkv_kernel`` and ``lora_o_kernel`` off: they replace the same
    forwards.
    """

    def get_input_args(self) -> str:
        """Where Axolotl finds the options' schema."""
        return "fastlora.integrations.axolotl.AxolotlArgs"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """The model and its adapters are there; nothing wraps them yet."""
        plan = fastlora.explain(fastlora.patch(model, **(cfg.fastlora or {})))
        if os.environ.get("RANK", "0") == "0":
            print(f"fastlora: {plan.summary()}")
