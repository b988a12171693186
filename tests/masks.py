"""What dropout kept: read from the operators that draw the masks, and given to models that have none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from peft.tuners import lora as peft_lora
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


def unpack(mask: torch.Tensor, k: int) -> torch.Tensor:
    """Bits (M, ⌈k/8⌉) as booleans (M, k)."""
    return ((mask[:, :, None] >> torch.arange(8, device=mask.device)) & 1).bool().flatten(1)[:, :k]


class Drawn(TorchDispatchMode):
    """Within it, `masks` collects what every dropout_mask keeps, as (M, K) of zeros and ones."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "fastlora" and func._opname == "dropout_mask":
            self.masks.append(unpack(out, args[0].shape[1]).double())
        return out


class Kept(nn.Module):
    """In the place of nn.Dropout: applies the given masks, one per call."""

    def __init__(self, masks: Sequence[torch.Tensor], rate: float) -> None:
        super().__init__()
        self.factors = [mask / (1 - rate) for mask in masks]
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = self.factors[self.calls % len(self.factors)]
        self.calls += 1
        return x * factor.to(x.dtype).view(x.shape)


def dropping(model: nn.Module) -> Iterator[tuple[peft_lora.Linear, str]]:
    """Projections and active adapters that drop, in the order in which a Llama runs them."""
    for module in model.modules():
        if isinstance(module, peft_lora.Linear):
            for name in module.active_adapters:
                if name in module.lora_A and isinstance(module.lora_dropout[name], nn.Dropout):
                    yield module, name


def share(model: nn.Module, masks: Sequence[torch.Tensor]) -> None:
    """Give the model the masks of another's forwards, one forward after the other, in place of its dropout."""
    places = list(dropping(model))
    assert places and masks and len(masks) % len(places) == 0, f"{len(masks)} masks for {len(places)} adapters"
    for i, (module, name) in enumerate(places):
        module.lora_dropout[name] = Kept(masks[i :: len(places)], module.lora_dropout[name].p)
