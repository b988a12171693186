"""The higher-precision witness: transformers' and PEFT's own code, computed in float64."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..modules.quantised import make_dense

Module = TypeVar("Module", bound=nn.Module)


class InFloat64(TorchFunctionMode):
    """Hugging Face's code as exact mathematics: what it computes in float32 is computed in float64.

    Dropout draws its masks as it would for float32, so that a float64 copy drops what the model itself drops.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.float:
            return args[0].double()
        if function is F.dropout:
            x, *rest = args
            return x * F.dropout(torch.ones_like(x, dtype=torch.float32), *rest, **(kwargs or {})).double()

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return function(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


def exact(module: Module, dtype: torch.dtype) -> Module:
    """A float64 copy of a module that is not patched; 4-bit weights are what they stand for. dtype: of its input.

    Raises:
        ValueError: a quantised layer without a dense form.
    """
    module = copy.deepcopy(module)
    make_dense(module, dtype)
    return module.double()
