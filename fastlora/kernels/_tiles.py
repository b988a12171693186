"""Which implementation a call runs, and in which tiles: one function, `choose`, asked by every launcher.

In this order: what a FASTLORA_* variable forces, for fp32 products on a GPU the library, what `fastlora tune`
measured on this GPU, the shipped row of the architecture (`_rows.py`), the default row, and the library's own way.
What failed to compile or to launch is left out for the rest of the process.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import _cache
from ._rows import ROWS, Row, Tile


class Methods(NamedTuple):
    """The ways to compute a kernel: the variable that forces one, their names, which is the library's own, and the
    packages that some of them need."""

    variable: str
    names: tuple[str, ...]
    library: str
    packages: Mapping[str, str] = {}


# "attention" is of batches that nothing masks, "attention_padded" and "attention_packed" of the others.
_FLASH_ATTN = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
METHODS = {
    "lora_gemm": Methods("FASTLORA_GEMM", ("triton", "addmm", "augmented"), "addmm"),
    "attention": Methods("FASTLORA_ATTENTION", ("fastlora", "sdpa", *_FLASH_ATTN), "sdpa", _FLASH_ATTN),
}


class Call(NamedTuple):
    """What `choose` is asked.

    Attributes:
        kernel: a name in `_rows.py`, without the "_fp32" that fp32 adds where there is such a row.
        m, n, k: rows, columns of the output, and the reduction; of several projections, all together. Of attention:
            queries of a sequence, columns of all heads, and of one.
        r, p: ranks together, and projections; of attention, query heads for each head of the keys. What a kernel has
            not is 0.
    """

    kernel: str
    dtype: torch.dtype
    device: torch.device
    m: int = 0
    n: int = 0
    k: int = 0
    r: int = 0
    p: int = 0


@dataclass(frozen=True)
class Choice:
    """The answer: a method, its tile, and in words where it comes from."""

    call: Call
    method: str
    tile: Tile
    source: str

    def __str__(self) -> str:
        return f"{self.method} {self.tile}" if self.method == "triton" else self.method


class LaunchFailed(RuntimeError):
    """A kernel did not compile or launch in the tile chosen for it."""

    def __init__(self, choice: Choice, error: Exception) -> None:
        super().__init__(f"{choice.call.kernel}: {choice} does not run here: {type(error).__name__}: {error}")
        self.choice, self.error = choice, error


class NothingLeft(Exception):
    """Not the Triton kernel but its ATen composition serves: no tile runs here, or it was measured to be faster."""


ATEN, _FORCED = "aten", "forced"


def family(kernel: str) -> str:
    """The name in METHODS that a kernel goes under, or its own."""
    return next((name for name in METHODS if kernel == name or kernel.startswith(f"{name}_")), kernel)


_by_kernel: dict[str, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
for _row in ROWS:
    _by_kernel[_row.kernel][_row.arch].append(_row)
_VARIABLES = {kernel: METHODS[name].variable for kernel in _by_kernel for name in [family(kernel)] if name in METHODS}
_broken: set[tuple[str, torch.device, str, Tile]] = set()
_forced: dict[str, tuple[str, Tile]] = {}
_arch: list[int] = []
# Set by fastlora.tuning where FASTLORA_AUTOTUNE=1: measures a call that no cache knows.
autotune: Callable[[Call], None] | None = None


def arch(device: torch.device) -> int:
    """Compute capability of a CUDA device as 80, 90, …; ``TRITON_OVERRIDE_ARCH=sm80`` wins; 80 without a GPU."""
    if _arch:
        return _arch[-1]
    override = os.environ.get("TRITON_OVERRIDE_ARCH", "")
    if override:
        return int(override.removeprefix("sm").rstrip("a"))
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def choose(kernel: str, like: torch.Tensor, *, m: int = 0, n: int = 0, k: int = 0, r: int = 0, p: int = 0) -> Choice:
    """The implementation of ``kernel`` for the device and dtype of ``like`` and the sizes of a call; see Call.

    Raises:
        ValueError: a FASTLORA_* variable has a value that is none of its methods.
        NothingLeft: the ATen composition is the choice, or every tile has failed before.
    """
    if kernel in _forced:
        choice = Choice(Call(kernel, like.dtype, like.device, m, n, k, r, p), *_forced[kernel], _FORCED)
    else:
        variable = _VARIABLES.get(kernel)
        value = os.environ.get(variable) if variable else None
        assumed = _arch[-1] if _arch else None
        ieee = like.dtype == torch.float32 and not tf32()
        choice = _choose(kernel, like.dtype, like.device, m, n, k, r, p, value, assumed, ieee)
    if choice.method == ATEN:
        raise NothingLeft(kernel)
    return choice


# What the answer depends on is an argument, so that it is remembered with it; TRITON_OVERRIDE_ARCH is read once.
@functools.lru_cache(maxsize=4096)
def _choose(kernel, dtype, device, m, n, k, r, p, value, assumed, ieee) -> Choice:
    call = Call(kernel, dtype, device, m, n, k, r, p)
    unknown = device.type == "cuda" and value is None and not _rounds_more(call) and _measured(call) is None
    if autotune is not None and unknown:
        autotune(call)
    return answer(call)


def answer(call: Call) -> Choice:
    """What ``choose`` says, looked up anew and nothing measured for it."""
    variable = _VARIABLES.get(call.kernel)
    method = _checked(call.kernel, os.environ.get(variable) if variable else None)
    if method is None and _rounds_more(call):
        return Choice(call, ATEN, shipped(call)[0].tile, "in fp32 the library's products round less")
    for choice in candidates(call, method, _measured(call)):
        if (row_name(call), call.device, choice.method, choice.tile) not in _broken:
            return choice
    return Choice(call, ATEN, shipped(call)[0].tile, "no tile runs here")


def tf32() -> bool:
    """Whether fp32 products take the tensor cores: the user's own ``torch.backends.cuda.matmul`` setting."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _rounds_more(call: Call) -> bool:
    """Whether the Triton kernel misses the error budget: a tile adds up fp32 products one after the other, and cuBLAS
    in parts. On an H200 its errors were up to 2.3 times those of eager code."""
    product = not call.kernel.startswith("flash_attention") and row_name(call) != call.kernel
    return call.dtype == torch.float32 and call.device.type == "cuda" and product and not tf32()


def _checked(kernel: str, value: str | None) -> str | None:
    if value is None:
        return None
    methods = METHODS[family(kernel)]
    if value not in methods.names:
        needed = f"{', '.join(map(repr, methods.names[:-1]))} or {methods.names[-1]!r}"
        raise ValueError(f"{methods.variable} is {value!r}, needs {needed}")
    if not _installed(kernel, value):
        package = methods.packages[value]
        raise ValueError(f"{methods.variable} is {value!r}, needs the package {package}, which is not installed")
    return value


def _installed(kernel: str, method: str) -> bool:
    """Whether the package that a method needs, if any, can be imported."""
    methods = METHODS.get(family(kernel))
    package = methods.packages.get(method) if methods else None
    return package is None or installed(package)


@functools.cache
def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def candidates(call: Call, method: str | None = None, measured: Choice | None = None) -> Iterator[Choice]:
    """Everything that may serve a call, best first."""
    rows = shipped(call)
    if method is not None:
        tile = measured.tile if measured and measured.method == method else rows[0].tile
        yield Choice(call, method, tile, f"{_VARIABLES[call.kernel]}={method}")
    elif measured is not None:
        yield measured
    for row in rows:
        if _installed(call.kernel, row.method):
            yield Choice(call, method or row.method, row.tile, row.source)
    if family(call.kernel) in METHODS:
        yield Choice(call, METHODS[family(call.kernel)].library, rows[0].tile, "the library's own")


def shipped(call: Call) -> list[Row]:
    """The row of a call's architecture and size, and after it the default's, which is another."""
    by_arch = _by_kernel[row_name(call)]
    rows = [_fit(by_arch[a], call) for a in (arch(call.device), 0) if a in by_arch]
    return rows[:1] + [row for row in rows[1:] if (row.method, row.tile) != (rows[0].method, rows[0].tile)]


def _fit(rows: list[Row], call: Call) -> Row:
    """The first row that holds a call; the last has no bounds."""
    return next(row for row in rows if call.m <= row.m and call.n <= row.n and call.r <= row.r)


def row_name(call: Call) -> str:
    fp32 = f"{call.kernel}_fp32"
    return fp32 if call.dtype == torch.float32 and fp32 in _by_kernel else call.kernel


def _measured(call: Call) -> Choice | None:
    if call.device.type != "cuda":
        return None
    entry = _cache.entries(_cache.environment(call.device, arch(call.device))).get(_cache.key(call))
    if entry is None:
        return None
    return Choice(call, entry["method"], Tile(*entry["tile"]), f"measured here, {entry['date']}")


def give_up(failure: LaunchFailed) -> None:
    """Leave the choice that failed out for the rest of the process, and say what serves instead."""
    choice = failure.choice
    if choice.source == _FORCED:
        raise failure
    call = choice.call
    _broken.add((row_name(call), call.device, choice.method, choice.tile))
    _choose.cache_clear()
    other = answer(call)
    words = f"{other} ({other.source}) serves instead, for the rest of this process."
    logging.getLogger("fastlora").warning("%s\n%s", failure, words)


def given_up() -> list[str]:
    """In words, every tile of this process that did not compile or launch."""
    return sorted(f"{kernel} {method} {tile} on {device}" for kernel, device, method, tile in _broken)


@contextmanager
def forced(kernel: str, method: str, tile: Tile) -> Iterator[None]:
    """Within it ``choose`` answers with this for a kernel: to compile or time a candidate."""
    before = dict(_forced)
    _forced[kernel] = method, tile
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextmanager
def assumed_arch(number: int) -> Iterator[None]:
    """Within it ``arch`` is that number: to choose and compile for a GPU that is not there."""
    _arch.append(number)
    try:
        yield
    finally:
        _arch.pop()


def forget() -> None:
    """Choose anew: after the cache of measurements has changed."""
    _choose.cache_clear()
