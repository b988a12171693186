"""Eager float mathematics, one function per op: the witness. Only tests and benchmarks import it."""

from .linear_cross_entropy import linear_cross_entropy
from .lora_linear import lora_linear
from .rms_norm import rms_norm
from .rope import rope
from .swiglu import swiglu

__all__ = ["linear_cross_entropy", "lora_linear", "rms_norm", "rope", "swiglu"]
