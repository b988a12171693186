"""Other people's implementations of single ops, and in words why one cannot run here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

import fastlora.ops

from .case import Function, Provider


def why_no_package(package: str, device: str, needs_gpu: bool = True) -> str | None:
    """Why a package cannot serve: not installed, or no GPU; None where it can."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if needs_gpu and device != "cuda":
        return f"{package}'s kernels need a GPU"
    return None


def ours(op: str, **bound: Any) -> Provider:
    """fastlora.ops.<op>; says so where this version has none."""
    run = getattr(fastlora.ops, op, None)
    if run is None:
        return Provider("fastlora", None, f"fastlora has no {op}")
    return Provider("fastlora", functools.partial(run, **bound) if bound else run)


def compiled(run: Function, name: str = "torch.compile") -> Provider:
    """The witness under torch.compile."""
    if sys.platform == "win32":
        return Provider(name, None, "torch.compile needs a compiler that is not there on Windows by default")
    return Provider(name, torch.compile(run, dynamic=False))


def foreign(name: str, package: str, device: str, load: Callable[[], Function], needs_gpu: bool = True) -> Provider:
    """An implementation from another package; ``load`` imports it and adapts its signature."""
    why = why_no_package(package, device, needs_gpu)
    if why:
        return Provider(name, None, why)
    try:
        return Provider(name, load())
    except Exception as error:  # another version of the package, with other names
        return Provider(name, None, f"{package}: {type(error).__name__}: {error}"[:200])


def attribute(path: str) -> Any:
    """``"package.module.name"`` imported."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables set within, and as they were before after it."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
