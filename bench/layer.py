"""One decoder layer with LoRA at full size without its memory, for counting: meta tensors, or fake ones.

fastlora's layer is traced on meta tensors, where its operators run the launchers of their CUDA key and ``launch`` is
replaced, so that what is counted is the GPU's path. Everybody else's is traced on fake CPU tensors under autocast,
which meta tensors do not have; eager PyTorch decomposes there as on a GPU, except attention, which is put in as the
FlashAttention operator that scaled_dot_product_attention takes on an A100.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.kernels import _tiles

from . import models
from .step_providers import BY_NAME, StepProvider

Launch = Callable[..., None]
PROVIDERS = ("peft", "peft-bf16", "peft-compile", "liger", "fastlora", "fastlora-bf16")


def why_not(provider: StepProvider, dtype: torch.dtype) -> str | None:
    """Why a provider's layer cannot be traced; None where it can."""
    if "compile" in provider.name:
        return "what torch.compile launches and keeps is decided by its code generator for the device"
    return provider.why_not("cpu", dtype)


class Layer:
    """The layer of one provider, its input and its rotary tables; ``forward`` and ``backward`` run one step of it."""

    def __init__(
        self,
        provider: StepProvider,
        shape: models.Shape,
        dtype: torch.dtype,
        tokens: int,
        rank: int,
        dropout: float = 0.0,
    ) -> None:
        self._on_meta = "fastlora" in provider.name
        self._autocast = not self._on_meta and provider.fp32_adapters and dtype != torch.float32
        self._mode = nullcontext() if self._on_meta else FakeTensorMode()
        shape = models.Shape(shape.hidden, shape.ffn, 1, shape.heads, shape.kv_heads, vocab=32)
        with torch.device("meta"):
            model = provider.build(models.base_model(shape, dtype, "meta"), rank, dropout)
        self.module = model.base_model.model.model.layers[0]
        if not self._on_meta:
            _move(model, self._mode)
        with self._mode, torch.device("meta" if self._on_meta else "cpu"):
            self.x = torch.empty(1, tokens, shape.hidden, dtype=dtype).requires_grad_()
            self._tables = tuple(torch.empty(1, tokens, shape.head_dim, dtype=dtype) for _ in "cs")
            self._dy = torch.empty(1, tokens, shape.hidden, dtype=dtype)

    def weights(self) -> list[torch.Tensor]:
        """What is there without a step: parameters, and the rotary tables that all layers share."""
        return [*self.module.parameters(), *self.module.buffers(), *self._tables]

    def forward(self) -> torch.Tensor:
        """The layer's output; torch.autocast as Trainer(bf16=True) has it around the forward."""
        autocast = torch.autocast("cpu", self.x.dtype) if self._autocast else nullcontext()
        with self._mode, autocast:
            y = self.module(self.x, position_embeddings=self._tables)
        return y if isinstance(y, torch.Tensor) else y[0]

    def backward(self, y: torch.Tensor) -> None:
        with self._mode:
            y.backward(self._dy)


@contextmanager
def traced(dispatch: TorchDispatchMode, launch: Launch, arch: int = 80) -> Iterator[None]:
    """Run a Layer within: every ATen operator goes through ``dispatch``, every Triton launch to ``launch``.

    arch: the GPU whose tiles are chosen, whichever is there; an A100 unless told.
    """
    with ExitStack() as stack:
        for module in kernel_modules():
            if hasattr(module, "launch"):
                stack.enter_context(mock.patch.object(module, "launch", launch))
        # Meta tensors have no autocast to ask about.
        asked = torch.is_autocast_enabled
        stack.enter_context(
            mock.patch.object(torch, "is_autocast_enabled", lambda d=None: d != "meta" and asked(*filter(None, [d])))
        )
        stack.enter_context(_tiles.assumed_arch(arch))
        stack.enter_context(_FlashAttention())
        stack.enter_context(dispatch)
        yield


class Through(TorchDispatchMode):
    """Runs fastlora's operators through their launchers, and everything else as it is."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastlora":
            with self:
                return run_launcher(function, args, kwargs or {})
        return function(*args, **(kwargs or {}))


def run_launcher(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A fastlora operator on meta tensors, through the launcher of its CUDA key."""
    return function._op_dk(torch._C.DispatchKey.CUDA, *args, **kwargs)


def by_name(names: tuple[str, ...] = ()) -> list[StepProvider]:
    return [BY_NAME[name] for name in names or PROVIDERS]


class _FlashAttention(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            scale = kwargs.get("scale")
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], 0.0, True, scale=scale)[0]
        return function(*args, **kwargs)


def kernel_modules() -> list[Any]:
    import fastlora.kernels
    import fastlora.ops

    names = (info.name for info in pkgutil.iter_modules(fastlora.kernels.__path__))
    return [importlib.import_module(f"fastlora.kernels.{name}") for name in names]


def _move(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace every meta parameter and buffer by a fake CPU one."""
    with mode:
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    fake = torch.empty(p.shape, dtype=p.dtype)
                    module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
