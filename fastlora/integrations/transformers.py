"""transformers' Trainer, and TRL's, which are subclasses of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback

import fastlora
from fastlora.patching.engine import parse_ops


class FastLoraCallback(TrainerCallback):
    """Patches the trainer's model when the trainer is made, before anything wraps it; says so when training begins.

    Given to a trainer that exists (``trainer.add_callback``), or where ``model_init`` makes a model per run, it patches
    when training begins. The model stays patched: ``fastlora.unpatch(model)`` takes it back.

    Args, errors: as ``fastlora.patch``.
    """

    def __init__(self, ops: Iterable[str] | None = None, strict: bool = False, memory: str | int = "fast") -> None:
        self._options: dict[str, Any] = {"ops": parse_ops(ops), "strict": strict, "memory": memory}
        self._model: Any = None

    def _patch(self, model: Any) -> None:
        if model is not self._model:
            self._model = fastlora.patch(model, **self._options)

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The trainer is made."""
        self._patch(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Training begins."""
        self._patch(model)
        if state.is_world_process_zero:
            print(f"fastlora: {fastlora.explain(model).summary()}")
