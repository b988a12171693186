"""Tiny Llamas on a 4-bit base, without files and configs, and the same models dense."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import torch
from torch import nn

from fastlora import reference


def quantise(
    model: nn.Module,
    *,
    compute: torch.dtype | None = torch.bfloat16,
    quant_type: str = "nf4",
    double: bool = True,
    storage: torch.dtype = torch.uint8,
    blocksize: int = 64,
    keep: tuple[str, ...] = ("lm_head",),
) -> nn.Module:
    """Every Linear but those named becomes a bitsandbytes Linear4bit, as transformers makes it."""
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not nn.Linear or name in keep:
                continue
            options = {"compress_statistics": double, "quant_type": quant_type, "quant_storage": storage}
            layer = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=compute, **options
            )
            layer.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, blocksize=blocksize, module=layer, **options
            )
            layer.bias = linear.bias
            setattr(parent, name, layer.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def dense(model: nn.Module) -> nn.Module:
    """A copy in which each 4-bit weight is what it stands for, in its compute dtype. PEFT layers become dense ones."""
    from peft.tuners import lora

    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, bnb.nn.Linear4bit):
                continue
            state = layer.weight.quant_state
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            w = reference.dequantize_4bit(layer.weight, state, layer.compute_dtype)
            linear.weight = nn.Parameter(w, requires_grad=False)
            linear.bias = layer.bias
            setattr(parent, name, linear)
        if type(parent).__name__ == "Linear4bit" and isinstance(parent, lora.LoraLayer):
            parent.__class__ = lora.Linear
    return model
