"""Quantised bases: the sole reader of bitsandbytes' attributes. bitsandbytes itself is not imported."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora as peft_lora
from torch import nn

from ..ops import Quantised, quantised
from ..ops.dequantize_4bit import why_not_4bit
from . import trust

_PACKAGE = "bitsandbytes.nn.modules"
# On a GPU bitsandbytes has a kernel for this many rows and fewer that never writes the dense weight.
FEW = 4


def _is(module: Any, *names: str) -> bool:
    return type(module).__module__ == _PACKAGE and type(module).__name__ in names


def is_4bit(base: Any) -> bool:
    return _is(base, "Linear4bit", "LinearNF4", "LinearFP4")


def is_peft_4bit(projection: Any) -> bool:
    """A peft LoRA layer over a 4-bit base; its module is imported only where bitsandbytes is."""
    return type(projection).__module__ == "peft.tuners.lora.bnb" and type(projection).__name__ == "Linear4bit"


def why_replaced(module: Any) -> str | None:
    """Why the forward of a bitsandbytes layer, or of PEFT's layer over one, is not ours to bypass."""
    return trust.why_not_class(type(module)) if is_4bit(module) or is_peft_4bit(module) else None


def why_8bit(base: Any) -> str | None:
    """Why an LLM.int8 base is left to bitsandbytes; None for any other base."""
    if not _is(base, "Linear8bitLt"):
        return None
    return "8 bits: LLM.int8 quantises x too and multiplies in int8, a product that bitsandbytes' own kernels make"


def read(base: Any, dtype: torch.dtype | None) -> Quantised | str:
    """The weight of a bitsandbytes Linear4bit as the ops take it, or why they cannot. dtype: of x, if known."""
    weight = base.weight
    state = getattr(weight, "quant_state", None) or getattr(base, "quant_state", None)
    if state is None:
        return "a 4-bit layer that is not quantised yet"
    if type(weight).__name__ not in ("Params4bit", "Parameter", "Tensor"):
        return f"a tensor is a {type(weight).__name__}"
    if weight.device.type not in ("cpu", "cuda", "meta"):
        return f"a tensor is on {weight.device}"
    if len(state.shape) != 2:
        return f"a 4-bit weight of shape {tuple(state.shape)}"
    # Without a compute dtype of its own, the layer computes in that of the first x it sees.
    return why_not_4bit(state) or quantised(weight, state, base.compute_dtype or dtype or state.dtype)


def why_not_input(weight: Quantised, x: torch.Tensor) -> str | None:
    """Why bitsandbytes is better left alone with this x; None where it is not."""
    if x.is_cuda and not torch.is_grad_enabled() and x.numel() <= FEW * x.shape[-1]:
        return f"at most {FEW} tokens: bitsandbytes' kernel does not dequantise the weight"
    return None


def make_dense(module: nn.Module, dtype: torch.dtype) -> None:
    """In place, every 4-bit layer within as the dense layer it stands for; dtype: of x, for those without one.

    Raises:
        ValueError: a quantised layer that has no dense form here.
    """
    for parent in list(module.modules()):
        children: list[tuple[str, Any]] = list(parent.named_children())
        for name, base in children:
            if why_8bit(base):
                raise ValueError(f"{name} is a {type(base).__name__}, whose products have no dense form")
            if not is_4bit(base):
                continue
            weight = read(base, dtype)
            if isinstance(weight, str):
                raise ValueError(f"{name} is {weight}")
            linear = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
            linear.weight, linear.bias = nn.Parameter(weight.dense(), requires_grad=False), base.bias
            setattr(parent, name, linear)
        if is_peft_4bit(parent):
            parent.__class__ = peft_lora.Linear
