"""Who can take a whole LoRA training step: the combinations a user would choose between."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora.kernels import _tiles

from . import models
from .providers import why_no_package


def _same(model: nn.Module) -> nn.Module:
    return model


def _compile(model: nn.Module) -> nn.Module:
    return torch.compile(model, dynamic=False)


def _compile_layers(model: nn.Module) -> nn.Module:
    """Each decoder layer by itself, so that transformers makes its mask outside: compiled, it cannot see that there is
    no padding, and attention then runs with a mask in memory instead of as causal."""
    for layer in model.base_model.model.model.layers:
        layer.compile(dynamic=False)
    return model


def _fastlora(model: nn.Module) -> nn.Module:
    import fastlora

    return fastlora.patch(model)


def _liger(model: nn.Module) -> nn.Module:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model)
    return model


class StepProvider(NamedTuple):
    """
    Attributes:
        name: as in tables.
        title: what the user does.
        fp32_adapters: PEFT's default; False is autocast_adapter_dtype=False.
        before: what happens to the Hugging Face model before get_peft_model.
        after: what happens to the PEFT model.
        package: what must be installed, and needs a GPU; None for nothing.
        environment: variables set while it is built and while it runs.
        yardstick: the provider whose error is the budget: eager, with adapters of the same dtype.
    """

    name: str
    title: str
    fp32_adapters: bool
    yardstick: str
    before: Callable[[nn.Module], nn.Module] = _same
    after: Callable[[nn.Module], nn.Module] = _same
    package: str | None = None
    environment: Mapping[str, str] = MappingProxyType({})

    def why_not(self, device: str, dtype: torch.dtype) -> str | None:
        """Why it cannot run here; None where it can."""
        if not self.fp32_adapters and dtype == torch.float32:
            return "the model is fp32 itself"
        if self.name == "unsloth":
            return why_no_package("unsloth", device) or "replaces transformers' classes in the whole process"
        if self.package:
            return why_no_package(self.package, device)
        if self.after in (_compile, _compile_layers) and sys.platform == "win32":
            return "torch.compile needs a C++ compiler"
        return None

    def build(self, base: nn.Module, rank: int, dropout: float) -> nn.Module:
        """The model over the frozen weights of ``base``, in training mode."""
        model = models.with_lora(self.before(models.shared_copy(base)), rank, dropout, self.fp32_adapters)
        return self.after(model).train()


PROVIDERS = (
    StepProvider("peft", "PEFT, its default: fp32 adapters", True, "peft"),
    StepProvider("peft-bf16", "PEFT, adapters in the model's dtype", False, "peft-bf16"),
    StepProvider("fastlora", "fastlora: fp32 adapters", True, "peft", after=_fastlora),
    StepProvider("fastlora-bf16", "fastlora, adapters in the model's dtype", False, "peft-bf16", after=_fastlora),
    *(
        StepProvider(f"fastlora-{method}", f"fastlora, FASTLORA_GEMM={method}", True, "peft", after=_fastlora,
                     environment={"FASTLORA_GEMM": method})
        for method in _tiles.METHODS["lora_gemm"].names
    ),
    StepProvider("peft-compile", "PEFT + torch.compile", True, "peft", after=_compile),
    StepProvider("peft-bf16-compile", "PEFT, adapters in the model's dtype + torch.compile", False, "peft-bf16",
                 after=_compile),
    StepProvider("peft-compile-layers", "PEFT + torch.compile of each layer", True, "peft", after=_compile_layers),
    StepProvider("peft-bf16-compile-layers", "PEFT, adapters in the model's dtype + torch.compile of each layer", False,
                 "peft-bf16", after=_compile_layers),
    StepProvider("unsloth", "Unsloth", True, "peft", package="unsloth"),
    StepProvider("liger", "Liger-Kernel + PEFT", True, "peft", before=_liger, package="liger_kernel"),
    StepProvider("liger-bf16", "Liger-Kernel + PEFT, adapters in the model's dtype", False, "peft-bf16",
                 before=_liger, package="liger_kernel"),
)  # fmt: skip
BY_NAME = {provider.name: provider for provider in PROVIDERS}


class Globals:
    """The names in transformers' Llama module as one provider left them.

    Liger-Kernel replaces functions of the module itself. Each provider is built and run under its own set, so that none
    runs on another's functions.
    """

    def __init__(self) -> None:
        from transformers.models.llama import modeling_llama

        self._module = modeling_llama.__dict__
        self._original = dict(self._module)
        self._mine: dict[str, Any] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        self._module.update(self._mine)
        try:
            yield
        finally:
            self._mine = {k: v for k, v in self._module.items() if self._original.get(k) is not v}
            self._module.update({k: self._original[k] for k in self._mine if k in self._original})
