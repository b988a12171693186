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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from fastlora.kernels import _tiles

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Bytes of shared memory that one program may have: A100, H100.
SHARED_LIMIT = {80: 166_912, 90: 232_448}


class _Driver:
    """As much of a GPU driver as compilation asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a device per architecture keeps their compiled kernels apart

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


@dataclass(frozen=True)
class Compiled:
    """One kernel as launched: its compile-time arguments in words, and what it takes of a multiprocessor."""

    kernel: str
    arch: int
    options: str
    registers: int
    spilled: int  # bytes of local memory per thread; these kernels have no arrays, so that all of it is spills
    shared: int

    def __str__(self) -> str:
        numbers = f"{self.registers:3d} registers {self.spilled:5d} B spilled {self.shared:6d} B shared"
        return f"sm_{self.arch} {self.kernel.strip('_'):26s} {numbers}  {self.options}"


def _registers_and_spills(cubin: bytes) -> tuple[int, int]:
    """Of the machine code itself: which ptxas makes it, with which options, is Triton's affair and differs by version."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", report)[1]) for word in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _words(meta: dict) -> str:
    kept = {key: value for key, value in meta.items() if value not in (False, None)}
    return " ".join(f"{key}={getattr(value, '__name__', value)}" for key, value in kept.items())


@contextmanager
def compiling(arch: int) -> Iterator[dict[str, Compiled]]:
    """Within it launchers compile for sm_<arch> in place of running; what they launched is filled in, by the hash of the code."""
    results: dict[str, Compiled] = {}

    def launch(kernel, grid, *args, **meta):
        if 0 in grid:
            return
        result = kernel.warmup(*args, grid=grid, enable_fp_fusion=True, **meta)
        if result.hash not in results:
            resources = _registers_and_spills(result.asm["cubin"])
            results[result.hash] = Compiled(kernel.fn.__name__, arch, _words(meta), *resources, result.metadata.shared)

    modules = [m for path, m in sys.modules.items() if path.startswith("fastlora.kernels.") and hasattr(m, "launch")]
    launches = [module.launch for module in modules]
    real_arch, driver = _tiles.arch, triton.runtime.driver
    driver.set_active(_Driver(arch))
    _tiles.arch = lambda device: arch
    for module in modules:
        module.launch = launch
    try:
        yield results
    finally:
        for module, original in zip(modules, launches, strict=True):
            module.launch = original
        _tiles.arch = real_arch
        driver.set_active(None)
