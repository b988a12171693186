"""Rows to commit to kernels/_rows.py, from what was screened or measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from itertools import groupby
from typing import Any

import torch

from ..kernels import _cache
from ..kernels._rows import ANY, Measured, Row, Tile
from ..kernels._tiles import Call
from . import calls, model
from .screen import Screened, shipped_rows

# How much faster, by the static model, a tile must be to get a row of its own: less is not to be told apart by it.
MARGIN = 1.1
_LOW, _HIGH = (8, 16), (64, 128)
_LOW_RANKS = 48  # of three projections of rank 16; one of rank 64 has more
_OURS = ("triton", "fastlora")


def screened(found: Iterable[Screened], kernel: str, arch: int) -> list[Row]:
    """The fewest rows within MARGIN of the best survivor for every Llama 2 shape, by the static model."""
    survivors = [one for one in found if one.kernel == kernel and one.survives(arch)]
    times: dict[tuple[int, tuple[int, ...]], dict[Tile, float]] = {
        (tokens, ranks): {one.tile: _mean(of, one) for one in survivors}
        for tokens in calls.TOKENS
        for ranks in (_LOW, _HIGH)
        for of in [_calls(kernel, tokens, ranks)]
    }
    if not survivors:
        return []
    overall = _overall(times, [row.tile for row in shipped_rows(arch, [kernel])])
    low, high = (_by_tokens(kernel, arch, times, ranks, overall) for ranks in (_LOW, _HIGH))
    same = [(row.tile, row.m) for row in low] == [(row.tile, row.m) for row in high]
    return high if same else [*(replace(row, r=_LOW_RANKS) for row in low), *high]


Times = Mapping[tuple[int, tuple[int, ...]], Mapping[Tile, float]]


def _overall(times: Times, current: list[Tile]) -> Tile:
    """The tile that is best over all sizes; the shipped one where it is within MARGIN of that."""
    sums = {tile: sum(math.log(of[tile]) for of in times.values()) / len(times) for tile in next(iter(times.values()))}
    best = min(sums, key=lambda tile: (round(sums[tile], 6), -tile.m * tile.n, repr(tile)))
    stays = [tile for tile in current[::-1] if tile in sums and sums[tile] <= sums[best] + math.log(MARGIN)]
    return stays[0] if stays else best


def _by_tokens(kernel: str, arch: int, times: Times, ranks: tuple[int, ...], overall: Tile) -> list[Row]:
    rows: list[Row] = []
    for tokens in calls.TOKENS:
        here = times[tokens, ranks]
        best = min(here, key=lambda tile: (here[tile], -tile.m * tile.n))
        tile = best if here[overall] > MARGIN * here[best] else overall
        # What serves the size before stays, where it is as good here.
        if rows and here[rows[-1].tile] <= MARGIN * here[best]:
            tile = rows[-1].tile
        rows.append(Row(kernel, arch, tile, m=tokens))
    return merged(rows)


def _calls(kernel: str, tokens: int, ranks: Iterable[int]) -> list[Call]:
    name, meta = kernel.removesuffix("_fp32"), torch.device("meta")
    return [
        call
        for one in calls.MODELS.values()
        for rank in ranks
        for call in calls.of_kernel(name, one, tokens, rank, torch.bfloat16, meta)
    ]


def _mean(of: list[Call], one: Screened) -> float:
    return math.exp(sum(math.log(model.milliseconds(c, one.tile, one.registers, one.shared)) for c in of) / len(of))


def measured(entries: Mapping[str, Mapping[str, Any]], arch: int, gpu: str, torch_: str, triton: str) -> list[Row]:
    """The rows that a GPU's measurements in tuning.json make, kernel by kernel, smallest call first."""
    rows = []
    for name, entry in entries.items():
        kernel, dtype = name.split()[:2]
        if dtype != "bfloat16":
            continue
        m, n, _, r, _ = entry["call"]
        provenance = Measured(
            gpu, entry["date"], torch_, triton, entry["ms"], entry["runner_up"], entry["runner_up_ms"]
        )
        rows.append(Row(kernel, arch, Tile(*entry["tile"]), entry["method"], m or ANY, n or ANY, r or ANY, provenance))
    rows.sort(key=lambda row: (row.kernel, row.m, row.r, row.n))
    return [one for _, group in groupby(rows, key=lambda row: row.kernel) for one in merged(list(group))]


def of_environment(environment: str, entries: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The rows of one environment of tuning.json."""
    words = _cache.parts(environment)
    gpu, arch = words["gpu"].rsplit(" sm_", 1)
    return measured(entries, int(arch), gpu, words["torch"], words["triton"])


def merged(rows: list[Row]) -> list[Row]:
    """Rows of one kernel in order: those that the next one answers alike are left out, and the last has no bounds."""

    def answer(row: Row) -> tuple[Any, ...]:
        return row.tile, row.method

    kept = [row for row, after in zip(rows, [*rows[1:], None], strict=True) if after is None or not _covers(after, row)]
    while len(kept) > 1 and answer(kept[-2]) == answer(kept[-1]):
        del kept[-2]
    return [*kept[:-1], replace(kept[-1], m=ANY, n=ANY, r=ANY)]


def _covers(after: Row, row: Row) -> bool:
    same = (after.tile, after.method) == (row.tile, row.method)
    return same and row.m <= after.m and row.n <= after.n and row.r <= after.r


def source(row: Row) -> str:
    """A row as the line of Python that goes into _rows.py."""
    parts = [repr(row.kernel), str(row.arch), _literal(row.tile)]
    for one in fields(Row)[3:]:
        value = getattr(row, one.name)
        if value != one.default:
            parts.append(f"{one.name}={value!r}")
    text = f"Row({', '.join(parts)}),".replace("'", '"')
    return text if len(text) <= 116 else text.replace(" provenance=", "\n    provenance=")


def _literal(tile: Tile) -> str:
    shown = [f"{one.name}={getattr(tile, one.name)}" for one in fields(Tile) if getattr(tile, one.name) != one.default]
    return f"Tile({', '.join(shown)})"


def table(of: Iterable[tuple[Call, Mapping[str, Any]]]) -> Iterator[tuple[str, ...]]:
    """Lines of (kernel, M, N, K, R, ours ms, its tile, library ms, its name, ours / library), losses included."""
    for call, entry in of:
        times = entry["all"]
        ours = min((name for name in times if name.startswith(_OURS)), key=times.get, default=None)
        other = min((name for name in times if not name.startswith(_OURS)), key=times.get, default=None)
        cells = [call.kernel, *(str(size) if size else "" for size in call[3:7])]
        cells += [f"{times[ours]:.4f}" if ours else "none", ours.removeprefix("triton ") if ours else ""]
        cells += [f"{times[other]:.4f}" if other else "none", other or ""]
        yield (*cells, f"{times[ours] / times[other]:.2f}" if ours and other else "")
