"""Which tiles could serve, without a GPU: compile every candidate, drop what spills or does not fit, rank the rest."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from ..kernels import _cache
from ..kernels._rows import ROWS, Row, Tile
from ..kernels._tiles import Call, forced
from ..kernels._tl import triton
from . import calls, model
from .aot import SHARED_LIMIT, compiling
from .candidates import candidates, shared_bytes


@dataclass(frozen=True)
class Screened:
    """A candidate as compiled: the most that any of its probes takes.

    Attributes:
        registers: per thread.
        spilled: bytes per thread.
        shared: bytes per program.
        error: why it does not compile; "" where it does.
    """

    kernel: str
    tile: Tile
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    error: str = ""

    def survives(self, arch: int) -> bool:
        return not self.error and not self.spilled and self.shared <= SHARED_LIMIT[arch]


def kernels() -> list[str]:
    """Everything that has rows with tiles."""
    return [
        name
        for name in dict.fromkeys(row.kernel for row in ROWS)
        if (one := calls.KERNELS.get(name.removesuffix("_fp32"))) and one.launcher
    ]


def shipped_rows(arch: int, names: Iterable[str]) -> list[Row]:
    """What serves an architecture: its own rows, and the default's where it has none."""
    found = []
    for name in names:
        of = [row for row in ROWS if row.kernel == name]
        found += [row for row in of if row.arch == arch] or [row for row in of if row.arch == 0]
    return found


def meta(*shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype or torch.bfloat16, device="meta")


def compile_one(kernel: str, tile: Tile, arch: int, probes: Iterable[Call] | None = None) -> Screened:
    """Compile one candidate for sm_<arch>, exactly as its launcher launches it, on tensors without memory."""
    name = kernel.removesuffix("_fp32")
    one = calls.KERNELS[name]
    launcher = one.launcher
    assert launcher, f"{name} is no kernel with tiles"
    registers = spilled = shared = 0
    asked = dict.fromkeys(calls.probes(kernel) if probes is None else probes)

    def skip(row: str, _: Tile) -> bool:
        return "attention" in kernel and row != kernel  # its backward launches the kernels of two rows

    with compiling(arch, skip) as compiled, forced(name, "triton", tile):
        for call, arguments in itertools.product(asked, (one.others if probes is None else ()) or (one.arguments,)):

            def new(*shape: int, dtype: torch.dtype | None = None, scale: float = 1.0, call: Call = call) -> Any:
                return meta(*shape, dtype=dtype or call.dtype)

            try:
                launcher(*arguments(call, new))
            except Exception as error:  # Triton's own, of many types: the candidate is out, and says why
                return Screened(kernel, tile, error=f"{type(error).__name__}: {error}".strip().splitlines()[0][:200])
            for found in compiled.values():
                registers, spilled = max(registers, found.registers), max(spilled, found.spilled)
                shared = max(shared, found.shared)
            if spilled:
                break
    return Screened(kernel, tile, registers, spilled, shared, "" if compiled else "nothing was launched in this tile")


def _compile(job: tuple[str, Tile, int]) -> Screened:
    return compile_one(*job)


def fingerprint() -> str:
    """Changes with Triton and with any source of the kernels."""
    digest = hashlib.sha256(triton.__version__.encode())
    for source in sorted((Path(__file__).parents[1] / "kernels").glob("*.py")):
        if "@triton.jit" in source.read_text(encoding="utf-8"):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def screen(
    arch: int, names: Iterable[str] | None = None, progress: Callable[[int, int, str], None] = lambda *_: None
) -> list[Screened]:
    """Compile every candidate of the kernels named (all), in parallel; what was compiled before is read.

    progress is called with how many are done, how many there are, and the kernel of the last one.
    """
    jobs = [(name, tile, arch) for name in names or kernels() for tile in candidates(name, arch)]
    before = known(arch)
    found = {job: before[_key(job)] for job in jobs if _key(job) in before}
    missing = [job for job in jobs if job not in found]
    progress(len(found), len(jobs), "")
    if missing:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(os.cpu_count() or 1, len(missing)), mp_context=spawn) as pool:
            futures = {pool.submit(_compile, job): job for job in missing}
            for done, future in enumerate(as_completed(futures), len(found) + 1):
                job = futures[future]
                found[job] = before[_key(job)] = future.result()
                progress(done, len(jobs), job[0])
                if done % 20 == 0:
                    _keep(arch, before)
        _keep(arch, before)
    return [found[job] for job in jobs]


def best_tiles(
    of: Iterable[Call], arch: int, most: int, progress: Callable[[int, int, str], None] = lambda *_: None
) -> dict[Call, list[Tile]]:
    """For every call the ``most`` tiles that the static model puts first, and the shipped ones, that compile for it
    without spills, in parallel. Their machine code is then in Triton's cache on disk."""
    jobs = [
        (call._replace(device=torch.device("meta")), call, tile)
        for call in of
        if calls.KERNELS[call.kernel].launcher
        for tile in dict.fromkeys(
            [*_plausible(call, arch)[:most], *(row.tile for row in shipped_rows(arch, [call.kernel]))]
        )
    ]
    found: dict[Call, list[Tile]] = {call: [] for _, call, _ in jobs}
    progress(0, len(jobs), "")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(compile_one, job[0].kernel, job[2], arch, [job[0]]) for job in jobs]
        for done, ((_, call, tile), future) in enumerate(zip(jobs, futures, strict=True), 1):
            # A process that dies takes its pool's other jobs along: the tiles found so far, and the shipped ones, stay.
            with contextlib.suppress(BrokenProcessPool):
                if future.result().survives(arch):
                    found[call].append(tile)
            progress(done, len(jobs), call.kernel)
    return found


def _plausible(call: Call, arch: int) -> list[Tile]:
    """Tiles of a call by modelled time: of those screened, or of all, with registers by a rule of thumb."""
    if ranked := [one.tile for _, one in ranking(known(arch).values(), call, arch)]:
        return ranked
    guesses = []
    for tile in candidates(call.kernel, arch):
        registers = min(255, 64 + tile.m * tile.n // (32 * tile.warps))
        guesses.append(Screened(call.kernel, tile, registers, 0, shared_bytes(call.kernel, tile, arch)))
    return [one.tile for _, one in ranking(guesses, call, arch)]


def _key(job: tuple[str, Tile, int]) -> str:
    return f"{job[0]} {' '.join(map(str, astuple(job[1])))}"


def _file(arch: int) -> Path:
    return _cache.folder() / f"screened-sm_{arch}.json"


def known(arch: int) -> dict[str, Screened]:
    """What was compiled before from the same sources; {} where the file is missing, damaged or older."""
    try:
        content = json.loads(_file(arch).read_text(encoding="utf-8"))
        if content["fingerprint"] != fingerprint():
            return {}
        return {key: Screened(**{**one, "tile": Tile(**one["tile"])}) for key, one in content["screened"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _keep(arch: int, known: dict[str, Screened]) -> None:
    """A later run is quicker for it; where it cannot be written, it is not."""
    with contextlib.suppress(OSError):
        _cache.write(_file(arch), {"fingerprint": fingerprint(), "screened": {k: asdict(v) for k, v in known.items()}})


def ranking(found: Iterable[Screened], call: Call, arch: int = 80) -> Iterator[tuple[float, Screened]]:
    """The survivors that could serve a call with their modelled milliseconds, best first."""
    survivors = [one for one in found if one.kernel == call.kernel and one.survives(arch)]
    timed = [(model.milliseconds(call, one.tile, one.registers, one.shared), one) for one in survivors]
    yield from sorted(timed, key=lambda pair: (pair[0], -pair[1].tile.m * pair[1].tile.n, pair[1].shared))
