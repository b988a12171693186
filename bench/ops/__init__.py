"""One file per op: its inputs, the bytes and FLOPs any implementation needs, and the providers.

Every file has ``cases(device, dtype, quick)``; quick shapes are for tests and smoke runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch

from ..case import Case

NAMES = (
    "rms_norm",
    "rope",
    "swiglu",
    "lora_linear",
    "lora_group",
    "lora_mlp",
    "linear_cross_entropy",
    "attention",
    "attention_masked",
    "lora_gemm",
    "lora_gemm_t",
    "lora_skinny",
    "dequantize_4bit",
)


def cases(name: str, device: str, dtype: torch.dtype, quick: bool = False) -> Iterator[Case]:
    """The cases of one op for a device.

    Raises:
        ValueError: there is no such op.
    """
    if name not in NAMES:
        raise ValueError(f"no op is called {name!r}; there are {', '.join(NAMES)}")
    yield from importlib.import_module(f".{name}", __name__).cases(device, dtype, quick)
