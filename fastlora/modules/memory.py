"""Which layers keep their activations: decided for a model as it runs, by the tokens it is given."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..planning import policies
from ..planning.activations import KEEP, LAYER, MLP, Adapters, recomputed_flops
from ..planning.shapes import shape_of
from ..planning.step import step_bytes
from . import trust

WORDS = {
    KEEP: "keeps all it needs for backward",
    MLP: "recomputes the MLP in backward",
    LAYER: "checkpointed: recomputes the layer in backward",
}
# What is left of a device beside a plan: for fragments of the allocator's, and for libraries' workspaces.
_RESERVE = 0.05
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse(memory: Any) -> str | int:
    """``patch``'s argument memory as "fast", "lean", "auto" or a number of bytes.

    Raises:
        ValueError, TypeError: it is neither.
    """
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    if isinstance(memory, str):
        if memory in ("fast", "lean", "auto"):
            return memory
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B)?", memory, re.IGNORECASE)
        if found and (size := int(float(found[1]) * _UNITS[(found[2] or "").upper()])):
            return size
    elif not isinstance(memory, int):
        raise TypeError(f"memory is a {type(memory).__name__}, needs a str or a number of bytes")
    raise ValueError(f"memory is {memory!r}, needs 'fast', 'lean', 'auto', or bytes as 60000000000, '60GB' or '60GiB'")


class Memory:
    """The memory policy of one patched model, shared by its modules.

    Attributes:
        wanted: "fast", "lean", "auto", or the bytes that a step may add to model, gradients and optimizer.
        fused_loss: whether the loss of the step that runs now is ours, which holds no logits.
    """

    def __init__(self, wanted: str | int) -> None:
        self.wanted = wanted
        self.fused_loss = False
        self._budget = 0.0
        self._largest = 0
        self._decided: dict[tuple[int, bool, int], tuple[str, ...]] = {}

    def policy(self, layer: Any, x: torch.Tensor) -> str:
        """What becomes of this layer in the forward that runs now."""
        trains = layer.training and torch.is_grad_enabled()
        # Under the trainer's own checkpointing this forward is already inside one. A compiler decides for itself.
        if self.wanted == "fast" or not trains or layer.gradient_checkpointing or torch.compiler.is_compiling():
            return KEEP
        if self.wanted == "lean":
            return LAYER
        if x.device.type not in ("cpu", "cuda"):
            return KEEP
        tokens = x.shape[:-1].numel()
        if tokens > self._largest:
            self._measure(layer, x.device)
            self._largest = tokens
        place, layers = layer._fastlora.place
        key = tokens, self.fused_loss, layers
        if key not in self._decided:
            self._decided[key] = self._decide(layer, x, tokens)
        return self._decided[key][place]

    def last(self, layer: Any) -> str | None:
        """What was decided for this layer at the largest batch so far; None before there was one."""
        if isinstance(self.wanted, str) and self.wanted != "auto":
            return {"fast": KEEP, "lean": LAYER}[self.wanted]
        place, layers = layer._fastlora.place
        known = [key for key in self._decided if (key[0], key[2]) == (self._largest, layers)]
        return self._decided[known[-1]][place] if known else None

    def _measure(self, layer: Any, device: torch.device) -> None:
        self._decided.clear()
        if isinstance(self.wanted, int):
            self._budget = self.wanted
            return
        # The first step adds what stays: gradients, and in the optimizer two moments in fp32.
        trained = [p for p in layer.parameters() if p.requires_grad]
        gradients = sum(p.numel() * p.element_size() for p in trained if p.grad is None)
        moments = 0 if self._largest else 8 * sum(p.numel() for p in trained)
        self._budget = free_bytes(device) - layer._fastlora.place[1] * (gradients + moments)

    def _decide(self, layer: Any, x: torch.Tensor, tokens: int) -> tuple[str, ...]:
        # As many layers as there are: the config does not know of pruned or replicated ones.
        shape = replace(shape_of(layer.self_attn.config), layers=layer._fastlora.place[1])
        if _gathers_inside(layer):
            logging.getLogger("fastlora").warning(
                "memory=%r: hooks inside the layers may exchange weights with other processes whenever they run, so"
                " every process has to recompute alike: every layer is checkpointed.",
                self.wanted,
            )
            return (LAYER,) * shape.layers
        adapters = layer.adapters()
        device = x.device.type
        product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        need = step_bytes(
            shape,
            adapters or Adapters.uniform(64),
            tokens,
            x.shape[-2],
            itemsize=product.itemsize,
            residual_itemsize=x.dtype.itemsize,
            device=device,
            fused=adapters is not None,
            fused_loss=self.fused_loss,
        )
        costs = {p: recomputed_flops(shape, adapters or Adapters(()), p, x.shape[-2]) for p in (MLP, LAYER)}
        if adapters is None:  # a layer that is not fused is checkpointed whole
            need.saved[MLP], costs[MLP] = need.saved[LAYER], costs[LAYER]
        chosen = policies.least(shape.layers, need, self._budget, costs)
        if chosen is None:
            most = need.peak(shape.layers, 0, shape.layers) / 1e9
            logging.getLogger("fastlora").warning(
                "memory=%r: a step of %d tokens is estimated to need %.2f GB with every layer checkpointed, %.2f GB are"
                " there. Give it fewer tokens.",
                *(self.wanted, tokens, most, self._budget / 1e9),
            )
            return (LAYER,) * shape.layers
        return chosen


def _gathers_inside(layer: Any) -> bool:
    """Whether something may communicate each time a part of the layer runs, as DeepSpeed's ZeRO-3 does."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    inside = (module for module in layer.modules() if module is not layer)
    return any(module._forward_pre_hooks or module._forward_hooks for module in inside)


def free_bytes(device: torch.device) -> float:
    """Memory that tensors on the device may still take, a twentieth of the whole left aside."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached - _RESERVE * total
    total, free = _machine()
    for limit, used in _CGROUPS:
        try:
            most = int(Path(limit).read_text())
            # What the group has of files in memory goes when it is wanted.
            stat = Path(used).with_name("memory.stat").read_text()
            files = re.search(r"^(?:total_)?inactive_file (\d+)", stat, re.MULTILINE)
            taken = int(Path(used).read_text()) - int(files[1] if files else 0)
        except (OSError, ValueError):  # no such group, or "max"
            continue
        if most < total:
            total, free = most, min(free, most - taken)
    return free - _RESERVE * total


_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _machine() -> tuple[int, int]:
    """Bytes of memory of this machine, in all and available; where nothing tells what is available, half of all."""
    import os

    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemTotal"].split()[0]) * 1024, int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total // 2


def checkpoint(layer: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """torch's checkpointing of a part of a layer, by which dropout masks and autocast are replayed.

    Raises:
        RuntimeError: in backward, where what the second forward depends on is no longer what it was in the first.
    """
    from torch.utils.checkpoint import checkpoint as torch_checkpoint

    before = _state(layer, args, kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        if _state(layer, args, kwargs) != before:
            raise RuntimeError(
                "fastlora recomputes this layer in backward, as memory= asks, and its mode, hooks, adapters or weights,"
                " or a tensor it was given, have changed since the forward. Run backward before changing them, or patch"
                ' with memory="fast"'
            )
        return function(*args, **kwargs)

    return torch_checkpoint(run, *args, use_reentrant=False, **kwargs)


def _state(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a second forward has to find as the first one did; of tensors the number of writes so far."""
    if torch.compiler.is_compiling():
        return ()
    read = {name: value for name, value in kwargs.items() if name != "position_ids"}
    tensors = [value for value in tree_leaves((args, read)) if isinstance(value, torch.Tensor)]
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):  # engines gather weights anew
        tensors += [parameter for parameter in layer.parameters() if parameter.requires_grad]
    versions = [None if tensor.is_inference() else tensor._version for tensor in tensors]
    hooks = [(*module._forward_pre_hooks, *_lasting(module._forward_hooks)) for module in layer.modules()]
    return layer.training, layer.state(), versions, hooks, trust.reasons()


def _lasting(hooks: dict[int, Any]) -> list[int]:
    """Without those by which transformers collects outputs, which stay once they were wanted."""
    return [key for key, hook in hooks.items() if not hook.__module__.startswith("transformers.")]
