"""Differentiable functions, one per file. Each has a Triton form for GPUs and a C++ or ATen form for CPUs."""

from ._group import Branch, Projection
from .dequantize_4bit import Quantised, dequantize_4bit, quantised
from .dora import dora
from .flash_attention import flash_attention
from .linear_cross_entropy import linear_cross_entropy
from .lora_group import lora_group
from .lora_linear import lora_linear
from .lora_mlp import lora_mlp
from .rms_norm import rms_norm
from .rope import rope
from .swiglu import swiglu

__all__ = [
    "Branch",
    "Projection",
    "Quantised",
    "dequantize_4bit",
    "dora",
    "flash_attention",
    "linear_cross_entropy",
    "lora_group",
    "lora_linear",
    "lora_mlp",
    "quantised",
    "rms_norm",
    "rope",
    "swiglu",
]
