"""LoRA projections: the sole reader of PEFT's attributes."""

from __future__ import annotations

import torch
from peft.tuners import lora as peft_lora
from torch import nn

from ..ops import lora_linear
from ._fused import Fused, Part, why_not_called, why_not_plain

_BASE = "torch.nn.Linear"
_PEFT = "peft lora.Linear"


def _active(projection: peft_lora.Linear) -> list[str]:
    return [name for name in projection.active_adapters if name in projection.lora_A]


def _runs_base(projection: nn.Module) -> str | None:
    """In words, a projection of which only the base layer computes now; None where adapters do."""
    if type(projection) is nn.Linear:
        return f"{_BASE}, no adapter"
    if not isinstance(projection, peft_lora.Linear):
        return None
    if projection.disable_adapters:
        return f"{_BASE}, adapters disabled"
    if projection.merged:
        return f"{_BASE}, adapters merged"
    if not _active(projection):
        return f"{_BASE}, no active adapter"
    return None


def _why_not(projection: nn.Module) -> str | None:
    """Why a projection with active adapters is left to its own forward; None where lora_linear runs it."""
    if type(projection) is not peft_lora.Linear:
        return f"{type(projection).__name__} is not a peft lora.Linear"
    active = _active(projection)
    if len(active) > 1:
        return f"{len(active)} active adapters"
    name = active[0]
    base, lora_a, lora_b = projection.base_layer, projection.lora_A[name], projection.lora_B[name]
    dropout = projection.lora_dropout[name]
    if type(base) is not nn.Linear:
        return f"the base layer is a {type(base).__name__}"
    if name in projection.lora_variant:
        return type(projection.lora_variant[name]).__name__
    if projection.fan_in_fan_out:
        return "fan_in_fan_out"
    if lora_b.bias is not None:
        return "lora_bias"
    if projection.training and isinstance(dropout, nn.Dropout) and dropout.p > 0:
        return f"lora_dropout {dropout.p} in training"
    for module in (projection, base, lora_a, lora_b, dropout):
        if why := why_not_called(module):
            return why
    return why_not_plain(base.weight, base.bias, lora_a.weight, lora_b.weight)


def _why_not_dtype(x: torch.Tensor, projection: peft_lora.Linear, name: str) -> str | None:
    weight, lora_a = projection.base_layer.weight, projection.lora_A[name].weight
    if torch.is_autocast_enabled(x.device.type):
        return None
    if x.dtype != weight.dtype or lora_a.dtype not in (x.dtype, torch.float32):
        return f"mixed dtypes: x {x.dtype}, weight {weight.dtype}, lora_A {lora_a.dtype}".replace("torch.", "")
    return None


def part(owner: Fused, name: str) -> Part:
    """The line of explain for the projection ``owner.name``."""
    projection = getattr(owner, name)
    if base := _runs_base(projection):
        return Part(name, base, None)
    if "lora_linear" not in owner._fastlora.ops:
        return Part(name, _PEFT, "lora_linear is not among the chosen ops")
    why = _why_not(projection)
    if why:
        return Part(name, f"peft lora.{type(projection).__name__}", why)
    rank = projection.lora_A[_active(projection)[0]].weight.shape[0]
    return Part(name, f"fastlora lora_linear, r={rank}", None)


def linear(owner: Fused, name: str, x: torch.Tensor) -> torch.Tensor:
    """``owner.name(x)``: one fused operator where the projection is plain LoRA, its own forward where it is not."""
    projection = getattr(owner, name)
    if _runs_base(projection) or "lora_linear" not in owner._fastlora.ops:
        return projection(x)
    why = _why_not(projection) or why_not_plain(x)
    if why is None:
        adapter = _active(projection)[0]
        why = _why_not_dtype(x, projection, adapter)
    owner.count(name, why)
    if why:
        return projection(x)
    base = projection.base_layer
    return lora_linear(
        x,
        base.weight,
        projection.lora_A[adapter].weight,
        projection.lora_B[adapter].weight,
        projection.scaling[adapter],
        base.bias,
    )
