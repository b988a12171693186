"""Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback

import fastlora
from fastlora.patching.engine import parse_ops


class LightningCallback(Callback):
    """Patches the Llama inside a LightningModule before the strategy wraps it, and says so when training begins.

    A model that the LightningModule makes in ``configure_model`` is patched once it is wrapped. The model stays
    patched: ``fastlora.unpatch(module)`` takes it back.

    Args, errors: as ``fastlora.patch``.
    """

    def __init__(self, ops: Iterable[str] | None = None, strict: bool = False, memory: str | int = "fast") -> None:
        self._options: dict[str, Any] = {"ops": parse_ops(ops), "strict": strict, "memory": memory}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before the strategy."""
        if fastlora.explain(pl_module).rows:
            fastlora.patch(pl_module, **self._options)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """After it."""
        fastlora.patch(pl_module, **self._options)
        if trainer.is_global_zero:
            print(f"fastlora: {fastlora.explain(pl_module).summary()}")
