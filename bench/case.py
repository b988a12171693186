"""A case: one op at one shape, what any implementation of it must read, write and compute, and who can run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Inputs = dict[str, Any]
Function = Callable[..., Any]


class Work(NamedTuple):
    """The least an implementation must do: each input read once, each output written once; FLOPs of its products."""

    bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(self.bytes + other.bytes, self.flops + other.flops)


_NOTHING = Work(0, 0)


class Provider(NamedTuple):
    """Somebody's implementation, called with the inputs by name.

    Attributes:
        name: as it appears in tables.
        run: the implementation.
        why: why it cannot run here; None where it can.
        witness: what it computes, where that is less than the op (a floor, such as the base product alone).
    """

    name: str
    run: Function | None
    why: str | None = None
    witness: Function | None = None


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        op: name of the file under bench/ops.
        shape: the field's letters and their sizes.
        inputs: makes random inputs.
        reference: the eager witness; float64 inputs make it the truth.
        wrt: inputs whose gradient is asked for; none: forward only.
        weights: inputs that are parameters of the model, which are not counted as saved.
        forward, backward: the least work of each.
        terms: where the op returns a mean, the reference of what it is the mean of.
        providers: the implementations; the witness itself runs as "eager" beside them.
    """

    op: str
    shape: dict[str, int]
    inputs: Callable[[New], Inputs]
    reference: Function
    forward: Work
    providers: tuple[Provider, ...]
    backward: Work = _NOTHING
    wrt: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    terms: Function | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        return ("forward", "full") if self.wrt else ("forward",)

    def prepare(self, device: str, dtype: torch.dtype, draw: int = 0) -> Inputs:
        """One draw of the inputs, asking for the gradients of wrt."""
        made = self.inputs(New(device, dtype, draw))
        for name in self.wrt:
            made[name].requires_grad_()
        return made

    def work(self, mode: str) -> Work:
        return self.forward if mode == "forward" else self.forward + self.backward


class New:
    """Makes random tensors of one dtype on one device."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers times scale."""
        values = torch.randn(shape, generator=self._generator, device=self.device)
        return values.mul_(scale).to(dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self._generator, device=self.device)


def tensors(result: Any) -> tuple[torch.Tensor, ...]:
    """The outputs of a function as a tuple."""
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)
