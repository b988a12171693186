"""Results as JSON lines: the machine first, then one line per measurement, flushed as they come."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
RESULTS = Path(__file__).resolve().parent / "results"


class Sink:
    """Writes records to ``path`` (its machine line first) and a readable line of each to the terminal."""

    def __init__(self, path: Path, machine: Record, append: bool = False) -> None:
        self.path = path
        self.records: list[Record] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if not append:
            path.write_text("")
        self._line(machine)

    def write(self, record: Record) -> None:
        self.records.append(record)
        self._line(record)
        print(sentence(record), flush=True)

    def _line(self, record: Record) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def load(path: Path) -> tuple[list[Record], list[Record]]:
    """The machine lines and the measurements of a results file, or of every ``*.jsonl`` of a folder.

    Of a training step that a file holds more than once, the last: the others were provisional.

    Raises:
        FileNotFoundError: there is no such file, or no results in the folder.
    """
    files = sorted(path.glob("*.jsonl")) if path.suffix != ".jsonl" else [path]
    if not files:
        raise FileNotFoundError(f"{path} holds no *.jsonl")
    records: list[Record] = []
    for file in files:
        records += _current(list(_lines(file)))
    return [r for r in records if r["bench"] == "machine"], [r for r in records if r["bench"] != "machine"]


def _lines(file: Path) -> Iterator[Record]:
    for line in file.read_text().splitlines():
        # A run that was cut off leaves half a line at the end.
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def _current(records: list[Record]) -> list[Record]:
    last = {(*group(r), r["provider"]): i for i, r in enumerate(records) if r["bench"] == "train_step"}
    return [r for i, r in enumerate(records) if r["bench"] != "train_step" or last[(*group(r), r["provider"])] == i]


def shape_text(shape: Record) -> str:
    return " ".join(f"{name}={value}" for name, value in shape.items())


def group(record: Record) -> tuple[str, ...]:
    """What the providers of one comparison have in common."""
    return (record["bench"], record["op"], shape_text(record["shape"]), record["dtype"], record.get("mode", ""))


def grouped(records: list[Record], bench: str) -> dict[tuple[str, ...], list[Record]]:
    """Records of one bench by what their providers have in common, in the order they were measured."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for r in records:
        if r["bench"] == bench:
            groups.setdefault(group(r), []).append(r)
    return groups


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table without the columns that are empty in every row."""
    kept = [i for i in range(len(head)) if i < 1 or any(row[i] for row in rows)]
    lines = [[head[i] for i in kept], ["---" if i < 1 else "---:" for i in kept]]
    lines += [[row[i] for i in kept] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(ms: Iterable[float]) -> Record:
    """Median, 20th and 80th percentile and the count of times in ms; the samples too, for compare and the plots."""
    ordered = sorted(ms)

    def quantile(q: float) -> float:
        position = q * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return {
        "median": round(quantile(0.5), 5),
        "p20": round(quantile(0.2), 5),
        "p80": round(quantile(0.8), 5),
        "n": len(ordered),
    }


def sentence(record: Record) -> str:
    """One line for the terminal."""
    head = f"{record['op']:22} {shape_text(record['shape'])} {record['dtype']} {record.get('mode', '')}".rstrip()
    text = f"{head:78} {record['provider']:22}"
    if record.get("why"):
        return f"{text} — {record['why']}"
    if ms := record.get("ms"):
        text += f" {ms['median']:9.3f} ms [{ms['p20']:.3f}, {ms['p80']:.3f}]"
    if record.get("graph_ms"):
        text += f"  graph {record['graph_ms']['median']:.3f} ms"
    if record.get("fraction"):
        text += f"  {record['fraction']:4.0%} of floor"
    if record.get("provisional"):
        text += "  alone"
    if record.get("tokens_per_s"):
        text += f"  {record['tokens_per_s']:,.0f} tok/s"
    if (found := record.get("profile")) and found["device"] == "cuda":
        text += f"  {found['launches']} launches, busy {found['busy_ms']:.2f} ms, host {found['host_ms']:.2f} ms"
    for name, unit in (("saved_bytes", "saved"), ("peak_bytes", "peak")):
        if record.get(name) is not None:
            text += f"  {unit} {record[name] / 2**20:,.1f} MiB"
    if record.get("parity") and record.get("gate"):
        text += "  " + " ".join(f"{name} {value:g}" for name, value in record["gate"].items()) + " of the budget"
    for name, value in record.get("figures", {}).items():
        text += f"  {name} {value:,.6g}"
    return text
