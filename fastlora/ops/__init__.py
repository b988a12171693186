"""Differentiable functions, one per file. Each has a Triton form for GPUs and a C++ or ATen form for CPUs."""

from .linear_cross_entropy import linear_cross_entropy
from .lora_linear import lora_linear
from .rms_norm import rms_norm
from .rope import rope
from .swiglu import swiglu

__all__ = ["linear_cross_entropy", "lora_linear", "rms_norm", "rope", "swiglu"]
