"""Was B slower than A? Two results files or folders of one machine; exit status 1 if anything of fastlora's got worse.

Times are compared relative to the yardstick of their own run (eager, or PEFT's default), so that a machine that is
slower today slows nothing down here. A change counts when it is larger than the threshold and than four standard errors
of the medians. Saved bytes, launches and traffic have no noise: one per cent counts. What was measured in A and is red,
or gone, in B counts too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .cli import new_parser
from .record import Record, group, load

_YARDSTICKS = ("eager", "peft", "peft-bf16")
_EXACT = 0.01
Key = tuple[str, ...]


class Change(NamedTuple):
    """One difference in words. ``factor`` is B over A; ``worse`` is True, False or None for neither."""

    key: Key
    factor: float
    noise: float
    worse: bool | None
    text: str


def compare(a: list[Record], b: list[Record], threshold: float = 0.1, everybody: bool = False) -> Iterator[Change]:
    """Every measurement of A against its counterpart in B.

    Args:
        threshold: the least relative change that counts.
        everybody: judge other providers too, not only fastlora's.
    """
    before, after = _index(a), _index(b)
    for key, old in before.items():
        provider = key[-1]
        if not everybody and not provider.startswith("fastlora"):
            continue
        new = after.get(key)
        if new is None or (_measured(old) and not _measured(new)):
            why = new.get("why") if new else "not measured"
            if _measured(old):
                yield Change(key, math.nan, 0.0, True, f"gone: {why}")
            continue
        for figure, value in (old.get("figures") or {}).items():
            factor = new["figures"][figure] / value if value else 1.0
            yield _judged(key, factor, 0.0, _EXACT, f"{figure} {value:,.6g} → {new['figures'][figure]:,.6g}")
        for field in ("ms", "graph_ms"):
            if old.get(field) and new.get(field) and provider not in _YARDSTICKS:
                factor, noise, against = _relative(key, field, before, after)
                text = f"{field} {old[field]['median']:.4g} → {new[field]['median']:.4g}{against}"
                yield _judged(key, factor, noise, threshold, text)


def _index(records: list[Record]) -> dict[Key, Record]:
    return {(*group(r), r["provider"]): r for r in records}


def _measured(record: Record) -> bool:
    return bool(record.get("ms") or record.get("figures"))


def _relative(key: Key, field: str, before: dict[Key, Record], after: dict[Key, Record]) -> tuple[float, float, str]:
    """B over A, the standard error of its logarithm, and what it is relative to."""
    log, variance = 0.0, 0.0
    pairs = [(key, 1)]
    against = ""
    for name in _YARDSTICKS:
        yardstick = (*key[:-1], name)
        if all(index.get(yardstick, {}).get(field) for index in (before, after)):
            pairs.append((yardstick, -1))
            against = f", against {name}"
            break
    for one, sign in pairs:
        for index, direction in ((before, -1), (after, 1)):
            ms = index[one][field]
            log += sign * direction * math.log(ms["median"])
            variance += _relative_error(ms) ** 2
    return math.exp(log), math.sqrt(variance), against


def _relative_error(ms: dict[str, Any]) -> float:
    """Standard error of a median over the median: of normal times, 1.68 σ lie between p20 and p80."""
    sigma = (ms["p80"] - ms["p20"]) / 1.683
    return 1.2533 * sigma / math.sqrt(ms["n"]) / ms["median"]


def _judged(key: Key, factor: float, noise: float, threshold: float, text: str) -> Change:
    least = max(math.log1p(threshold), 4 * noise)
    change = math.log(factor) if factor > 0 else -math.inf
    return Change(key, factor, noise, change > least if abs(change) > least else None, text)


def main(argv: list[str]) -> int:
    parser = new_parser("compare", __doc__)
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("--threshold", type=float, default=0.1, help="least relative change of a time (default 0.1)")
    parser.add_argument("--all", action="store_true", help="judge every provider, not only fastlora's")
    args = parser.parse_args(argv)
    try:
        (machines_a, a), (machines_b, b) = load(args.a), load(args.b)
    except FileNotFoundError as error:
        parser.error(str(error))
    slugs = {m["slug"] for m in (*machines_a, *machines_b)}
    if len(slugs) > 1:
        parser.error(f"the results come from different machines: {', '.join(sorted(slugs))}")
    changes = list(compare(a, b, args.threshold, args.all))
    worse, better = ([c for c in changes if c.worse is wanted] for wanted in (True, False))
    for title, some in (("WORSE", worse), ("better", better)):
        for c in sorted(some, key=lambda c: -abs(math.log(c.factor)) if c.factor > 0 else -math.inf):
            print(f"{title:6} {c.factor:6.2f}x ± {c.noise:.0%}  {' '.join(filter(None, c.key))}: {c.text}")
    print(f"{len(changes)} compared, {len(worse)} worse, {len(better)} better")
    return 1 if worse else 0
