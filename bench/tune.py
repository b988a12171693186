"""Tiles and libraries against each other for the calls of a Llama's training step, into tuning.json and rows.txt.

What `fastlora tune` does, for machines that have none of its command line's packages. A line of results per call:
our best tile and the library's best way, whichever wins.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastlora.kernels import _cache, _tiles
from fastlora.tuning import calls, measure, rows, screen
from fastlora.tuning.aot import SHARED_LIMIT

from . import machine, record
from .cli import common_options, new_parser, open_sink
from .providers import environment

HEAD = ("kernel", "M", "N", "K", "R", "Triton ms", "tile", "library ms", "library", "Triton / library")


def main(argv: list[str]) -> int:
    parser = new_parser("tune", __doc__)
    parser.add_argument("--model", default="7b", help="among 7b, 13b, 34b, 70b; several with commas")
    parser.add_argument("--tokens", default="4096", help="several with commas")
    parser.add_argument("--rank", default="16", help="several with commas")
    parser.add_argument("--seconds", type=float, default=0.4, help="time for each call (default 0.4)")
    parser.add_argument("--tiles", type=int, default=6, help="of every call that are timed, beside the shipped ones")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    common_options(parser)
    args = parser.parse_args(argv)
    sink = open_sink(args, "tune")
    folder = Path(args.append).parent if args.append else sink.path.parent
    with environment({"FASTLORA_CACHE_DIR": str(folder)}):
        _tune(args, sink, folder)
    return 0


def _tune(args: argparse.Namespace, sink: record.Sink, folder: Path) -> None:
    device = torch.device(args.device)
    arch = _tiles.arch(device)
    here = _cache.environment(device, arch)
    wanted = _wanted(args, device)
    tiles: dict[Any, Any] = {}
    if device.type == "cuda" and arch in SHARED_LIMIT:
        tiles = screen.best_tiles(wanted, arch, args.tiles, _say)
    done = []
    for call in wanted:
        try:
            ((_, entry),) = measure.tune(
                [call],
                here,
                again=True,
                measure=lambda call: measure.measure(call, args.seconds, tiles.get(call, ())),
            )
        except (measure.Refused, torch.OutOfMemoryError) as error:  # no candidate is right, or the operands do not fit
            sink.write(
                _of(call) | {"provider": "", "why": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            )
            machine.synchronize(args.device)  # raises where the GPU is lost to this process
            continue
        done.append((call, entry))
        for line in _records(call, entry):
            sink.write(line)
        # Whole after every call: this may be stopped at any time.
        (folder / "tuning.md").write_text(f"{here}\n\n{record.table(HEAD, list(rows.table(done)))}\n")
        lines = map(rows.source, rows.of_environment(here, _cache.entries(here)))
        (folder / "rows.txt").write_text("\n".join(lines) + "\n")


def _wanted(args: argparse.Namespace, device: torch.device) -> list[_tiles.Call]:
    if args.quick:
        return _step(calls.Model(64, 176, 2, 1), 32, 8, args.dtype[0], device)
    return list(
        dict.fromkeys(
            call
            for model in args.model.split(",")
            for tokens in args.tokens.split(",")
            for rank in args.rank.split(",")
            for call in _step(calls.MODELS[model], int(tokens), int(rank), args.dtype[0], device)
        )
    )


def _step(model: calls.Model, tokens: int, rank: int, dtype: torch.dtype, device: torch.device) -> list[_tiles.Call]:
    return calls.of_model(model, tokens, rank, dtype, device) + calls.of_attention(model, tokens, dtype, device)


def _say(done: int, total: int, at: str) -> None:
    if done % 50 == 0 or done == total:
        print(f"{done} of {total} compiled {at}", flush=True)


def _of(call: _tiles.Call) -> record.Record:
    shape = {name: size for name, size in zip("MNKRP", call[3:], strict=True) if size}
    return {"bench": "tune", "op": call.kernel, "shape": shape, "dtype": str(call.dtype)[6:]}


def _records(call: _tiles.Call, entry: dict[str, Any]) -> Iterator[record.Record]:
    """One per candidate: its time, or why it was refused."""
    for name, ms in entry["all"].items():
        yield _of(call) | {"provider": name, "graph_ms": {"median": ms}}
    for name, why in entry["refused"].items():
        yield _of(call) | {"provider": name, "why": why}
