"""Markdown tables and plots of what was measured on one machine: report.md and PNG files beside the results.

With --readme FILE the short form (training steps, memory, launches) also replaces what stands in FILE between the lines
<!-- bench:begin --> and <!-- bench:end -->.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from . import machine, record
from .cli import new_parser
from .record import Record, group, load

_BEGIN, _END = "<!-- bench:begin -->", "<!-- bench:end -->"


def main(argv: list[str]) -> int:
    parser = new_parser("report", __doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="default: this machine's, under bench/results")
    parser.add_argument("--readme", type=Path, help="file to put the short form into")
    args = parser.parse_args(argv)
    folder = args.folder or record.RESULTS / machine.slug(machine.default_device())
    try:
        machines, records = load(folder)
    except FileNotFoundError as error:
        parser.error(f"{error}: measure first, or name another folder")
    from . import plots

    # The text first: plots take their time, and matplotlib may not be there.
    (folder / "report.md").write_text(_full(machines, records, {}))
    drawn = plots.draw(folder, records)
    (folder / "report.md").write_text(_full(machines, records, drawn))
    if args.readme:
        _put(args.readme, _short(machines, records, drawn, os.path.relpath(folder, args.readme.parent)))
    print(f"{folder / 'report.md'} and {', '.join(drawn.values()) or 'no plots'}")
    return 0


def _full(machines: list[Record], records: list[Record], drawn: dict[str, str]) -> str:
    parts = ["# Measurements", machine_text(machines)]
    parts += _pictures(drawn, ".", ("train_step", "memory"))
    parts += [train_step(records), figures(records), _pictures(drawn, ".", ("ops", "roofline")), ops(records)]
    return _join(parts)


def _short(machines: list[Record], records: list[Record], drawn: dict[str, str], folder: str) -> str:
    return _join(
        [
            machine_text(machines),
            _pictures(drawn, folder, ("train_step", "memory")),
            train_step(records),
            figures(records),
        ]
    )


def _join(parts: Iterable[str | list[str]]) -> str:
    flat = [p for part in parts for p in (part if isinstance(part, list) else [part]) if p]
    return "\n\n".join(flat) + "\n"


def _pictures(drawn: dict[str, str], folder: str, names: Iterable[str]) -> list[str]:
    titles = {
        "train_step": "Training steps: tokens per second, whiskers from p20 to p80",
        "memory": "Peak memory of a training step against its tokens",
        "ops": "Single operators, forward and backward",
        "roofline": "Achieved FLOP/s against arithmetic intensity",
    }
    return [f"![{titles[name]}]({folder}/{drawn[name]})" for name in names if name in drawn]


def machine_text(machines: list[Record]) -> str:
    """Who, when and with what, once for each machine line that differs in more than commit and date."""
    seen: dict[str, list[Record]] = {}
    for m in machines:
        gpu = m.get("gpu")
        name = (
            f"{gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB, clocks and limits {gpu['clocks']}"
            if gpu
            else f"{m['cpu']['name']}, {m['cpu']['cores']} cores ({', '.join(m['cpu']['flags'])})"
        )
        versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
        native = "" if gpu else f" C++ kernels: {m['csrc']}."
        seen.setdefault(f"{name}. {versions}.{native}", []).append(m)
    texts = []
    for text, same in seen.items():
        commits = ", ".join(dict.fromkeys(m["commit"] for m in same))
        texts.append(f"{text} Measured at {commits} on {', '.join(dict.fromkeys(m['time'][:10] for m in same))}.")
    return "\n\n".join(texts)


def train_step(records: list[Record]) -> str:
    """One table per setting, providers by speed; who could not run, and why, beneath."""
    parts = []
    # Memory may have been measured by a run of its own.
    peaks = {(group(r), r["provider"]): r["peak_bytes"] for r in records if r.get("peak_bytes")}
    for key, some in grouped(records, "train_step").items():
        if not any(r.get("ms") for r in some):
            continue
        eager = next((r["ms"]["median"] for r in some if r["provider"] == "peft" and r.get("ms")), None)
        rows = []
        for r in sorted((r for r in some if r.get("ms")), key=lambda r: -r["ms"]["median"]):
            ms = r["ms"]
            rows.append(
                (
                    r["title"],
                    f"{ms['median']:,.0f} [{ms['p20']:,.0f}, {ms['p80']:,.0f}]",
                    f"{r['tokens_per_s']:,.0f}",
                    f"{eager / ms['median']:.2f}×" if eager else "",
                    f"{r['fraction']:.0%}",
                    f"{r['mfu']:.0%}",
                    f"{peak / 2**20:,.0f}" if (peak := peaks.get((key, r["provider"]))) else "",
                    str(r.get("largest_batch", "")),
                )
            )
        head = ("", "ms [p20, p80]", "tokens/s", "against PEFT", "of floor", "MFU", "peak MiB", "largest batch")
        parts += [f"**Training step, {_setting(key)}**", table(head, rows), _refused(some)]
    if parts:
        parts.append(
            "Floor: the frozen products alone, timed in the same turns. MFU: against the rate of a large square "
            "product measured in the same run. Peak: one step above the loaded model."
        )
    return _join(parts).strip()


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
        parts += [f"**{key[1]}, {key[4]}, {key[2]}, {key[3]}**", table(head, rows), _refused(some)]
    return _join(parts).strip()


def _setting(key: tuple[str, ...]) -> str:
    _, model, shape, dtype, mode = key
    B, T, layers, rank = (re.search(rf"{n}=(\d+)", shape).group(1) for n in ("B", "T", "layers", "r"))
    return f"{model} ({layers} layers), {B}×{T} tokens, {dtype}, r={rank}" + (f", {mode}" if mode else "")


def _refused(some: list[Record]) -> str:
    return "; ".join(f"{r.get('title') or r['provider']}: {r['why']}" for r in some if r.get("why"))


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table without the columns that are empty in every row."""
    kept = [i for i in range(len(head)) if i < 1 or any(row[i] for row in rows)]
    lines = [[head[i] for i in kept], ["---" if i < 1 else "---:" for i in kept]]
    lines += [[row[i] for i in kept] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def grouped(records: list[Record], bench: str) -> dict[tuple[str, ...], list[Record]]:
    """Records of one bench by what their providers have in common, in the order they were measured."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for r in records:
        if r["bench"] == bench:
            groups.setdefault(group(r), []).append(r)
    return groups


def _put(readme: Path, text: str) -> None:
    old = readme.read_text()
    if _BEGIN not in old or _END not in old:
        raise SystemExit(f"{readme} has no lines {_BEGIN} and {_END}")
    before, rest = old.split(_BEGIN, 1)
    readme.write_text(f"{before}{_BEGIN}\n\n{text}\n{_END}{rest.split(_END, 1)[1]}")
