"""`fastlora tune`: rows by measurement on the GPU at hand, or by compilation alone."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..kernels import _cache, _tiles
from ..tuning import calls, measure, rows, screen
from ..tuning.aot import SHARED_LIMIT
from .errors import CommandError

_TILES = 8  # of every call that are timed, beside the shipped ones


def _progress(console: Console, title: str) -> Progress:
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[at]}"),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def screened(arch: str, kernels: str | None, console: Console) -> None:
    """Compile every candidate for an architecture and print the survivors and the rows to commit."""
    number = int(digits) if (digits := arch.lower().removeprefix("sm_").removeprefix("sm")).isdigit() else 0
    if number not in SHARED_LIMIT:
        names = ", ".join(f"sm_{one}" for one in SHARED_LIMIT)
        raise CommandError(f"--arch is {arch!r}, needs one of {names}")
    wanted = kernels.split(",") if kernels else screen.kernels()
    if unknown := set(wanted) - set(screen.kernels()):
        raise CommandError(f"--kernels has {', '.join(sorted(unknown))}; there are {', '.join(screen.kernels())}")
    with _progress(console, f"compiling for sm_{number}") as bar:
        task = bar.add_task("", at="")
        found = screen.screen(number, wanted, lambda n, total, at: bar.update(task, completed=n, total=total, at=at))
    console.print(_survivors(found, number))
    console.print("Rows to commit, ranked by the static model of docs/tuning.md (modelled, not measured):\n")
    for name in wanted:
        for row in rows.screened(found, name, number):
            console.print(f"    {rows.source(row)}")
    missing = [row for row in screen.shipped_rows(number, wanted) if not _survives(row, found, number)]
    if missing:
        raise CommandError("shipped rows that do not survive:\n" + "\n".join(rows.source(row) for row in missing))
    console.print(f"\nEvery shipped row of sm_{number} is among the survivors.")


def _survives(row: Any, found: Iterable[screen.Screened], arch: int) -> bool:
    return any(one.kernel == row.kernel and one.tile == row.tile and one.survives(arch) for one in found)


def _survivors(found: list[screen.Screened], arch: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("kernel", "tiles", "spill", "large", "fail", "survive", "regs", "KB"):
        table.add_column(name, justify="left" if name == "kernel" else "right", no_wrap=True)
    for kernel in dict.fromkeys(one.kernel for one in found):
        of = [one for one in found if one.kernel == kernel]
        good = [one for one in of if one.survives(arch)]
        fate = Counter(
            "fail" if one.error else "spill" if one.spilled else "large" for one in of if not one.survives(arch)
        )
        numbers = [len(of), fate["spill"], fate["large"], fate["fail"], len(good)]
        table.add_row(
            kernel,
            *map(str, numbers),
            _range(one.registers for one in good),
            _range(round(one.shared / 1024) for one in good),
        )
    return table


def _range(values: Iterable[int]) -> str:
    every = sorted(values)
    return "-".join(map(str, dict.fromkeys([every[0], every[-1]]))) if every else ""


def measured(model: str, tokens: str, rank: int, dropout: bool, again: bool, seconds: float, console: Console) -> None:
    """Time every candidate of a model's calls on the GPU, and keep the winners for this user."""
    import torch

    wanted = _wanted(model, tokens, rank, dropout)
    if not torch.cuda.is_available():
        raise CommandError(
            "fastlora tune measures on a GPU, and PyTorch sees none. Without one: fastlora tune --screen --arch sm_80"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    arch = _tiles.arch(device)
    environment = _cache.environment(device, arch)
    console.print(environment)
    known = {} if again else _cache.entries(environment)
    of = [call._replace(device=device) for call in wanted]
    with _progress(console, "compiling") as bar:
        task = bar.add_task("", at="")
        missing = [call for call in of if _cache.key(call) not in known]
        tiles = screen.best_tiles(
            missing, arch, _TILES, lambda n, total, at: bar.update(task, completed=n, total=total, at=at)
        )
    done = []
    with _progress(console, "measuring") as bar:
        task = bar.add_task("", total=len(of), at="")
        try:
            for call, entry in measure.tune(
                of, environment, again, lambda call: measure.measure(call, seconds, tiles.get(call, ()))
            ):
                done.append((call, entry))
                bar.update(task, advance=1, at=call.kernel)
        except (measure.Refused, torch.OutOfMemoryError) as error:
            raise CommandError(str(error).splitlines()[0]) from None
    console.print(comparison(done))
    console.print(f"Kept in {_cache.path()}. As rows to commit: fastlora tune --rows")


def comparison(done: Iterable[tuple[Any, Mapping[str, Any]]]) -> Table:
    """Ours against the library, call by call, losses included."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("kernel", "M", "N", "K", "R", "Triton ms", "tile", "library ms", "", "ratio"):
        table.add_column(name, justify="left" if name in ("kernel", "tile", "") else "right")
    for line in rows.table(done):
        table.add_row(*line)
    return table


def _wanted(model: str, tokens: str, rank: int, dropout: bool) -> list[Any]:
    import torch

    names, sizes = model.split(","), tokens.split(",")
    if unknown := [name for name in names if name not in calls.MODELS]:
        raise CommandError(f"--model has {', '.join(unknown)}; there are {', '.join(calls.MODELS)}")
    if not all(size.isdigit() and int(size) for size in sizes):
        raise CommandError(f"--tokens is {tokens!r}, needs numbers, several with commas: 2048,4096")
    found, of = [], (torch.bfloat16, torch.device("cuda"), dropout)
    for name, size in itertools.product(names, sizes):
        sizes_of, length = calls.MODELS[name], int(size)
        found += [*calls.of_model(sizes_of, length, rank, *of), *calls.of_attention(sizes_of, length, *of)]
    return list(dict.fromkeys(found))


def commit_rows(console: Console) -> None:
    """Print what tuning.json holds as rows for kernels/_rows.py."""
    found = _cache.read()
    if not found:
        raise CommandError(f"{_cache.path()} holds no measurements; to make some, on a GPU: fastlora tune")
    for environment, entries in found.items():
        console.print(f"# {environment}")
        for row in rows.of_environment(environment, entries):
            console.print(f"    {rows.source(row)}")
