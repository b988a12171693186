"""LoRA projections: the sole reader of PEFT's attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners import lora as peft_lora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from .. import ops
from ..ops import Branch, Projection
from ._fused import Fused, Part, why_not_called, why_not_plain


class Read(NamedTuple):
    """A projection as the ops take it, its DoRA magnitude if it has one, and what runs in words."""

    projection: Projection
    magnitude: torch.Tensor | None
    runs: str


def _base_only(projection: Any) -> str | None:
    """In words, why only the base layer of a projection computes now; None where adapters do."""
    if type(projection) is nn.Linear:
        return "no adapter"
    if projection.disable_adapters:
        return "adapters disabled"
    if projection.merged:
        return "adapters merged"
    return None if _active(projection) else "no active adapter"


def _active(projection: Any) -> list[str]:
    return [name for name in projection.active_adapters if name in projection.lora_A]


def _read(projection: Any) -> Read | str:
    """What a projection computes now, or why it is left to its own forward."""
    if type(projection) not in (nn.Linear, peft_lora.Linear):
        return f"{type(projection).__name__} is neither a torch Linear nor a peft lora.Linear"
    base = projection if type(projection) is nn.Linear else projection.base_layer
    if type(base) is not nn.Linear:
        return f"the base layer is a {type(base).__name__}"
    for module in {projection, base}:
        if why := why_not_called(module):
            return why
    if why := why_not_plain(base.weight, base.bias):
        return why
    if note := _base_only(projection):
        if type(projection) is not nn.Linear and projection.merged and projection.disable_adapters:
            return "merged adapters to be unmerged"
        return Read(Projection(base.weight, base.bias), None, f"fastlora base linear, {note}")
    if projection.fan_in_fan_out:
        return "fan_in_fan_out"
    active = _active(projection)
    bias, branches, magnitude = base.bias, [], None
    for name in active:
        lora_a, lora_b, dropout = projection.lora_A[name], projection.lora_B[name], projection.lora_dropout[name]
        for module in (lora_a, lora_b, dropout):
            if why := why_not_called(module):
                return why
        if type(dropout) not in (nn.Dropout, nn.Identity):
            return f"lora_dropout is a {type(dropout).__name__}"
        if why := why_not_plain(lora_a.weight, lora_b.weight, lora_b.bias):
            return why
        scaling = projection.scaling[name]
        rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        if variant := projection.lora_variant.get(name):
            if not isinstance(variant, DoraLinearVariant):
                return type(variant).__name__
            if rate or len(active) > 1:
                return "DoRA with dropout" if rate else "DoRA among several adapters"
            magnitude = projection.lora_magnitude_vector[name].weight
        if lora_b.bias is not None:
            bias = lora_b.bias * scaling if bias is None else bias + lora_b.bias * scaling
        branches.append(Branch(lora_a.weight, lora_b.weight, scaling, rate))
    ranks = "+".join(str(branch.a.shape[0]) for branch in branches)
    kind = "lora" if magnitude is None else "dora"
    return Read(Projection(base.weight, bias, tuple(branches)), magnitude, f"fastlora {kind}, r={ranks}")


def _why_not_dtype(dtype: torch.dtype, device: torch.device, read: Read) -> str | None:
    """Why an input of this dtype does not fit the projection; None where it does, or autocast makes it."""
    weight = read.projection.weight
    if weight.device != device:
        return f"weight on {weight.device}, x on {device}"
    if torch.is_autocast_enabled(device.type):
        return None
    adapters = [branch.a.dtype for branch in read.projection.branches]
    if dtype != weight.dtype or any(a not in (dtype, torch.float32) for a in adapters):
        return f"mixed dtypes: x {dtype}, weight {weight.dtype}, adapters {adapters}".replace("torch.", "")
    return None


def part(owner: Fused, name: str) -> Part:
    """The line of explain for the projection ``owner.name``."""
    projection = getattr(owner, name)
    kind = f"{type(projection).__module__.split('.')[0]} {type(projection).__name__}"
    if "lora_linear" not in owner._fastlora.ops:
        return Part(name, kind, "lora_linear is not among the chosen ops")
    read = _read(projection)
    return Part(name, kind, read) if isinstance(read, str) else Part(name, read.runs, None)


def adapters(owner: Any, names: Sequence[str]) -> list[tuple[str, int, float]] | None:
    """Name, ranks together, and dropout of each of these projections; None where one is left to its own forward."""
    found = []
    for name in names:
        one = _read(getattr(owner, name)) if "lora_linear" in owner._fastlora.ops else "lora_linear is not chosen"
        if isinstance(one, str):
            return None
        branches = one.projection.branches
        ranks = sum(branch.a.shape[0] for branch in branches)
        found.append((name, ranks, max((branch.dropout for branch in branches), default=0.0)))
    return found


def read(owner: Fused, name: str, dtype: torch.dtype, device: torch.device) -> Read | None:
    """The projection ``owner.name`` if a fused operator may compute it on such an input; counts the decision."""
    if "lora_linear" not in owner._fastlora.ops:
        owner.count(name, "lora_linear is not among the chosen ops")
        return None
    found = _read(getattr(owner, name))
    why = found if isinstance(found, str) else _why_not_dtype(dtype, device, found)
    owner.count(name, why)
    return None if why else found  # type: ignore[return-value]


def _directions(reads: Sequence[Read]) -> list[Projection]:
    """The projections; those of DoRA without the bias, which comes after the magnitude."""
    return [one.projection if one.magnitude is None else one.projection._replace(bias=None) for one in reads]


def _finish(one: Read, y: torch.Tensor) -> torch.Tensor:
    if one.magnitude is None:
        return y
    weight, bias, (branch,) = one.projection
    return ops.dora(y, one.magnitude, weight, branch.a, branch.b, branch.scaling, bias)


def group(
    owner: Fused,
    names: Sequence[str],
    x: torch.Tensor,
    *,
    norm: Any = None,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The projections ``names`` of norm(x), fused where they can be, each by its own forward where not.

    With norm, x comes last among the results and its residual gradient meets the norm's inside one kernel; residual is
    added to the output of a single projection.
    """
    dtype = x.dtype if norm is None else torch.promote_types(x.dtype, norm.weight.dtype)
    reads = [read(owner, name, dtype, x.device) for name in names]
    fused = [one for one in reads if one is not None]
    if len(fused) == len(names):
        arguments = {} if norm is None else {"norm_weight": norm.weight, "eps": norm.variance_epsilon}
        early = residual if fused[0].magnitude is None else None
        y = list(ops.lora_group(x, _directions(fused), residual=early, **arguments))
        if norm is not None:
            norm.count("")
            x = y.pop()
        y = [_finish(one, out) for one, out in zip(fused, y, strict=True)]
        residual = None if early is not None else residual
    else:
        n = x if norm is None else norm(x)
        outs = iter(ops.lora_group(n, _directions(fused)) if fused else ())
        y = [
            getattr(owner, name)(n) if one is None else _finish(one, next(outs))
            for name, one in zip(names, reads, strict=True)
        ]
    if residual is not None:
        y = [residual + y[0]]
    return tuple(y) if norm is None else (*y, x)


def swiglu_down(
    owner: Fused, name: str, gate: torch.Tensor, up: torch.Tensor, residual: torch.Tensor | None
) -> torch.Tensor | None:
    """``residual + owner.name(silu(gate) · up)`` in one operator; None, and nothing counted, where it cannot be."""
    if "lora_linear" not in owner._fastlora.ops:
        return None
    found = _read(getattr(owner, name))
    if isinstance(found, str) or found.magnitude is not None or _why_not_dtype(gate.dtype, gate.device, found):
        return None
    device = gate.device.type
    if torch.is_autocast_enabled(device) and gate.dtype != torch.get_autocast_dtype(device):
        return None
    owner.count(name)
    return ops.swiglu_lora(gate, up, found.projection, residual)
