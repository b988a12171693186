"""Argument checks. Every error names the operator, the argument, what was got and what is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape(op: str, argument: str, tensor: Any, needed: Sequence[int | None], why: str) -> None:
    """Raise ValueError unless tensor has the needed sizes (None: any size)."""
    got = tuple(tensor.shape)
    if len(got) != len(needed) or any(n is not None and n != g for n, g in zip(needed, got, strict=True)):
        sizes = ", ".join("any" if n is None else str(n) for n in needed)
        raise ValueError(f"{op}: {argument} has shape {got}, needs ({sizes}) {why}")


def dtype(op: str, argument: str, tensor: Any, needed: Sequence[torch.dtype], why: str = "") -> None:
    """Raise TypeError unless the tensor's dtype is one of those needed."""
    if tensor.dtype not in needed:
        raise TypeError(
            f"{op}: {argument} is {_name(tensor.dtype)}, needs {' or '.join(map(_name, needed))} {why}".rstrip()
        )


def same_device(op: str, first: str, reference: torch.Tensor, **others: Any) -> None:
    """Raise ValueError unless the others live where the reference does, on a CPU or a CUDA device."""
    if reference.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{op}: {first} is on {reference.device}, needs a CPU or CUDA device")
    for argument, tensor in others.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(f"{op}: {argument} is on {tensor.device}, needs {reference.device}, the device of {first}")


def widened(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor for a kernel that takes it in dtype or in fp32: in fp32, which is exact, where it is in neither."""
    return tensor if tensor.dtype == dtype else tensor.float()


def autocast(device: torch.device, *tensors: Any) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where autocast is on for this device, as torch's own matmul takes them."""
    if not torch.is_autocast_enabled(device.type):
        return tensors
    target = torch.get_autocast_dtype(device.type)
    return tuple(t.to(target) if t is not None else None for t in tensors)
