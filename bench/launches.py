"""Device launches and bytes moved of one decoder layer's training step, forward and backward, LoRA on all projections.

launches  operators that would start a kernel. ATen: every operator but views, detach and bare allocation, one each
          (FlashAttention's backward is one operator and three kernels; a reduction may take two). fastlora: every
          Triton launch of its CUDA path on an A100, and the ATen operators its launchers call; with
          FASTLORA_GEMM=addmm, what runs on a GPU where nothing was measured. AdamW, the loss, the embedding and the
          all-layer rotary tables are not part of a layer.
traffic   bytes of every input and output of those launches, each tensor once per launch; a tensor updated in place
          counts as both for ATen and once for Triton, and broadcast inputs at their own size. Four classes: base
          products; skinny products (a dimension of at most 512, LoRA's own); attention; elementwise, which is the rest.
          What a kernel reads twice because it did not stay in cache is not in it, so it is the least a layer moves.

Counted on tensors without memory: runs anywhere, in seconds. See layer.py for what stands for the GPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils import _pytree as pytree

from . import layer, models
from .cli import common_options, new_parser, open_sink
from .providers import environment

CLASSES = ("base", "skinny", "attention", "elementwise")
_SKINNY = 512  # the largest rank fastlora takes
_NO_LAUNCH = {
    "detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view",
    "_reshape_alias", "lift_fresh", "device", "is_same_size", "set_", "_has_compatible_shallow_copy_type",
}  # fmt: skip


class Count(layer.TorchDispatchMode):
    """Launches and bytes per class, and launches per name, on one device: what the host computes is no launch."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self._device = device
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "fastlora":
            with self:
                return layer.run_launcher(function, args, kwargs)
        result = function(*args, **kwargs)
        name = function._opname
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        if function.namespace == "aten" and name not in _NO_LAUNCH and not _is_view(function, inputs, outputs):
            if any(t.device.type == self._device for t in outputs):
                self._add(_aten_class(name, inputs), name, inputs + outputs)
        return result

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        """Stands for fastlora.kernels._tl.launch: counts, and runs nothing."""
        if 0 in grid:
            return
        name = getattr(kernel, "__name__", None) or kernel.fn.__name__
        distinct = {id(t): t for t in _tensors(args)}
        self._add(_triton_class(name), name, list(distinct.values()))

    def _add(self, kind: str, name: str, tensors: list[torch.Tensor]) -> None:
        self.launches[kind] += 1
        self.names[name] += 1
        self.bytes[kind] += sum(_size(t) for t in tensors)

    def figures(self) -> dict[str, float]:
        traffic = {f"{kind} GB": self.bytes[kind] / 1e9 for kind in CLASSES}
        return {"launches": sum(self.launches.values()), "elementwise launches": self.launches["elementwise"]} | traffic


def count(provider: str, model: str, dtype: torch.dtype, tokens: int = 4096, rank: int = 16) -> Count:
    """One training step of one layer of a provider, counted."""
    builds = layer.BY_NAME[provider]
    with environment(builds.environment):
        one = layer.Layer(builds, models.shape(model), dtype, tokens, rank)
        counter = Count(one.x.device.type)
        with layer.traced(counter, counter.launch):
            one.backward(one.forward())
    return counter


def main(argv: list[str]) -> int:
    parser = new_parser("launches", __doc__)
    parser.add_argument("--model", default="7b,70b", help="several with commas")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    common_options(parser)
    args = parser.parse_args(argv)
    sink = open_sink(args, "launches")
    for model in args.model.split(","):
        for dtype in args.dtype:
            for provider in layer.by_name(args.providers or (*layer.PROVIDERS, "fastlora-addmm")):
                line = {
                    "bench": "launches", "op": model, "shape": {"M": args.tokens, "r": args.rank},
                    "dtype": str(dtype).removeprefix("torch."), "provider": provider.name, "title": provider.title,
                }  # fmt: skip
                why = layer.why_not(provider, dtype)
                if why is None:
                    found = count(provider.name, model, dtype, args.tokens, args.rank)
                    line |= {"figures": found.figures(), "names": dict(found.names.most_common())}
                sink.write(line | {"why": why})
    return 0


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _size(tensor: torch.Tensor) -> int:
    """Bytes a launch touches of it: an expanded tensor at the size that is in memory."""
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride or size == 1 else 1
    return numel * tensor.element_size()


def _is_view(function: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Returns an alias of an input that it does not write; ``to`` and ``reshape`` do so, or copy."""
    returns = function._schema.returns
    if not returns or not all(r.alias_info is not None and not r.alias_info.is_write for r in returns):
        return False
    storages = {t.untyped_storage()._cdata for t in inputs}
    return all(t.untyped_storage()._cdata in storages for t in outputs)


def _aten_class(name: str, inputs: list[torch.Tensor]) -> str:
    if "attention" in name:
        return "attention"
    if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_addmm_activation"):
        a, b = inputs[-2:]
        return "skinny" if min(*a.shape[-2:], *b.shape[-2:]) <= _SKINNY else "base"
    return "elementwise"


def _triton_class(name: str) -> str:
    if "attention" in name:
        return "attention"
    if "gemm" in name:
        return "base"
    if name.startswith(("_lora_project", "_lora_reduce")):
        return "skinny"
    return "elementwise"
