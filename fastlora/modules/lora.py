"""LoRA projections: the sole reader of PEFT's attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners import lora as peft_lora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from .. import ops
from ..ops import Branch, Projection, Quantised
from . import quantised, trust
from ._fused import Fused, Part, why_not_called, why_not_plain


class Read(NamedTuple):
    """A projection as the ops take it, its DoRA magnitude if it has one, and why only its base computes, if so."""

    projection: Projection
    magnitude: torch.Tensor | None
    base_only: str | None

    @property
    def runs(self) -> str:
        """What runs, in words."""
        over = " over a 4-bit weight" if isinstance(self.projection.weight, Quantised) else ""
        if self.base_only:
            return f"fastlora base linear{over}, {self.base_only}"
        ranks = "+".join(str(branch.a.shape[0]) for branch in self.projection.branches)
        return f"fastlora {'lora' if self.magnitude is None else 'dora'}{over}, r={ranks}"


def _active(projection: Any) -> list[str] | str:
    """The adapters that compute now; where none does and the base layer alone computes, why, in words."""
    if not isinstance(projection, peft_lora.LoraLayer):
        return "no adapter"
    if projection.disable_adapters:
        return "adapters disabled"
    if projection.merged:
        return "adapters merged"
    adapters = projection.lora_A
    return [name for name in projection.active_adapters if name in adapters] or "no active adapter"


def _read(projection: Any, dtype: torch.dtype | None = None) -> Read | str:
    """What a projection computes now, on an x of this dtype, or why it is left to its own forward."""
    if why := trust.why_not("projection"):
        return why
    adapted = isinstance(projection, peft_lora.LoraLayer)
    base: Any = projection.base_layer if adapted else projection
    dense = type(base) is nn.Linear
    if not dense and (why := quantised.why_8bit(base)):
        return why
    if adapted and not (type(projection) is peft_lora.Linear or quantised.is_peft_4bit(projection)):
        return f"{type(projection).__name__} is neither a torch Linear nor a peft lora.Linear"
    if not (dense or quantised.is_4bit(base)):
        kind = type(base).__name__
        return f"the base layer is a {kind}" if adapted else f"{kind} is neither a torch Linear nor a peft lora.Linear"
    for module in (projection, base) if adapted else (base,):
        if why := why_not_called(module) or (None if dense else quantised.why_replaced(module)):
            return why
    bias = base.bias
    weight: Any = base.weight if dense else quantised.read(base, dtype)
    if isinstance(weight, str):
        return weight
    if why := why_not_plain(weight if dense else None, bias):
        return why
    active = _active(projection)
    if isinstance(active, str):
        if adapted and projection.merged and projection.disable_adapters:
            return "merged adapters to be unmerged"
        return Read(Projection(weight, bias), None, active)
    if projection.fan_in_fan_out:
        return "fan_in_fan_out"
    branches, magnitude = [], None
    all_a, all_b, all_dropout = projection.lora_A, projection.lora_B, projection.lora_dropout
    for name in active:
        lora_a, lora_b, dropout = all_a[name], all_b[name], all_dropout[name]
        for module in (lora_a, lora_b, dropout):
            if why := why_not_called(module):
                return why
        for module in (lora_a, lora_b):
            if type(module) is not nn.Linear:  # a sharded unit of its own gathers for its own call
                return f"a LoRA factor is a {type(module).__name__}"
        if type(dropout) not in (nn.Dropout, nn.Identity):
            return f"lora_dropout is a {type(dropout).__name__}"
        a, b, b_bias = lora_a.weight, lora_b.weight, lora_b.bias
        if why := why_not_plain(a, b, b_bias):
            return why
        if lora_a.bias is not None:
            return "lora_A has a bias"
        scaling = projection.scaling[name]
        if not isinstance(scaling, (int, float)):
            return f"the scaling is a {type(scaling).__name__}, not a number: PEFT's own forward runs"
        rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        if variant := projection.lora_variant.get(name):
            if not isinstance(variant, DoraLinearVariant):
                return type(variant).__name__
            if not dense:
                return "DoRA over a 4-bit weight"
            if rate or len(active) > 1:
                return "DoRA with dropout" if rate else "DoRA among several adapters"
            vector = projection.lora_magnitude_vector[name]
            if why := trust.why_not("dora") or why_not_called(vector):
                return why
            magnitude = vector.weight
        if b_bias is not None:
            bias = b_bias * scaling if bias is None else bias + b_bias * scaling
        branches.append(Branch(a, b, scaling, rate))
    return Read(Projection(weight, bias, tuple(branches)), magnitude, None)


def _why_not_dtype(dtype: torch.dtype, x: torch.Tensor, read: Read) -> str | None:
    """Why x, come to this dtype, does not fit the projection; None where it does, or autocast makes it."""
    if why := why_not_plain(x):
        return why
    weight, device = read.projection.weight, x.device
    if weight.device != device:
        return f"weight on {weight.device}, x on {device}"
    if torch.is_autocast_enabled(device.type):
        return None
    if isinstance(weight, Quantised):  # whose layer takes any x to its compute dtype
        if why := quantised.why_not_input(weight, x):
            return why
        dtype = weight.dtype
    adapters = [branch.a.dtype for branch in read.projection.branches]
    if dtype != weight.dtype or any(a not in (dtype, torch.float32) for a in adapters):
        return f"mixed dtypes: x {dtype}, weight {weight.dtype}, adapters {adapters}".replace("torch.", "")
    return None


def part(owner: Fused, name: str, why: str | None = None) -> Part:
    """The line of explain for the projection ``owner.name``; why: the owner's reason to leave all of it alone."""
    projection = getattr(owner, name)
    kind = f"{type(projection).__module__.split('.')[0]} {type(projection).__name__}"
    if why:
        return Part(name, kind, why)
    if "lora_linear" not in owner._fastlora.ops:
        return Part(name, kind, "lora_linear is not among the chosen ops")
    read = _read(projection)
    return Part(name, kind, read) if isinstance(read, str) else Part(name, read.runs, None)


def _projections(layer: Any) -> list[Any]:
    inside = (*layer.self_attn.children(), *layer.mlp.children())
    return [module for module in inside if isinstance(module, peft_lora.LoraLayer)]


def why_only_once(layer: Any) -> str | None:
    """Why a layer's forward cannot be run again in backward; None where it can."""
    for projection in _projections(layer):
        for variant in projection.lora_variant.values():
            if not isinstance(variant, DoraLinearVariant):
                return f"{type(variant).__name__}, which may depend on the call of the model: nothing is recomputed"
    return None


def state(layer: Any) -> list[Any]:
    """What the adapters of a layer compute with beside their weights: a second forward has to find the same."""
    return [
        active
        if isinstance(active, str)
        else [(n, projection.scaling[n], projection.lora_dropout[n].training) for n in active]
        for projection in _projections(layer)
        for active in [_active(projection)]
    ]


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


def read(owner: Fused, name: str, dtype: torch.dtype, x: torch.Tensor) -> Read | None:
    """The projection ``owner.name`` if a fused operator may compute it on x, come to dtype; counts the decision."""
    if "lora_linear" not in owner._fastlora.ops:
        owner.count(name, "lora_linear is not among the chosen ops")
        return None
    found = _read(getattr(owner, name), dtype)
    why = found if isinstance(found, str) else _why_not_dtype(dtype, x, found)
    owner.count(name, why)
    return None if why else found  # type: ignore[return-value]


def _directions(reads: Sequence[Read]) -> list[Projection]:
    """The projections; those of DoRA without the bias, which comes after the magnitude."""
    return [one.projection if one.magnitude is None else one.projection._replace(bias=None) for one in reads]


def _finish(one: Read, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    weight, bias, branches = one.projection
    if isinstance(weight, Quantised):  # bitsandbytes' layers give back the dtype of their input
        return y.to(dtype)
    if one.magnitude is None:
        return y
    (branch,) = branches
    return ops.dora(y, one.magnitude, weight, branch.a, branch.b, branch.scaling, bias)


def _plain(one: Read, dtype: torch.dtype) -> bool:
    """Whether the operator's output is the projection's of an x of this dtype, with nothing left to `_finish`."""
    weight = one.projection.weight
    if one.magnitude is not None or not isinstance(weight, Quantised):
        return one.magnitude is None
    device = weight.device.type
    return dtype == (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype)


def _takes(one: Read, residual: torch.Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the projection of an x of this dtype, and the residual, have a sum in the residual's dtype."""
    if one.magnitude is not None or residual is None:
        return False
    if not isinstance(weight := one.projection.weight, Quantised):
        return True
    wider = torch.promote_types(dtype, weight.dtype)
    return torch.promote_types(wider, residual.dtype) == residual.dtype


def group(
    owner: Fused,
    names: Sequence[str],
    x: torch.Tensor,
    *,
    norm: Any = None,
    residual: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:
    """The projections ``names`` of norm(x), fused where they can be, each by its own forward where not.

    With norm, x comes last among the results and its residual gradient meets the norm's inside one kernel; residual is
    added to the output of a single projection; rotary, cos and sin, turns the first two outputs.
    """
    dtype = x.dtype if norm is None else torch.promote_types(x.dtype, norm.weight.dtype)
    reads = [read(owner, name, dtype, x) for name in names]
    fused = [one for one in reads if one is not None]
    one_dtype = len({one.projection.weight.dtype for one in fused}) == 1
    if len(fused) == len(names) and one_dtype:
        arguments = {} if norm is None else {"norm_weight": norm.weight, "eps": norm.variance_epsilon}
        plain = all(_plain(one, dtype) for one in fused)
        early = residual if _takes(fused[0], residual, dtype) else None
        turn = rotary if plain else None
        y = list(ops.lora_group(x, _directions(fused), residual=early, rotary=turn, **arguments))
        if norm is not None:
            norm.count("")
            x = y.pop()
        if early is not None:
            residual = None
        elif plain:
            rotary = None
        else:
            y = [_finish(one, out, dtype) for one, out in zip(fused, y, strict=True)]
    else:
        n = x if norm is None else norm(x)
        directions = _directions(fused)
        groups = [directions] if one_dtype else [[one] for one in directions]
        outs = iter([y for one in groups for y in ops.lora_group(n, one)])
        y = [
            getattr(owner, name)(n) if one is None else _finish(one, next(outs), dtype)
            for name, one in zip(names, reads, strict=True)
        ]
    if rotary is not None:
        q, k = (one.unflatten(-1, (-1, rotary[0].shape[-1])).transpose(1, 2) for one in y[:2])
        y[:2] = (one.transpose(1, 2).flatten(2) for one in ops.rope(q, k, *rotary))
    if residual is not None:
        y = [residual + y[0]]
    return tuple(y) if norm is None else (*y, x)


def mlp(owner: Fused, x: torch.Tensor, norm: Any) -> torch.Tensor | None:
    """``x + owner(norm(x))``, or ``owner(x)`` without a norm, in one operator; None where it cannot be."""
    names = ("gate_proj", "up_proj", "down_proj")
    if "lora_linear" not in owner._fastlora.ops:
        return None
    dtype = x.dtype if norm is None else torch.promote_types(x.dtype, norm.weight.dtype)
    projections = []
    for name in names:
        found = _read(getattr(owner, name), dtype)
        if isinstance(found, str) or not _plain(found, dtype) or _why_not_dtype(dtype, x, found):
            return None
        projections.append(found.projection)
    if len({one.weight.dtype for one in projections}) > 1:
        return None
    # Before the operator: gradient checkpointing leaves a layer's second forward as soon as it has what backward needs.
    for name in ("", *names):
        owner.count(name)
    if norm is None:
        return ops.lora_mlp(x, *projections)
    norm.count("")
    return ops.lora_mlp(x, *projections, norm_weight=norm.weight, eps=norm.variance_epsilon)
