"""CPU time of a decoder layer's training step: what Python and PyTorch take between a GPU's kernels.

    python -m bench host                  fastlora on its GPU path, and PEFT, no GPU needed

Models too narrow for their arithmetic to count run on one thread. Of a patched model, the operators go through their
Triton launchers, as on a GPU of --arch whose rows choose, and every launch starts nothing: what a driver takes is left
out, of PEFT too. Attention is SDPA's. Providers take turns step by step; "against PEFT" is the median of the ratios of
such a turn.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from fastlora.kernels import _library, _tiles, _tl

from . import layer, record
from .cli import common_options, new_parser, open_sink
from .providers import environment
from .setting import Setting, batch
from .step_providers import BY_NAME, StepProvider

_PROVIDERS = ("peft", "peft-bf16", "fastlora", "fastlora-bf16")
_LAYERS = 8
_WARM = 5


def main(argv: list[str]) -> int:
    parser = new_parser("host", __doc__)
    parser.add_argument("--arch", type=int, default=90, help="compute capability without the point (default 90)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of the batch (default 16)")
    parser.add_argument("--steps", type=int, default=100, help="steps of each provider (default 100)")
    common_options(parser)
    args = parser.parse_args(argv)
    if args.device != "cpu":
        parser.error("device is cuda, needs cpu: on a GPU, python -m bench train_step --profile tells the host's time")
    sink = open_sink(args, "host")
    names = args.providers or _PROVIDERS
    for dtype in args.dtype:
        for line in measure(names, dtype, args.arch, args.tokens, args.steps):
            sink.write(line)
    return 0


def measure(
    names: tuple[str, ...], dtype: torch.dtype, arch: int = 90, tokens: int = 16, steps: int = 100
) -> Iterator[record.Record]:
    """A record of each provider: milliseconds of a layer, forward and backward."""
    setting, threads = Setting("tiny", dtype, "cpu", 1, tokens, _LAYERS), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with launchers_on_the_cpu(arch), environment({"FASTLORA_ATTENTION": "sdpa"}):
            times = _in_turns([BY_NAME[name] for name in names], setting, steps)
    finally:
        torch.set_num_threads(threads)
    for name, ms in times.items():
        line = {
            "bench": "host", "op": "layer", "shape": {"layers": _LAYERS, "tokens": tokens},
            "dtype": str(dtype).removeprefix("torch."), "mode": f"rows of sm_{arch}", "provider": name,
            "title": BY_NAME[name].title, "ms": record.spread(ms),
        }  # fmt: skip
        yardstick = times.get(BY_NAME[name].yardstick)
        if yardstick and yardstick is not ms:
            ratios = [one / other for one, other in zip(ms, yardstick, strict=True)]
            line["figures"] = {"against PEFT": round(statistics.median(ratios), 3)}
        yield line


def _in_turns(providers: list[StepProvider], setting: Setting, steps: int) -> dict[str, list[float]]:
    """Milliseconds of a layer, step by step but the first; caches are as the provider before leaves them."""
    base, made = setting.base_model(), batch(setting)
    ready = {provider.name: provider.build(base, setting.rank, setting.dropout) for provider in providers}
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(_WARM + steps):
        for name, model in ready.items():
            begin = time.perf_counter()
            with setting.context():
                loss = model(**made).loss
            loss.backward()
            times[name].append(1e3 * (time.perf_counter() - begin) / setting.layers)
        if len(times[name]) == _WARM:
            gc.collect()
    return {name: ms[_WARM:] for name, ms in times.items()}


@contextmanager
def launchers_on_the_cpu(arch: int) -> Iterator[None]:
    """Within it fastlora's operators run their Triton launchers on CPU tensors, and a launch only looks itself up."""

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, choice: Any = None, **meta: Any) -> None:
        hash((kernel, choice and choice.tile.warps, _tl.kinds(args), tuple(meta.items())))

    library = torch.library.Library("fastlora", "IMPL")
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for name, ways in _library.implementations.items():
            library.impl(name, _library._with_fallback(*ways), "CPU", allow_override=True)
        stack.callback(library._destroy)
        for module in layer.kernel_modules():
            if hasattr(module, "launch"):
                stack.enter_context(mock.patch.object(module, "launch", launch))
        stack.enter_context(_tiles.assumed_arch(arch))
        yield
