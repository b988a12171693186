"""Everything that patching a model must leave alone: the attributes of other libraries' modules and classes."""

from __future__ import annotations

import logging
import os
import sys
import types
import warnings

import torch

LIBRARIES = ("transformers", "peft", "accelerate", "torch.nn", "torch.autograd")


def everything() -> dict[str, dict[str, object]]:
    """The namespaces of the libraries' modules and of the classes in them, and the settings of the process."""
    found: dict[str, dict[str, object]] = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith(LIBRARIES) or module is None:
            continue
        found[name] = dict(vars(module))
        for value in list(vars(module).values()):
            if isinstance(value, type) and value.__module__.startswith(LIBRARIES):
                found[f"{value.__module__}.{value.__qualname__}"] = dict(vars(value))
    found["settings"] = {
        "dtype": torch.get_default_dtype(),
        "environment": tuple(sorted(os.environ.items())),
        "filters": tuple(map(str, warnings.filters)),
        "root logger": tuple(logging.getLogger().handlers),
        "hooks": tuple(sys.meta_path),
    }
    return found


def compare(before: dict[str, dict[str, object]]) -> None:
    """Fail if anything was replaced, or if a class has anything new. Modules may import their submodules lazily."""
    after = everything()
    changed = []
    for space, names in before.items():
        for name, value in names.items():
            now = after[space].get(name)
            same = now == value if space == "settings" else now is value
            if not same:
                changed.append(f"{space}.{name}")
        is_class = not isinstance(sys.modules.get(space), types.ModuleType) and space != "settings"
        if is_class:
            changed += [f"{space}.{name} is new" for name in after[space].keys() - names.keys()]
    assert not changed, "\n".join(changed)
