"""Every Triton kernel, compiled exactly as it is launched, for a GPU that is not there.

The launchers run on meta tensors, with `launch` replaced by a compilation: the same arguments and options, the
specialisations Triton derives from them, and the machine code of the architecture. Read off it are what decides a tile:
registers, spilled bytes and shared memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..kernels._rows import Tile
from ..kernels._tiles import Choice, assumed_arch, row_name
from ..kernels._tl import options, triton

# Bytes of shared memory that one program may have, by architecture: A100; A10 and RTX 30; L4 and RTX 40; H100; B200.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}


class Driver:
    """As much of a GPU driver as compilation asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a device per architecture keeps their compiled kernels apart

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


@dataclass(frozen=True)
class Compiled:
    """One kernel as launched: its row and tile, its compile-time arguments in words, and what it takes of a
    multiprocessor."""

    kernel: str
    row: str
    tile: Tile
    arch: int
    options: str
    registers: int
    spilled: int  # bytes of local memory per thread; these kernels have no arrays, so that all of it is spills
    shared: int
    cubin: bytes = field(default=b"", repr=False)

    def __str__(self) -> str:
        numbers = f"{self.registers:3d} registers {self.spilled:5d} B spilled {self.shared:6d} B shared"
        return f"sm_{self.arch} {self.kernel.strip('_'):26s} {numbers}  {self.options}"


def cuobjdump(cubin: bytes, option: str) -> str:
    """What NVIDIA's tool, which Triton brings along, says of machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), option, file.name], check=True, capture_output=True, text=True).stdout


def _registers_and_spills(cubin: bytes) -> tuple[int, int]:
    """Of the machine code itself: which ptxas makes it, with which options, is Triton's affair, by version."""
    report = cuobjdump(cubin, "--dump-resource-usage")
    found = {word: int(number) for word, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    registers, stack, local = found["REG"], found["STACK"], found["LOCAL"]
    return registers, stack + local


def _words(meta: dict[str, Any]) -> str:
    kept = {key: value for key, value in meta.items() if value not in (False, None)}
    return " ".join(f"{key}={getattr(value, '__name__', value)}" for key, value in kept.items())


@contextmanager
def compiling(arch: int, skip: Callable[[str, Tile], bool] | None = None) -> Iterator[dict[str, Compiled]]:
    """Within it launchers compile for sm_<arch> in place of running; what they compiled is filled in.

    skip: says of which rows and tiles nothing is compiled; "" is the row of kernels without tiles.
    """
    results: dict[str, Compiled] = {}

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, choice: Choice | None = None, **meta: Any) -> None:
        if 0 in grid:
            return
        row, tile = (row_name(choice.call), choice.tile) if choice else ("", Tile())
        if skip is not None and skip(row, tile):
            return
        meta = options(choice, meta)
        result = kernel.warmup(*args, grid=grid, **meta)
        key = f"{row} {result.hash}"
        if key not in results:
            cubin, shared = result.asm["cubin"], result.metadata.shared
            taken = *_registers_and_spills(cubin), shared
            results[key] = Compiled(kernel.fn.__name__, row, tile, arch, _words(meta), *taken, cubin)

    loaded: list[Any] = [m for path, m in sys.modules.items() if path.startswith("fastlora.kernels.")]
    modules = [module for module in loaded if hasattr(module, "launch")]
    launches = [module.launch for module in modules]
    driver = triton.runtime.driver
    driver.set_active(Driver(arch))
    for module in modules:
        module.launch = launch
    try:
        with assumed_arch(arch):
            yield results
    finally:
        for module, original in zip(modules, launches, strict=True):
            module.launch = original
        driver.set_active(None)
