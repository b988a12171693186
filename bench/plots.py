"""Plots of the results: bars with whiskers, memory against tokens, and the roofline."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from . import profiling
from .record import Record, group

# One colour per provider in every plot; ours stands out, variants of one provider share a hue.
_COLOURS = {
    "fastlora": "#d1495b", "fastlora-bf16": "#e58f9b",
    "peft": "#30638e", "peft-bf16": "#6f9fc8", "eager": "#30638e",
    "peft-compile": "#3c887e", "peft-compile-layers": "#5fb3a7", "peft-bf16-compile": "#8fcfc5",
    "peft-bf16-compile-layers": "#b9e2db", "torch.compile": "#3c887e",
    "liger": "#8d6a9f", "liger-bf16": "#b79cc4",
}  # fmt: skip
_OTHERS = "#9a9a9a"
_MODES = {"forward": "forward", "full": "forward and backward"}


def colour(provider: str) -> str:
    return _COLOURS.get(provider) or (_COLOURS["fastlora"] if provider.startswith("fastlora") else _OTHERS)


def draw(folder: Path, records: list[Record]) -> dict[str, str]:
    """Draw what there is data for; the file name of each plot by its kind."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = {}
    for kind, plot in _PLOTS.items():
        figure = plot(records)
        if figure is not None:
            figure.savefig(folder / f"{kind}.png", dpi=110, bbox_inches="tight")
            matplotlib.pyplot.close(figure)
            drawn[kind] = f"{kind}.png"
    return drawn


def _timed(records: list[Record], bench: str) -> dict[tuple[str, ...], list[Record]]:
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for r in records:
        if r["bench"] == bench and r.get("ms"):
            groups[group(r)].append(r)
    return groups


def _panels(n: int, height: float, columns: int = 2, width: float = 5.4):
    import matplotlib.pyplot as plt

    columns = min(columns, n)
    rows = -(-n // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for axis in axes.flat[n:]:
        axis.set_visible(False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat[:n])


def _bars(axis, some: list[Record], values, errors, title: str, label: str) -> None:
    y = range(len(some))
    axis.barh(y, values, xerr=errors, color=[colour(r["provider"]) for r in some], error_kw={"capsize": 3, "lw": 1})
    axis.set_yticks(y, [r["provider"] for r in some])
    axis.invert_yaxis()
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(label, fontsize=9)
    axis.set_xlim(0, 1.18 * max(v + e for v, e in zip(values, errors[1], strict=True)))


def _train_step(records: list[Record]):
    groups = _timed(records, "train_step")
    if not groups:
        return None
    figure, axes = _panels(len(groups), 0.9 + 0.33 * max(map(len, groups.values())))
    for axis, (key, some) in zip(axes, groups.items(), strict=True):
        some = sorted(some, key=lambda r: r["tokens_per_s"])
        values = [r["tokens_per_s"] for r in some]
        # Tokens per second at the p20 and p80 of the time.
        low = [v - v * r["ms"]["median"] / r["ms"]["p80"] for v, r in zip(values, some, strict=True)]
        high = [v * r["ms"]["median"] / r["ms"]["p20"] - v for v, r in zip(values, some, strict=True)]
        _bars(axis, some, values, [low, high], _step_title(key, some[0]), "tokens per second")
        slowest = next((r["tokens_per_s"] for r in some if r["provider"] == "peft"), None)
        for i, (value, top) in enumerate(zip(values, high, strict=True)):
            if slowest:
                axis.annotate(f" {value / slowest:.2f}×", (value + top, i), va="center", fontsize=8)
    figure.tight_layout()
    return figure


def _memory(records: list[Record]):
    """Peak bytes against tokens, for each model and dtype measured at two token counts or more."""
    lines: dict[tuple[str, str], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in records:
        # Rows of one sequence length only: a longer sequence is another curve.
        if r["bench"] == "train_step" and r.get("peak_bytes") and not r["mode"]:
            shape = r["shape"]
            where = (f"{r['op']}, sequences of {shape['T']}", r["dtype"])
            lines[where][r["provider"]][shape["B"] * shape["T"]] = r["peak_bytes"] / 2**20
    lines = {k: v for k, v in lines.items() if max(len(points) for points in v.values()) > 1}
    if not lines:
        return None
    figure, axes = _panels(len(lines), 3.4)
    for axis, ((model, dtype), providers) in zip(axes, lines.items(), strict=True):
        for provider, points in providers.items():
            x = sorted(points)
            axis.plot(x, [points[t] for t in x], "o-", color=colour(provider), label=provider, lw=1.6, ms=4)
        axis.set(xlabel="tokens in a step", xlim=(0, None), ylim=(0, None))
        axis.set_ylabel("peak MiB above the loaded model")
        axis.set_title(f"{model}, {dtype}", fontsize=10, loc="left")
        axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return figure


def _profile(records: list[Record]):
    """A bar of each profiled step, by kind of kernel, and the time in which no kernel runs."""
    groups = {key: [r for r in some if r.get("profile")] for key, some in _timed(records, "train_step").items()}
    groups = {key: some for key, some in groups.items() if some}
    if not groups:
        return None
    from matplotlib.patches import Patch

    names = [*profiling.KINDS, profiling.REST]
    shades = dict(
        zip(names, ("#3c887e", "#e0a458", "#9a9a9a", "#d1495b", "#30638e", "#8d6a9f", "#c9b79c"), strict=True)
    )
    most = max(map(len, groups.values()))
    figure, axes = _panels(len(groups), 0.9 + 0.36 * most)
    for axis, (key, some) in zip(axes, groups.items(), strict=True):
        for i, r in enumerate(some):
            left = 0.0
            for name, ms in profiling.by_kind(r["profile"]["kernels"]).items():
                axis.barh(i, ms, left=left, color=shades[name])
                left += ms
            if (idle := r["ms"]["median"] - left) > 0 and r["profile"]["device"] == "cuda":
                axis.barh(i, idle, left=left, color="white", edgecolor=_OTHERS, hatch="///", lw=0.5)
        axis.set_yticks(range(len(some)), [r["provider"] for r in some])
        axis.set_ylim(most - 0.5, -0.5)
        axis.set_title(_step_title(key, some[0]), fontsize=10, loc="left")
        axis.set_xlabel("ms of a step", fontsize=9)
    used = {name for some in groups.values() for r in some for name in profiling.by_kind(r["profile"]["kernels"])}
    keys = [Patch(color=shades[name], label=name) for name in names if name in used]
    if any(r["profile"]["device"] == "cuda" for some in groups.values() for r in some):
        keys.append(Patch(facecolor="white", edgecolor=_OTHERS, hatch="///", label="no kernel runs"))
    figure.tight_layout()
    figure.legend(handles=keys, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, fontsize=8, frameon=False)
    return figure


def _step_title(key: tuple[str, ...], r: Record) -> str:
    shape = r["shape"]
    return f"{key[1]}, {shape['layers']} layers, {shape['B']}×{shape['T']}, r={shape['r']}, {key[3]} {key[4]}".rstrip()


def _best(r: Record) -> float:
    return min(r["ms"]["median"], (r.get("graph_ms") or r["ms"])["median"])


def _ops(records: list[Record]):
    """The widest mode of every op at its largest shape."""
    last = {}
    for key, some in _timed(records, "op").items():
        if key[4] not in _MODES:  # the code of another architecture
            continue
        if len(some) > 1 and (key[4] == "full" or (key[1].startswith("lora_") and key[1] != "lora_linear")):
            last[key[1], key[3]] = key, some
    if not last:
        return None
    figure, axes = _panels(len(last), 1.0 + 0.26 * max(len(some) for _, some in last.values()), columns=3, width=4.6)
    for axis, (key, some) in zip(axes, last.values(), strict=True):
        field = "graph_ms" if all(r.get("graph_ms") for r in some) else "ms"
        values = [r[field]["median"] for r in some]
        errors = [
            [r[field]["median"] - r[field]["p20"] for r in some],
            [r[field]["p80"] - r[field]["median"] for r in some],
        ]
        shape = re.sub(r"(kv_)?heads", lambda m: "Hk" if m.group(1) else "Hq", key[2])
        _bars(
            axis,
            some,
            values,
            errors,
            f"{key[1]}, {key[3]}\n{shape}",
            f"{'CUDA graph ms' if field == 'graph_ms' else 'ms'}, {_MODES[key[4]]}",
        )
        axis.axvline(some[0]["floor_ms"], color="black", lw=1, ls="--")
    figure.suptitle("dashed: the floor, from measured copy bandwidth and matrix product rate", fontsize=9)
    figure.tight_layout()
    return figure


def _roofline(records: list[Record]):
    timed = [r for r in records if r["bench"] == "op" and r["mode"] in _MODES and r.get("ms")]
    some = [r for r in timed if r.get("bytes") and r.get("flops")]
    shown = [r for r in some if r["provider"].startswith("fastlora") or r["provider"] in ("eager", "torch.compile")]
    if not shown:
        return None
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.2, 4.6))
    markers = dict(zip(dict.fromkeys(r["op"] for r in shown), "os^DvPX*<>hdp8H" * 2, strict=False))
    for r in shown:
        axis.loglog(
            r["flops"] / r["bytes"], r["flops"] / _best(r) / 1e6, markers[r["op"]], color=colour(r["provider"]),
            mec="none", ms=7, alpha=0.6,
        )  # fmt: skip
    for i, (dtype, top) in enumerate({r["dtype"]: r["ceilings"] for r in some}.items()):
        low, high = 0.1, 3e4 if top["flops"] > 1e13 else 3e3
        ridge = top["flops"] / top["bandwidth"]
        axis.loglog(
            [low, ridge, high], [top["bandwidth"] * low / 1e9, top["flops"] / 1e9, top["flops"] / 1e9],
            color="black", lw=1.2, ls=("-", "--", ":")[i % 3], label=f"measured ceiling, {dtype}",
        )  # fmt: skip
    for op, marker in markers.items():
        axis.plot([], [], marker, color=_OTHERS, label=op)
    for provider in dict.fromkeys(r["provider"] for r in shown):
        axis.plot([], [], "o", color=colour(provider), label=provider)
    axis.set_xlabel("FLOP per byte that must move")
    axis.set_ylabel("GFLOP/s")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


_PLOTS = {"train_step": _train_step, "memory": _memory, "profile": _profile, "ops": _ops, "roofline": _roofline}
