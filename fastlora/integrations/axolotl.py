"""Axolotl, which builds the model from YAML."""

from __future__ import annotations

import os
from typing import Any

from axolotl.integrations.base import BasePlugin

import fastlora


class AxolotlPlugin(BasePlugin):
    """``plugins: [fastlora.integrations.AxolotlPlugin]`` in the YAML: patches every model that Axolotl loads.

    Leave Axolotl's own ``lora_mlp_kernel``, ``lora_qkv_kernel`` and ``lora_o_kernel`` off: they replace the same
    forwards.
    """

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """The model and its adapters are there; nothing wraps them yet."""
        plan = fastlora.explain(fastlora.patch(model))
        if os.environ.get("RANK", "0") == "0":
            print(f"fastlora: {plan.summary()}")
