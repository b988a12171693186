"""fastlora: fused LoRA fine-tuning of Hugging Face Llama 2 models.

    model = fastlora.patch(model)

Importing fastlora is cheap and changes nothing: transformers and peft are imported when a model is patched, Triton when
fastlora.ops is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import ops
    from .patching import NotFused, Plan, explain, patch, patched, unpatch
    from .patching.verification import Verification
    from .patching.verifying import verify
    from .planning import TrainingPlan, plan

__all__ = [
    "NotFused",
    "Plan",
    "TrainingPlan",
    "Verification",
    "__version__",
    "explain",
    "ops",
    "patch",
    "patched",
    "plan",
    "unpatch",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module(".ops", __name__)
    if name in ("TrainingPlan", "plan"):
        return getattr(importlib.import_module(".planning", __name__), name)
    if name in ("Verification", "verify"):  # apart from patching, which does without transformers until it patches
        module = "verification" if name == "Verification" else "verifying"
        return getattr(importlib.import_module(f".patching.{module}", __name__), name)
    if name in __all__:
        return getattr(importlib.import_module(".patching", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
