"""Markdown tables and plots of what was measured on one machine: report.md and PNG files beside the results.

With --readme FILE the short form (training steps, memory, launches) also replaces what stands in FILE between the lines
<!-- bench:begin --> and <!-- bench:end -->; of several folders one after the other. With --performance FILE the
profiles replace what stands there between <!-- profile:begin --> and <!-- profile:end -->.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from . import machine, record, step_report
from .cli import new_parser
from .record import Record, grouped, load, table


class Measured(NamedTuple):
    """What is known of one machine: its folder, its machine lines and records, and its plots by kind."""

    folder: Path
    machines: list[Record]
    records: list[Record]
    drawn: dict[str, str]


def main(argv: list[str]) -> int:
    parser = new_parser("report", __doc__)
    parser.add_argument("folder", type=Path, nargs="*", help="default: this machine's, under bench/results")
    parser.add_argument("--readme", type=Path, help="file to put the short form into")
    parser.add_argument("--performance", type=Path, help="file to put the profiles into")
    args = parser.parse_args(argv)
    try:
        folders = args.folder or [record.RESULTS / machine.slug(machine.default_device())]
        found = [Measured(folder, *load(folder), {}) for folder in folders]
    except FileNotFoundError as error:
        parser.error(f"{error}: measure first, or name another folder")
    for i, one in enumerate(found):
        found[i] = written = _write(one)
        print(f"{written.folder / 'report.md'} and {', '.join(written.drawn.values()) or 'no plots'}")
    if args.readme:
        _put(args.readme, "bench", _join(_short(one, args.readme.parent) for one in found))
    if args.performance:
        _put(args.performance, "profile", _join(_profiles(one, args.performance.parent) for one in found))
    return 0


def _write(one: Measured) -> Measured:
    from . import plots

    # The text first: plots take their time, and matplotlib may not be there.
    (one.folder / "report.md").write_text(_full(one))
    one = one._replace(drawn=plots.draw(one.folder, one.records))
    (one.folder / "report.md").write_text(_full(one))
    return one


def _full(one: Measured) -> str:
    records, drawn = one.records, one.drawn
    return _join(
        [
            "# Measurements",
            machine_text(one.machines),
            _pictures(drawn, ".", ("train_step", "memory")),
            step_report.train_step(records),
            step_report.plan(records),
            _pictures(drawn, ".", ("profile",)),
            step_report.profiles(records),
            step_report.parity(records),
            figures(records),
            _pictures(drawn, ".", ("ops", "roofline")),
            ops(records),
            stages(records),
        ]
    )


def _short(one: Measured, beside: Path) -> str:
    folder = os.path.relpath(one.folder, beside)
    whole = f"Every setting, with p20 and p80, memory, floors and energy: [report.md]({folder}/report.md)."
    return _join(
        [
            machine_text(one.machines),
            _pictures(one.drawn, folder, ("train_step", "memory")),
            step_report.summary(one.records),
            whole,
            figures(one.records),
        ]
    )


def _profiles(one: Measured, beside: Path) -> str:
    text = step_report.profiles(one.records)
    if not text:
        return ""
    return _join([machine_text(one.machines), _pictures(one.drawn, os.path.relpath(one.folder, beside), ("profile",)),
                  text])  # fmt: skip


def _join(parts: Iterable[str | list[str]]) -> str:
    flat = [p for part in parts for p in (part if isinstance(part, list) else [part]) if p]
    return "\n\n".join(part.strip() for part in flat) + "\n"


def _pictures(drawn: dict[str, str], folder: str, names: Iterable[str]) -> list[str]:
    titles = {
        "train_step": "Training steps: tokens per second, whiskers from p20 to p80",
        "memory": "Peak memory of a training step against its tokens",
        "profile": "Where the time of a training step goes, by kind of kernel",
        "ops": "Single operators, forward and backward",
        "roofline": "Achieved FLOP/s against arithmetic intensity",
    }
    return [f"![{titles[name]}]({folder}/{drawn[name]})" for name in names if name in drawn]


def machine_text(machines: list[Record]) -> str:
    """Who, when and with what, once for each machine line that differs in more than commit, date and extra packages."""
    seen: dict[str, list[Record]] = {}
    for m in machines:
        versions = dict(m["versions"])
        for other in machines:  # a package that only some of the runs had
            if all(versions.get(name, v) == v for name, v in other["versions"].items()):
                versions |= other["versions"]
        gpu = m.get("gpu")
        name = (
            f"{gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB, {gpu['limits']}"
            if gpu
            else f"{m['cpu']['name']}, {m['cpu']['cores']} cores ({', '.join(m['cpu']['flags'])})"
        )
        words = ", ".join(f"{name} {versions[name]}" for name in sorted(versions, key=_position))
        native = "" if gpu else f" C++ kernels: {m['csrc']}."
        seen.setdefault(f"{name}. {words}.{native}", []).append(m)
    texts = []
    for text, same in seen.items():
        commits = ", ".join(dict.fromkeys(m["commit"] for m in same))
        texts.append(f"{text} Measured at {commits} on {', '.join(dict.fromkeys(m['time'][:10] for m in same))}.")
    return "\n\n".join(textwrap.fill(text, 118, break_on_hyphens=False) for text in texts)


def _position(package: str) -> tuple[int, str]:
    first = ("torch", "triton", "transformers", "peft")
    return (first.index(package) if package in first else len(first), package)


def figures(records: list[Record]) -> str:
    """Saved bytes, launches and traffic, which no machine changes; a column for each model."""
    parts = []
    if rows := _by_model(records, "saved_bytes", lambda f: f"{f['bytes/token/layer'] / 1e3:,.1f}"):
        parts += ["**Kept for backward, KB per token and layer** (any machine)", rows]
    if rows := _by_model(records, "launches", _launches):
        tokens = next(r["shape"]["M"] for r in records if r["bench"] == "launches")
        parts += [
            f"**One layer's training step on a GPU, {tokens} tokens: launches, and GB moved outside the base products "
            "and attention** (counted, any machine)",
            rows,
        ]
    return _join(parts).strip()


def _launches(f: Record) -> str:
    return f"{f['launches']:.0f}, {f['elementwise GB'] + f['skinny GB']:.2f} GB"


def _by_model(records: list[Record], bench: str, cell: Callable[[Record], str]) -> str:
    some = [r for r in records if r["bench"] == bench and r.get("figures")]
    titles, models = (dict.fromkeys(r[field] for r in some) for field in ("title", "op"))
    cells = {(r["title"], r["op"]): cell(r["figures"]) for r in some}
    rows = [(title, *(cells.get((title, model), "") for model in models)) for title in titles]
    return table(("", *(model.upper() for model in models)), rows) if rows else ""


def ops(records: list[Record]) -> str:
    """Every op, shape and mode: median of each provider and the fraction of the floor."""
    parts = []
    for key, some in grouped(records, "op").items():
        rows = [
            (
                r["provider"],
                f"{r['ms']['median']:.3f} [{r['ms']['p20']:.3f}, {r['ms']['p80']:.3f}]",
                f"{r['graph_ms']['median']:.3f}" if r.get("graph_ms") else "",
                f"{r['fraction']:.0%}",
                f"{r['saved_bytes'] / 2**20:,.1f}" if r.get("saved_bytes") is not None else "",
                f"{r['peak_bytes'] / 2**20:,.1f}" if r.get("peak_bytes") is not None else "",
            )
            for r in some
            if r.get("ms")
        ]
        head = ("", "ms [p20, p80]", "CUDA graph ms", "of floor", "saved MiB", "peak MiB")
        parts += [f"**{key[1]}, {key[4]}, {key[2]}, {key[3]}**", table(head, rows), step_report.refused(some)]
    return _join(parts).strip()


def stages(records: list[Record]) -> str:
    """How the stages of ``bench gpu`` ended."""
    rows = [(r["op"], r["verdict"], f"{r['seconds']:.0f}") for r in records if r["bench"] == "stage"]
    return _join(["**Stages**", table(("", "", "seconds"), rows)]).strip() if rows else ""


def _put(file: Path, name: str, text: str) -> None:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = file.read_text()
    if begin not in old or end not in old:
        raise SystemExit(f"{file} has no lines {begin} and {end}")
    before, rest = old.split(begin, 1)
    file.write_text(f"{before}{begin}\n\n{text}\n{end}{rest.split(end, 1)[1]}")
