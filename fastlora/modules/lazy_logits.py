"""Logits that cost nothing until somebody reads them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ._fused import why_not_plain


class LazyLogits:
    """Stands where a trainer expects ``outputs.logits`` after a fused loss, and computes them on first use.

    ``shape``, ``dtype``, ``device`` and ``float()`` are answered without computing anything, because mixed-precision
    wrappers ask for them at every step; any other attribute, index or torch function computes ``head(hidden)``.
    """

    def __init__(self, head: nn.Linear, hidden: torch.Tensor) -> None:
        self._head, self._hidden = head, hidden
        # Whoever reads the logits may do so outside the autocast region that the model ran in.
        device = hidden.device.type
        self._autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.dtype = self._autocast or hidden.dtype
        self._value: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._hidden.shape[:-1], self._head.out_features))

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    def float(self) -> LazyLogits:
        wide = copy.copy(self)
        wide.dtype, wide._value = torch.float32, None
        return wide

    def tensor(self) -> torch.Tensor:
        """The logits, (..., V), attached to the graph of the hidden states.

        Raises RuntimeError where FSDP has sharded the head again since the forward.
        """
        if self._value is None:
            weight = self._head.weight
            if why_not_plain(weight) or weight.shape != (self._head.out_features, self._head.in_features):
                raise RuntimeError(
                    "outputs.logits: lm_head has been sharded again since the forward. Read the logits before "
                    "backward, or choose ops without linear_cross_entropy in fastlora.patch"
                )
            with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
                self._value = self._head(self._hidden).to(self.dtype)
        return self._value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle probe for these before there is anything to compute
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor()[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tensor()[index] = value

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, lambda x: x.tensor(), (args, kwargs or {}))
        return function(*args, **kwargs)


def _operator(name: str) -> Any:
    return lambda self, *others: getattr(self.tensor(), name)(*others)


_UNARY = ("neg", "abs")
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")
for _name in (*_UNARY, *_BINARY, *(f"r{name}" for name in _BINARY), *_COMPARE):
    setattr(LazyLogits, f"__{_name}__", _operator(f"__{_name}__"))
