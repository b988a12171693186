"""What every swapped module has in common: its state, its counters, its identity."""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn

from .memory import Memory

FUSED = "fused"


class Part(NamedTuple):
    """One line of explain: a module or one of its projections, what runs there, and why not ours (None: ours)."""

    name: str
    runs: str
    why: str | None


class State:
    """What patch() leaves on a module: the chosen ops, and how often each part was fused or passed through.

    The memory policy is one object for all modules of a model. place: the index of a layer among its neighbors, and
    how many they are.
    """

    def __init__(self, ops: frozenset[str], memory: Memory) -> None:
        self.ops = ops
        self.memory = memory
        self.place = 0, 1
        self.calls: defaultdict[str, Counter[str]] = defaultdict(Counter)


class Fused:
    """Mixin of the swapped classes, ``class LlamaMLP(Fused, hf.LlamaMLP)``.

    A swapped class answers with the name *and module* of the class it stands for: whatever records a class by name
    (config.architectures, PEFT's auto_mapping, FSDP's wrapping policies, transformers' output recorders) sees
    Hugging Face's, and checkpoints and adapters never depend on fastlora. Pickle finds the class through _rebuild.
    """

    _fastlora: State
    _fastlora_class: tuple[str, str]
    _fastlora_forward: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Fused not in cls.__bases__:
            return  # an engine's subclass of ours: see unwrapped
        original: Any = cls.__bases__[-1]
        cls._fastlora_class = (cls.__module__, cls.__qualname__)
        cls.__module__, cls.__qualname__, cls.__doc__ = original.__module__, original.__qualname__, original.__doc__
        cls._fastlora_forward = vars(cls)["forward"]
        # Trainer and generate read off forward's signature which columns and which arguments a model takes.
        vars(cls)["forward"].__signature__ = inspect.signature(original.forward)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, self._fastlora_class, self.__dict__

    def count(self, part: str, why: str | None = None) -> None:
        """Count one call of a part, fused or passed through for the reason given. Compiled calls are not counted."""
        if not torch.compiler.is_compiling():
            self._fastlora.calls[part][why or FUSED] += 1

    def parts(self) -> list[Part]:
        """The lines of explain for this module, from its state now."""
        raise NotImplementedError


def _rebuild(module: str, name: str) -> Any:
    """An empty instance of a swapped class, for unpickling and deepcopy."""
    import importlib

    cls = getattr(importlib.import_module(module), name)
    return cls.__new__(cls)


def is_unit(module: nn.Module) -> bool:
    """Whether torch's fully_shard (or replicate) has made this module a unit: it subclasses its class, with a mixin."""
    mixin, *bases = type(module).__bases__
    return bool(bases) and not issubclass(mixin, nn.Module) and mixin.__module__.startswith("torch.distributed.")


def unwrapped(module: nn.Module) -> Any:
    """The class of a module, without what fully_shard put before it."""
    return type(module).__bases__[-1] if is_unit(module) else type(module)


def rewrapped(module: nn.Module, cls: type) -> Any:
    """cls; behind what fully_shard put before the module's class, where it did."""
    return _rewrap(type(module), cls) if is_unit(module) else cls


_units: dict[tuple[type, type], type] = {}


def _rewrap(unit: type, cls: type) -> type:
    mixin, before = unit.__bases__
    if cls is before:
        return unit
    if (unit, cls) not in _units:
        # transformers 5 gives every subclass of a checkpointed layer a forward of its own.
        kept = {key: value for key, value in vars(unit).items() if key != "forward"}
        other = type(unit.__name__, (mixin, cls), kept)
        _units[unit, cls], _units[other, before] = other, unit
    return _units[unit, cls]


def original_class(module: nn.Module) -> Any:
    """The Hugging Face class a swapped module stands for, or the module's own class."""
    cls = unwrapped(module)
    return cls.__bases__[-1] if issubclass(cls, Fused) else cls


_gathered: ContextVar[bool] = ContextVar("gathered", default=False)


@contextmanager
def gathered(yes: bool) -> Iterator[None]:
    """Judge weights as they are inside a forward: what a unit of fully_shard holds is then whole and plain."""
    token = _gathered.set(yes)
    try:
        yield
    finally:
        _gathered.reset(token)


def why_not_plain(*tensors: torch.Tensor | None) -> str | None:
    """Why a kernel cannot read these weights and activations directly; None where it can."""
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (torch.Tensor, nn.Parameter) and not torch.compiler.is_compiling():
            if not (_gathered.get() and type(tensor).__name__ == "DTensor"):
                return f"a tensor is a {type(tensor).__name__}"
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"a tensor is {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.device.type not in ("cpu", "cuda", "meta"):
            return f"a tensor is on {tensor.device}"
    return None


def instance_forward(module: nn.Module) -> Any:
    """A forward on the instance that is not the class's own; transformers 4 leaves the latter after output capture."""
    forward = module.__dict__.get("forward")
    return None if getattr(forward, "__func__", None) is type(module).forward else forward


def changes_arguments(module: nn.Module) -> str | None:
    """The owner of a hook that may change the keyword arguments of a module's forward; None where there is none."""
    for key in module._forward_pre_hooks_with_kwargs:
        owner = getattr(module._forward_pre_hooks[key], "__module__", None) or "an unknown module"
        if not owner.startswith(("torch.distributed.fsdp.", "torch.distributed._composable.", "fastlora.")):
            return owner
    return None


def why_not_called(module: Any) -> str | None:
    """Why the forward of a submodule may not be bypassed: something of the user's is attached to its call."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if kinds[0] or kinds[1] or kinds[2] or kinds[3]:
        owners = {getattr(hook, "__module__", "").split(".")[0] for hooks in kinds for hook in hooks.values()}
        zero = ": ZeRO-3 gathers module by module, see leaf_module in docs/trainers.md" if "deepspeed" in owners else ""
        return f"hooks on the {type(module).__name__}{zero}"
    if "forward" in module.__dict__ and instance_forward(module):
        return f"the {type(module).__name__}'s forward was replaced on the instance"
    cls: Any = type(module)
    if isinstance(module, Fused) and cls.forward is not cls._fastlora_forward:
        return f"the {cls.__name__}'s forward was replaced on its class"
    return None
