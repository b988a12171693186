"""patch, unpatch and explain. Knows tables of swaps, and no model."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from .._versions import warn_if_newer
from ..kernels import _library
from ..modules import trust
from ..modules._fused import (
    FUSED,
    Fused,
    State,
    gathered,
    instance_forward,
    is_unit,
    original_class,
    rewrapped,
    unwrapped,
)
from ..modules.memory import Memory, parse
from .plan import Plan, Row

Model = TypeVar("Model", bound=nn.Module)

OPS = frozenset({"flash_attention", "linear_cross_entropy", "lora_linear", "rms_norm", "rope", "swiglu"})


class NotFused(RuntimeError):
    """Raised by ``patch(model, strict=True)`` where something could not be fused; names it and the reason."""


class Swap(NamedTuple):
    """A class that gives way to one with another forward, if any of ``ops`` is chosen, unless a reason is returned.

    role: what ``trust`` knows its forward by.
    """

    role: str
    original: type[nn.Module]
    fast: type[nn.Module]
    ops: set[str]
    unless: Callable[[nn.Module], str | None] = lambda module: None

    def why_not(self, module: nn.Module) -> str | None:
        """Why this module keeps its class; None where it may be swapped."""
        original = original_class(module)
        if original is not self.original:
            return f"{original.__name__} ({original.__module__}) is a subclass that may compute something else"
        if why := trust.why_not(self.role):
            return why
        if instance_forward(module) and not isinstance(module, Fused):
            return "its forward was replaced on the instance (an accelerate hook, or another patch)"
        return self.unless(module)


def _table() -> tuple[Swap, ...]:
    from .llama import TABLE

    return TABLE


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, Swap]]:
    table = _table()
    for path, module in model.named_modules():
        for swap in table:
            if isinstance(module, swap.original):
                yield path, module, swap


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, needs a torch.nn.Module such as a LlamaForCausalLM")


def parse_ops(ops: Iterable[str] | None) -> frozenset[str]:
    """``patch``'s argument ops as a set of names.

    Raises:
        ValueError: an unknown name.
    """
    if ops is None:
        return OPS
    chosen = frozenset(map(str.strip, ops.split(",")) if isinstance(ops, str) else ops)
    if unknown := chosen - OPS:
        raise ValueError(f"ops has {sorted(unknown)}, needs names among {sorted(OPS)}")
    return chosen


def _states(model: nn.Module) -> dict[nn.Module, tuple[type, State | None]]:
    return {module: (unwrapped(module), module.__dict__.get("_fastlora")) for _, module, _ in _candidates(model)}


def _become(module: nn.Module, cls: type[nn.Module], state: State | None) -> None:
    if "forward" in module.__dict__ and not instance_forward(module):
        del module.__dict__["forward"]
    module.__class__ = rewrapped(module, cls)
    module.__dict__.pop("_fastlora", None)
    if isinstance(module, Fused) and state is not None:
        module.__dict__["_fastlora"] = state


def _restore(states: dict[nn.Module, tuple[type, State | None]]) -> None:
    for module, (cls, state) in states.items():
        _become(module, cls, state)


def patch(model: Model, ops: Iterable[str] | None = None, strict: bool = False, memory: str | int = "fast") -> Model:
    """Fuse the Llama modules of ``model`` in place, before or after ``get_peft_model``, and return it.

    Only this model changes, and of it only the class of its modules. Parameters, state_dict, hooks and config stay.
    What has no fused form keeps its own forward; ``explain(model)`` says what and why. A second call chooses anew.

    Args:
        model: a LlamaForCausalLM, or anything that contains one (a PeftModel, a wrapper).
        ops: which ops to use, names or a string of them with commas; all by default. See fastlora.patching.engine.OPS.
        strict: raise NotFused, with the model as it was, if anything that these ops could fuse would not be.
        memory: what layers keep for backward. "fast": everything. "lean": their input alone; the backward computes
            each layer again. "auto": of every layer all, all but the MLP's part, or the input alone, so that least is
            computed again and the step fits the free memory of the device; decided by the tokens of the batch, before
            anything is allocated, and anew when they grow. A number of bytes, or "20GB" or "20GiB": as "auto", with
            that for what a step adds to model, gradients and optimizer state. Where the trainer's own gradient
            checkpointing is on, or a compiler traces the model, that decides instead.

    Raises:
        TypeError, ValueError: model is not a torch.nn.Module, ops has unknown names, or memory is none of these.
        NotFused: with strict=True.
    """
    _check_model(model)
    chosen, policy = parse_ops(ops), Memory(parse(memory))
    warn_if_newer()
    before = _states(model)
    for _, module, swap in _candidates(model):
        mine = chosen & swap.ops
        if mine and swap.why_not(module) is None:
            state = State(frozenset(mine), policy)
            if isinstance(module, Fused):
                state.calls = copy.deepcopy(module._fastlora.calls)
            _become(module, swap.fast, state)
        elif isinstance(module, Fused):
            _become(module, swap.original, None)
    _number(model)
    if os.environ.get("FASTLORA_AUTOTUNE") == "1":
        from ..tuning.measure import install

        install()
    plan = explain(model)
    if strict:
        try:
            require_fused(model, plan, chosen)
        except NotFused:
            _restore(before)
            raise
    if not plan.rows:
        logging.getLogger("fastlora").warning("%s has no Llama module: nothing was fused", type(model).__name__)
    return model


def _number(model: nn.Module) -> None:
    """Tell every module in a list which of how many it is."""
    for parent in model.modules():
        if isinstance(parent, nn.ModuleList):
            layers = [module for module in parent if isinstance(module, Fused)]
            for i, layer in enumerate(layers):
                layer._fastlora.place = i, len(layers)


def require_fused(model: nn.Module, plan: Plan, ops: Iterable[str] | None = None) -> None:
    """What strict means, of the plan of a model that was patched with these ops.

    Raises:
        NotFused: something that the ops could fuse is not fused, or the model has no Llama module.
    """
    chosen = parse_ops(ops)
    left = {path for path, _, swap in _candidates(model) if not chosen & swap.ops}
    # "is not fused" follows from another row, of a module inside.
    by_choice = () if chosen == OPS else ("is not among the chosen ops", "is not fused")
    rows = [row for row in plan.unfused if row.path not in left and not str(row.why).endswith(by_choice)]
    reasons = [f"{row.path or '(model)'}: {row.why}" for row in rows]
    if not plan.rows:
        reasons = ["no Llama module found"]
    if reasons:
        raise NotFused("could not fuse\n  " + "\n  ".join(reasons))


def unpatch(model: Model) -> Model:
    """Give every module of ``model`` its own class back; nothing of fastlora stays on it. Returns the model."""
    _check_model(model)
    _restore({m: (original_class(m), None) for m in model.modules() if isinstance(m, Fused)})
    return model


@contextmanager
def patched(
    model: Model, ops: Iterable[str] | None = None, strict: bool = False, memory: str | int = "fast"
) -> Iterator[Model]:
    """``with patched(model):`` patch, and put back what was there before."""
    _check_model(model)
    before = _states(model)
    try:
        yield patch(model, ops=ops, strict=strict, memory=memory)
    finally:
        _restore(before)


def explain(model: nn.Module) -> Plan:
    """Say for every module that fastlora knows what runs, why not ours, and how often each ran since ``patch``."""
    _check_model(model)
    rows: list[Row] = []
    units = [path for path, module in model.named_modules() if is_unit(module)]
    for path, module, swap in _candidates(model):
        if not isinstance(module, Fused):
            rows.append(Row(path, f"transformers {swap.original.__name__}", swap.why_not(module) or "not patched"))
            continue
        with gathered(any(f"{path}.".startswith(f"{unit}." if unit else "") for unit in units)):
            parts = module.parts()
        for part in parts:
            row = Row(_path(path, part.name), part.runs, part.why)
            rows.append(_counted(row, module._fastlora.calls.get(part.name, {})))
    return Plan(tuple(rows), _backend(model))


def recount(plan: Plan, states: Mapping[str, State]) -> Plan:
    """A plan with the counters of now, from the states of its modules by path: the model may be gone."""
    calls = {_path(path, part): calls for path, state in states.items() for part, calls in state.calls.items()}
    return Plan(tuple(_counted(row, calls.get(row.path, {})) for row in plan.rows), plan.backend)


def _path(*parts: str) -> str:
    return ".".join(filter(None, parts))


def _counted(row: Row, calls: Mapping[str, int]) -> Row:
    passed = {reason: n for reason, n in calls.items() if reason != FUSED}
    why = row.why or (max(passed, key=passed.__getitem__) if passed else None)
    return replace(row, why=why, fused=calls.get(FUSED, 0), passed=sum(passed.values()))


def _backend(model: nn.Module) -> str:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        return "\n".join([f"Kernels: Triton on {torch.cuda.get_device_name(device)}.", *_choices(model, device)])
    return f"Kernels: CPU; C++ kernels {_library.csrc_state}"


def _choices(model: nn.Module, device: torch.device) -> list[str]:
    """What the tables say for the sizes of this model; nothing where it is no Llama."""
    from ..tuning import calls, summary

    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    config = next((one for one in configs if hasattr(one, "intermediate_size")), None)
    if config is None:
        return []
    sizes = config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads
    rank = next((p.shape[0] for name, p in model.named_parameters() if "lora_A" in name), 16)
    dtype = next((p.dtype for p in model.parameters() if p.dtype != torch.float32), torch.float32)
    return summary.lines(calls.Model(*sizes), rank, device, dtype)
