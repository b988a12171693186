"""Compiles what a measurement will launch, in parallel processes, before anything is timed.

    python -m bench precompile --arch 90 --model 7b --tokens 4096        into $TRITON_CACHE_DIR, for a GPU elsewhere

The launches are recorded on tensors without memory, with the arguments and options they have on a GPU, and compiled
with a driver that only says what the GPU is. Triton then finds the machine code in its cache on disk. It holds for the
same version of Triton only. What is not foreseen here is compiled when it first runs.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from typing import Any, NamedTuple

import torch
import torch.fx.experimental._config

from fastlora.kernels import _tiles
from fastlora.kernels._tl import options
from fastlora.tuning import aot

from . import layer
from .case import Case, New, tensors
from .cli import DTYPES, new_parser
from .ops import NAMES, cases
from .providers import environment
from .setting import Setting
from .step_providers import BY_NAME

_PATIENCE = 30.0  # seconds after which a compilation is left to its first launch


class Launch(NamedTuple):
    """A kernel with the arguments and options of one launch."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]

    @property
    def key(self) -> str:
        """The same for launches that compile to the same code."""
        return f"{self.kernel.fn.__name__} {[_special(a) for a in self.args]} {sorted(self.meta.items(), key=str)}"


def _special(value: Any) -> Any:
    """What Triton compiles an argument in: a tensor's dtype; whether an integer is 1 or a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype)
    if isinstance(value, tuple):
        return tuple(map(_special, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return "1" if value == 1 else ("16" if value % 16 == 0 else "int", value.bit_length() > 31)
    return type(value).__name__


class _Recorder:
    def __init__(self) -> None:
        self.launches: dict[str, Launch] = {}

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, choice: Any = None, **meta: Any) -> None:
        if 0 not in grid:
            launch = Launch(kernel, grid, args, options(choice, meta))
            self.launches.setdefault(launch.key, launch)


class _OnMeta(New):
    """Inputs without memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.device, self.dtype = "meta", dtype

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")


def of_step(setting: Setting, names: Iterable[str]) -> list[Launch]:
    """What one decoder layer of our providers among ``names`` launches in a step of the setting."""
    recorder = _Recorder()
    for provider in (BY_NAME[name] for name in names if name.startswith("fastlora")):
        with _leave_out(provider.name), environment(provider.environment):
            one = layer.Layer(
                provider, setting.shape, setting.dtype, setting.rows * setting.sequence, setting.rank, setting.dropout
            )
            with layer.traced(layer.Through(), recorder, arch()):
                one.backward(one.forward())
    return list(recorder.launches.values())


def of_ops(found: Iterable[Case], dtype: torch.dtype) -> list[Launch]:
    """What our providers of the cases launch, forward and backward."""
    recorder = _Recorder()
    for case in found:
        for provider in case.providers:
            if not provider.name.startswith("fastlora") or provider.why:
                continue
            with _leave_out(f"{case.op} {provider.name}"):
                inputs = case.inputs(_OnMeta(dtype))
                wrt = [inputs[name].requires_grad_() for name in case.wrt]
                # Of the loss's labels all count: how many do changes no kernel.
                with _all_nonzero, layer.traced(layer.Through(), recorder, arch()):
                    outputs = tensors(provider.run(**inputs))
                    if wrt:
                        torch.autograd.grad(outputs, wrt, [torch.empty_like(out) for out in outputs])
    return list(recorder.launches.values())


@contextlib.contextmanager
def _leave_out(what: str) -> Iterator[None]:
    """What cannot be traced without memory is compiled when it runs, and only later."""
    try:
        yield
    except Exception as error:
        print(f"not compiled ahead: {what}: {type(error).__name__}: {str(error).splitlines()[:1]}")


def arch() -> int:
    """What kernels are written for: the GPU at hand, or one that is assumed, or named by TRITON_OVERRIDE_ARCH."""
    return _tiles.arch(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def target() -> int:
    """What machine code is for: the GPU at hand, or one that is assumed."""
    with environment({"TRITON_OVERRIDE_ARCH": ""}):
        return arch()


_all_nonzero = torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True)
_launches: list[Launch] = []


def _compile(i: int) -> str:
    """Compile the i-th launch, in a process that was forked when they were recorded; why it does not, or ""."""
    one = _launches[i]
    try:
        compiled = one.kernel.warmup(*one.args, grid=one.grid, **one.meta)
        _build_launcher(compiled)
        return ""
    except Exception as error:
        return f"{one.kernel.fn.__name__}: {type(error).__name__}: {str(error).splitlines()[:1]}"


def _build_launcher(compiled: Any) -> None:
    """Triton 3.6 also builds a C function that launches the kernel, which takes another 0.2 s. It is linked with the
    driver's library, so where there is none this does nothing."""
    with contextlib.suppress(Exception):
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)


def compile_all(launches: list[Launch]) -> int:
    """Compile launches in parallel for ``target()``; how many were compiled. What fails is left to its first launch."""
    if not launches:
        return 0
    start, driver = time.monotonic(), aot.triton.runtime.driver
    _launches[:] = launches
    driver.set_active(aot.Driver(target()))
    try:
        pool = ProcessPoolExecutor(min(os.cpu_count() or 1, len(launches)), multiprocessing.get_context("fork"))
        futures = [pool.submit(_compile, i) for i in range(len(launches))]
        done, late = wait(futures, timeout=_PATIENCE)
        for process in list((pool._processes or {}).values()) if late else ():
            process.kill()
        pool.shutdown(wait=not late, cancel_futures=True)
    finally:
        driver.set_active(None)  # the GPU's own again, when it is asked for
    # A process that dies takes its pool's other jobs along.
    why = [words for future in done if (words := str(future.exception() or "") or future.result())]
    for words in dict.fromkeys(why):
        print(f"not compiled ahead: {words}")
    compiled = len(done) - len(why)
    print(f"{compiled} of {len(launches)} kernels compiled ahead, {time.monotonic() - start:.1f} s", flush=True)
    return compiled


def main(argv: list[str]) -> int:
    parser = new_parser("precompile", __doc__)
    add: Callable[..., Any] = parser.add_argument
    add("--arch", type=int, required=True, help="compute capability without the point: 80, 90")
    add("--model", default="7b", help="several with commas")
    add("--tokens", type=int, default=4096)
    add("--rank", type=int, default=16)
    add("--dropout", type=float, default=0.0)
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--ops", default="", help=f"ops besides, among {', '.join(NAMES)}; several with commas")
    args: argparse.Namespace = parser.parse_args(argv)
    dtype = DTYPES[args.dtype]
    launches: list[Launch] = []
    with _tiles.assumed_arch(args.arch):
        for model in args.model.split(","):
            setting = Setting(model, dtype, "cuda", 1, args.tokens, 1, args.rank, args.dropout)
            launches += of_step(setting, [name for name in BY_NAME if name.startswith("fastlora")])
        for op in filter(None, args.ops.split(",")):
            launches += of_ops(cases(op, "cuda", dtype), dtype)
        return 0 if compile_all(launches) else 1
