"""``outputs.logits`` as llama.py makes it: a lazy tensor, and what stands for it in a compiled forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ._fused import why_not_plain
from .lazy_logits import attached, sample


def lazy_logits(head: nn.Linear, hidden: torch.Tensor) -> Any:
    """``head(hidden)``, (..., V), computed when it is first read, in the dtype that autocast gives it here.

    Computed at once inside a torch.func transform, whose tensors do not outlive it, and for hidden states of a tensor
    subclass, which decides the type of its results.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if torch.compiler.is_compiling():
        return TracedLogits(hidden, head.weight, (dtype,), sample(hidden.detach()), sample(head.weight.detach()))
    if torch._C._are_functorch_transforms_active() or why_not_plain(hidden):
        return head(hidden)
    return attached(hidden, head.weight, dtype)


class TracedLogits:
    """What a compiled forward returns in place of LazyLogits. It is no tensor; ``logits[...]`` is.

    A graph computes every tensor that it returns, in every step, and asks for its gradient, zeros included. So it
    returns the factors, which are there anyway, and their samples. The first touch makes a LazyLogits of them; a touch
    inside the compiled region is traced as a product with the head.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        dtypes: tuple[torch.dtype, ...],
        *samples: torch.Tensor,
    ) -> None:
        self._hidden, self._weight, self._dtypes, self._samples = hidden, weight, dtypes, samples
        self._value: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._hidden.shape[:-1], self._weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        return self._dtypes[-1]

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    def float(self) -> TracedLogits:
        return TracedLogits(self._hidden, self._weight, (*self._dtypes, torch.float32), *self._samples)

    def _tensor(self) -> torch.Tensor:
        if self._value is None:
            first, *casts = self._dtypes
            if torch.compiler.is_compiling():
                with torch.autocast(self.device.type, enabled=False):
                    value: torch.Tensor = nn.functional.linear(self._hidden.to(first), self._weight.to(first))
            else:
                value = attached(self._hidden, self._weight, first, self._samples)
            for dtype in casts:
                value = value.to(dtype)
            self._value = value
        return self._value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle probe for these before there is anything to compute
            raise AttributeError(name)
        return getattr(self._tensor(), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor()[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._tensor()[index] = value

    def __len__(self) -> int:
        return self.shape[0]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._tensor().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return f"TracedLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, lambda x: x._tensor(), (args, kwargs or {}))
        return function(*args, **kwargs)


def _operator(name: str) -> Any:
    return lambda self, *others: getattr(self._tensor(), name)(*others)


_UNARY = ("neg", "abs")
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")
for _name in (*_UNARY, *_BINARY, *(f"r{name}" for name in _BINARY), *_COMPARE):
    setattr(TracedLogits, f"__{_name}__", _operator(f"__{_name}__"))
