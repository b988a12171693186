"""``outputs.logits`` of a fused training step: a torch.Tensor that costs nothing until somebody reads it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear
from torch.utils._pytree import tree_map_only

from ..ops._linear_node import linear_node

_SAMPLES = 1024
_aten = torch.ops.aten
_COPY = (_aten.clone.default, _aten._to_copy.default)
_SAME_LAYOUT = (None, torch.preserve_format, torch.contiguous_format)


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of at most 1024 elements, spread evenly over every dimension. Nothing waits for the device."""
    most = round(_SAMPLES ** (1 / tensor.dim()))
    return tensor[tuple(slice(None, None, -(-size // most) or 1) for size in tensor.shape)].clone(
        memory_format=torch.contiguous_format
    )


class Operand(NamedTuple):
    """A factor of the logits as it was in the forward. The tensor is detached; its memory is the caller's."""

    name: str
    tensor: torch.Tensor
    version: int | None
    sample: torch.Tensor

    def why_gone(self, samples: bool) -> str | None:
        """What has happened to it since. ``samples``: look at its elements, too, which waits for the device."""
        tensor = self.tensor
        if tensor.numel() and not tensor.untyped_storage().nbytes():  # how FSDP frees what it gathered
            return f"{self.name} has been sharded again"
        if self.version not in (None, tensor._version) or (samples and self._written()):
            return f"{self.name} has changed"
        return None

    def _written(self) -> bool:
        """Whether somebody wrote through ``.data``, which moves no version. A CUDA graph in capture cannot wait."""
        if self.tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        before, now = self.sample.view(torch.uint8), sample(self.tensor).view(torch.uint8)  # NaN is itself
        return not torch.equal(before, now)


class Product:
    """``hidden weightᵀ``, (..., V), in ``dtype``, not computed yet."""

    def __init__(self, operands: list[Operand], dtype: torch.dtype) -> None:
        (self.hidden, self.weight), self.dtype = operands, dtype

    def check(self, samples: bool) -> None:
        """Raise RuntimeError where the factors are no longer those of the forward."""
        if why := self.weight.why_gone(samples) or self.hidden.why_gone(samples):
            raise RuntimeError(
                f"fastlora: outputs.logits cannot be computed any more, because {why} since the forward: read the "
                "logits before the optimizer's step and before anything else that changes it, or patch with "
                "fastlora.patch(model, ops=...) without linear_cross_entropy"
            )

    def compute(self) -> torch.Tensor:
        self.check(samples=True)
        hidden, weight = self.hidden.tensor.to(self.dtype), self.weight.tensor.to(self.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return linear(hidden, weight)


class Cell:
    """The logits of all tensors that share memory: a product with the casts made since, or else its value."""

    def __init__(
        self, product: Product | None, dtypes: tuple[torch.dtype, ...] = (), value: Any = None, flat: Any = None
    ) -> None:
        self.product, self.dtypes, self.value, self.flat = product, dtypes, value, flat

    def read(self) -> torch.Tensor:
        if self.product is not None:
            with torch.inference_mode(False), torch.no_grad():
                value = self.product.compute()
                for dtype in self.dtypes:
                    value = value.to(dtype)
            self.product, self.value = None, value
        return self.value


class LazyLogits(torch.Tensor):
    """A tensor without storage. An operator on it runs on the value, which is computed once for all aliases.

    Shape, dtype, device, the graph and its hooks are its own: they cost nothing. Neither do ``detach``, ``clone`` and
    casts, which mixed precision and engines ask for at every step: while nobody has read the value, they give another
    LazyLogits. All other results are plain tensors.

    Raises RuntimeError where the hidden states or the head's weight have changed between the forward and the first
    read, so that the logits of the forward are out of reach.
    """

    _cell: Cell

    @staticmethod
    def __new__(
        cls: type[LazyLogits], cell: Cell, shape: torch.Size, dtype: torch.dtype, device: torch.device, **memory: Any
    ) -> Any:
        self: Any = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, **memory)
        torch._C._set_throw_on_mutable_data_ptr(self)  # C++ that takes the pointer gets an error, not null
        self._cell = cell
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if (lazy := _unread(function, args, kwargs)) is not None:
            return lazy
        if torch.Tag.inplace_view in function.tags and isinstance(args[0], cls):
            args[0].data = function(args[0]._cell.read().detach(), *args[1:], **kwargs)
            return args[0]
        args, kwargs = tree_map_only(cls, lambda x: x._cell.read(), (args, kwargs))
        return function(*args, **kwargs)

    def _plain(self) -> torch.Tensor:
        """A plain tensor of the same memory, at the same place in the graph."""
        if self.is_leaf:
            plain = self._cell.read().detach().requires_grad_(self.requires_grad)
            plain.grad = self.grad
            return plain
        return self[...]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    # What reads memory without an operator.

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self._cell = Cell(None, (), other[...].detach())

    def untyped_storage(self) -> torch.UntypedStorage:
        return self._cell.read().untyped_storage()

    def data_ptr(self) -> int:
        return self._cell.read().data_ptr()

    const_data_ptr = data_ptr

    def numpy(self, *, force: bool = False) -> Any:
        return self._plain().numpy(force=force)

    def tolist(self) -> Any:
        return self._plain().tolist()

    def apply_(self, callable: Any) -> Any:
        self._plain().apply_(callable)
        return self

    def map_(self, tensor: Any, callable: Any) -> Any:
        self._plain().map_(tensor, callable)
        return self

    def __dlpack__(self, **options: Any) -> Any:
        return self._plain().__dlpack__(**options)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self._plain(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)

    # What torch.compile asks of a tensor that is given to compiled code: the value, in a storage of its own, because
    # fake tensors are made per storage, and this tensor answers with the value's.

    @property
    def _flat(self) -> torch.Tensor:
        value = self._cell.read()
        if self._cell.flat is None:
            self._cell.flat = torch.from_dlpack(value)
        return self._cell.flat

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["_flat"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: Any, size: Any, stride: Any) -> Any:
        value = inner["_flat"]
        return LazyLogits(Cell(None, (), value, value), value.shape, value.dtype, value.device, strides=value.stride())


# As the house's swapped classes do: whatever asks for a tensor's class by name is to see the one it stands for.
LazyLogits.__name__, LazyLogits.__qualname__, LazyLogits.__module__ = "Tensor", "Tensor", "torch"


def _unread(function: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    """What aliases, copies and casts of logits that nobody has read give: another LazyLogits; None: read them."""
    if function not in (_aten.detach.default, _aten.view.default, *_COPY):
        return None
    x, cell, dtype = args[0], args[0]._cell, args[0].dtype
    if cell.product is None and function is not _aten.detach.default:  # nn.Parameter asks that detach keep the class
        return None
    if function is _aten.view.default and tuple(args[1]) != x.shape:  # else what a Function gives for its own input
        return None
    if function in _COPY:
        dtype = kwargs.get("dtype") or dtype
        if kwargs.get("device") not in (None, x.device) or kwargs.get("memory_format") not in _SAME_LAYOUT:
            return None
        cell = Cell(cell.product, (*cell.dtypes, dtype))
    memory = {"strides": x.stride(), "storage_offset": x.storage_offset()}
    return LazyLogits(cell, x.shape, dtype, x.device, **memory)


def attached(
    hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, samples: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """``hidden weightᵀ``, unread, in the graph of both.

    Args:
        hidden: (..., H).
        weight: (V, H).
        dtype: of the product, to which both are cast.
        samples: of both, where they were taken earlier; then nothing is known of the versions of that time.
    """
    # Views have a memory of their own: a caller may give hidden or weight another .data before the logits are read.
    hidden, weight = hidden.view_as(hidden), weight.view_as(weight)
    operands = []
    for i, (name, tensor) in enumerate((("hidden_states[-1]", hidden.detach()), ("lm_head.weight", weight.detach()))):
        operands.append(Operand(name, tensor, *((None, samples[i]) if samples else (tensor._version, sample(tensor)))))
    product, shape = Product(operands, dtype), torch.Size((*hidden.shape[:-1], weight.shape[0]))
    make = partial(LazyLogits, Cell(product), shape, dtype, hidden.device)
    return linear_node(hidden, weight, dtype, make, partial(product.check, samples=False))
