"""What explain returns: rows, counters, and a table a person can read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Row:
    """One module or projection.

    Attributes:
        path: name in ``model.named_modules()``.
        runs: what computes it.
        why: why that is not fastlora's; None where it is, or where there is nothing to fuse.
        fused: calls that ran fused since patch().
        passed: calls that were passed through.
    """

    path: str
    runs: str
    why: str | None = None
    fused: int = 0
    passed: int = 0


@dataclass(frozen=True)
class Plan:
    """What is fused in a model, what is left alone, why, and how often each ran. ``print(plan)`` is a table."""

    rows: tuple[Row, ...]
    backend: str

    @property
    def unfused(self) -> tuple[Row, ...]:
        """Rows that fastlora would fuse and does not."""
        return tuple(row for row in self.rows if row.why)

    def summary(self) -> str:
        """How much is fused, and a line for every reason why the rest is not."""
        if not self.rows:
            return "no Llama module found: nothing is fused"
        reasons = sorted({str(row.why) for row in self.unfused})
        fused = f"{len(self.rows) - len(self.unfused)} of {len(self.rows)} modules are fused"
        return "\n".join([fused, *(f"  not fused: {why}" for why in reasons)])

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"backend": self.backend, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        if not self.rows:
            return "No Llama module found: nothing to fuse."
        header = ("module", "runs", "fused calls", "passed", "why not fused")
        lines = [
            header,
            *((r.path or "(model)", r.runs, str(r.fused), str(r.passed), r.why or "") for r in _by_layer(self.rows)),
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        text.insert(1, "  ".join("─" * width for width in widths))
        return "\n".join([*text, "", self.backend])


def _by_layer(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ in nothing but the layer, as one: ``layers.0-31``, calls added up."""
    groups: dict[tuple[str, str, str | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((_LAYER.sub("*", row.path), row.runs, row.why), []).append(row)
    merged = []
    for (path, runs, why), same in groups.items():
        layers = [int(found.group()) for row in same if (found := _LAYER.search(row.path))]
        path = path.replace("*", _ranges(layers)) if layers else path
        merged.append(Row(path, runs, why, sum(r.fused for r in same), sum(r.passed for r in same)))
    return merged


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
