"""What training steps took, in tables: each setting, all of them in one, against the plan, and by kernel."""

from __future__ import annotations

import re

from . import profiling
from .record import Record, group, grouped, table

Key = tuple[str, ...]
# The columns of the summary, and the providers of each, of which the fastest counts.
_COLUMNS = {
    "PEFT": ("peft",),
    "PEFT, bf16 adapters": ("peft-bf16",),
    "best of torch.compile": ("peft-compile", "peft-bf16-compile", "peft-compile-layers", "peft-bf16-compile-layers"),
    "best of Liger-Kernel": ("liger", "liger-bf16"),
    "fastlora": ("fastlora",),
    "fastlora, bf16 adapters": ("fastlora-bf16",),
}
# What is said of a time that is not quite what its row says.
_MARKS = {"provisional": "provisional", "given_up": "a tile failed", "unfused": "not all of it fused"}
_TOP = 10  # kernels of a profile that are listed


def train_step(records: list[Record]) -> str:
    """One table per setting, providers by speed; who could not run, and why, beneath."""
    parts = []
    # Memory may have been measured by a run of its own.
    peaks = {(group(r), r["provider"]): r["peak_bytes"] for r in records if r.get("peak_bytes")}
    for key, some in _timed(records):
        peft = next((r["ms"]["median"] for r in some if r["provider"] == "peft" and r.get("ms")), None)
        timed = sorted((r for r in some if r.get("ms")), key=lambda r: -r["ms"]["median"])
        rows = [(*_row(r, peft), _mib(peaks.get((key, r["provider"]))), *_measured_beside(r)) for r in timed]
        head = (
            "", "ms [p20, p80]", "tokens/s", "against PEFT", "of floor", "MFU", "peak MiB", "saved MiB", "host ms",
            "GPU idle", "J", "largest batch",
        )  # fmt: skip
        parts += [f"**Training step, {setting(key)}**", table(head, rows), refused(some)]
    if parts:
        parts.append(
            "Floor: the frozen products alone, timed in the same turns. MFU: against the rate of a large square "
            "product measured in the same run. Peak: one step above the loaded model. Host: until the call returns, "
            "without its waits, under the profiler. Idle: the part of the step in which no kernel runs."
        )
    return "\n\n".join(filter(None, parts))


def _timed(records: list[Record]) -> list[tuple[Key, list[Record]]]:
    """The settings with times; the deepest models, the most tokens and the longest rows first."""
    timed = [(key, some) for key, some in grouped(records, "train_step").items() if any(r.get("ms") for r in some)]

    def size(one: tuple[Key, list[Record]]) -> tuple[int, int, int, bool]:
        shape, mode = one[1][0]["shape"], one[0][4]
        return -shape["layers"], -shape["B"] * shape["T"], shape["B"], bool(mode)

    return sorted(timed, key=size)


def _row(r: Record, peft: float | None) -> tuple[str, ...]:
    ms = r["ms"]
    return (
        r["title"] + "".join(f" ({words})" for field, words in _MARKS.items() if r.get(field)),
        f"{ms['median']:,.0f} [{ms['p20']:,.0f}, {ms['p80']:,.0f}]",
        f"{r['tokens_per_s']:,.0f}",
        f"{peft / ms['median']:.2f}×" if peft else "",
        f"{r['fraction']:.0%}",
        f"{r['mfu']:.0%}",
    )


def _measured_beside(r: Record) -> tuple[str, ...]:
    idle = gpu_idle(r)
    return (
        _mib(r.get("saved_bytes")),
        "" if idle is None else f"{r['profile']['host_ms']:,.0f}",
        "" if idle is None else f"{idle:.0%}",
        f"{r['joules']:,.0f}" if r.get("joules") else "",
        str(r.get("largest_batch", "")),
    )


def _mib(size: int | None) -> str:
    return f"{size / 2**20:,.0f}" if size else ""


def gpu_idle(r: Record) -> float | None:
    """The part of an unprofiled step that no kernel covers; None where no GPU was profiled."""
    profile = r.get("profile")
    if not profile or profile["device"] != "cuda":
        return None
    return max(0.0, 1 - profile["busy_ms"] / r["ms"]["median"])


def summary(records: list[Record]) -> str:
    """Every setting in a row: the median ms of each provider, and fastlora's speed against PEFT's default."""
    rows = []
    for key, some in _timed(records):
        ms = {r["provider"]: r["ms"]["median"] for r in some if r.get("ms")}
        best = [min((ms[name] for name in names if name in ms), default=None) for names in _COLUMNS.values()]
        if not any(best[-2:]):  # ways of ours among themselves
            continue
        cells = [f"{one:,.0f}" if one else "" for one in best]
        for ours, theirs in ((-2, 0), (-1, 1)):
            if best[ours]:
                ratio = f" ({best[theirs] / best[ours]:.2f}×)" if best[theirs] else ""
                cells[ours] = f"**{cells[ours]}**{ratio}"
        rows.append((setting(key), *cells))
    if not rows:
        return ""
    head = "**Training steps, ms; in brackets against PEFT with adapters of the same dtype**\n\n"
    return head + table(("", *_COLUMNS), rows)


def plan(records: list[Record]) -> str:
    """Measured over what the planner said before."""
    rows = []
    for key, some in _timed(records):
        for r in some:
            said = r.get("plan")
            if not said or not r.get("ms"):
                continue
            measured = r | {"ms": r["ms"]["median"]}
            cells = [_against(measured.get(n), said.get(n)) for n in ("ms", "peak_bytes", "saved_bytes", "joules")]
            if any(cells):
                rows.append((f"{setting(key)}: {r['title']}", *cells))
    head = ("", "time", "peak memory", "kept for backward", "energy")
    if not rows:
        return ""
    return "**Measured over planned** (`fastlora plan`'s arithmetic for the same batch)\n\n" + table(head, rows)


def _against(measured: float | None, planned: float | None) -> str:
    return f"{measured / planned:.2f}" if measured and planned else ""


def profiles(records: list[Record]) -> str:
    """Where the time goes: milliseconds by kind of kernel of every provider, and the longest kernels of one setting."""
    parts: list[str] = []
    kernels: list[str] = []  # of the largest setting
    for key, some in _timed(records):
        profiled = [r for r in some if r.get("profile")]
        if not profiled:
            continue
        kinds = [profiling.by_kind(r["profile"]["kernels"]) for r in profiled]
        names = [name for name in (*profiling.KINDS, profiling.REST) if any(name in found for found in kinds)]
        rows = [
            (
                r["title"],
                *(f"{found.get(name, 0):,.1f}" for name in names),
                f"{r['profile']['busy_ms']:,.1f}",
                f"{r['ms']['median']:,.1f}",
                f"{r['profile']['launches']:,}",
            )
            for r, found in zip(profiled, kinds, strict=True)
        ]
        device = profiled[0]["profile"]["device"]
        busy, calls = ("GPU busy", "launches") if device == "cuda" else ("profiled step", "operators")
        parts += [f"**Where the time goes, ms: {setting(key)}**", table(("", *names, busy, "step", calls), rows)]
        kernels = kernels or [_kernels(r) for r in profiled if r["provider"] in ("peft", "fastlora")]
    if parts:
        parts += kernels
        parts.append("Low-rank: fastlora's own kernels; products of rank R by a library are among the products.")
    return "\n\n".join(parts)


def _kernels(r: Record) -> str:
    rows = [(f"`{_short(name)}`", f"{n:,}", f"{us / 1e3:,.2f}") for name, n, us in r["profile"]["kernels"][:_TOP]]
    calls = "launches" if r["profile"]["device"] == "cuda" else "calls"
    head = f"{setting(group(r))}, {r['title']}: the {len(rows)} kernels that take the most time"
    return f"{head}\n\n{table(('', calls, 'ms'), rows)}"


def _short(name: str) -> str:
    """A kernel's name without its template arguments."""
    name = re.sub(r"<.*", "", name.removeprefix("void "))
    return name if len(name) <= 60 else f"{name[:28]}…{name[-31:]}"


def parity(records: list[Record]) -> str:
    """How many comparisons of a patched model with float64 are green, and which are not."""
    some = [r for r in records if r["bench"] == "parity"]
    if not some:
        return ""
    red = [r for r in some if r["parity"] is not True]
    rows = [(r["op"], r["dtype"], r["mode"], r["provider"], r["why"]) for r in red]
    text = f"**Patched models against float64**: {len(some) - len(red)} of {len(some)} comparisons are green"
    return text + ("\n\n" + table(("", "dtype", "", "", "why"), rows) if rows else "")


def setting(key: Key) -> str:
    """A setting in words."""
    _, model, shape, dtype, mode = key
    B, T, layers, rank = (re.search(rf"\b{n}=(\d+)", shape).group(1) for n in ("B", "T", "layers", "r"))
    return f"{model} ({layers} layers), {B}×{T} tokens, {dtype}, r={rank}" + (f", {mode}" if mode else "")


def refused(some: list[Record]) -> str:
    """Who could not run, and why."""
    return "; ".join(f"{r.get('title') or r['provider']}: {r['why']}" for r in some if r.get("why"))
