"""`fastlora plan`: the table, the plot and the JSON of a TrainingPlan."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastlora.planning import SHAPES, TrainingPlan, plan

from .errors import CommandError, first_line
from .files import whole_file

_WORDS = {"K": 10**3, "M": 10**6, "B": 10**9}


def count(text: str) -> int:
    """A number of tokens: 1000000, 1e6, 1M or 1B."""
    number, unit = (text[:-1], _WORDS[text[-1].upper()]) if text[-1:].upper() in _WORDS else (text, 1)
    try:
        return int(float(number.replace(",", "")) * unit)
    except (ValueError, OverflowError):
        raise CommandError(f"--tokens {text}: needs a number such as 1000000, 1e6, 1M or 1B") from None


def make(model: str, tokens: str, gpu: str, **options: Any) -> TrainingPlan:
    """The plan; `model` may also be a Hugging Face id."""
    config: Any = model
    if model.lower() not in SHAPES and not Path(model).exists():
        from .models import load_config

        config = load_config(model)
    try:
        return plan(config, count(tokens), gpu, **options)
    except ValueError as error:
        raise CommandError(first_line(error)) from None


def show(made: TrainingPlan, console: Console) -> None:
    """Print it as tables: fastlora beside PEFT's default."""
    theirs = made.peft
    assert theirs is not None
    both = (made, theirs)
    console.print(
        f"{made.tokens:,} tokens in sequences of {made.seq}, rank {made.rank}, {made.quant or 'bf16'} base, on"
        f" {made.gpus} × {made.gpu}"
    )
    table = Table("", "fastlora", "PEFT default", title="run", title_justify="left")
    for name, tell in _ROWS:
        table.add_row(name, *(tell(one) if one.fits or name in _ALWAYS else "—" for one in both))
    console.print(table)
    memory = Table("GB per GPU, fullest moment", "fastlora", "PEFT default", title="memory", title_justify="left")
    kinds = [kind for kind in dict.fromkeys([*made.memory_gb, *theirs.memory_gb]) if kind not in ("total", "capacity")]
    for kind in [*kinds, "total", "capacity"]:
        memory.add_row(kind, *(_gb(one.memory_gb.get(kind)) for one in both))
    for column in memory.columns[1:]:
        column.justify = "right"
    console.print(memory)
    if made.fits or theirs.fits:
        times = Table("ms per 1000 tokens and GPU", "fastlora", "PEFT default", title="time", title_justify="left")
        for kind in dict.fromkeys([*made.seconds, *theirs.seconds]):
            times.add_row(kind, *(_ms(one, kind) for one in both))
        for column in times.columns[1:]:
            column.justify = "right"
        console.print(times)
    rates = Table("rate", "reaches", "", "from", title="rates", title_justify="left")
    for name, rate in made.provenance.items():
        rates.add_row(name, f"{rate.value / 1e12:g} T{rate.unit}", rate.label, rate.source)
    console.print(rates)
    assumed = made.assumptions
    console.print(
        f"{assumed['watts']:g} W per GPU, {assumed['intensity_kg_per_kwh']:g} kg CO2eq per kWh, PUE {assumed['pue']:g}."
        " Counted, not measured: memory. Host time and gaps between kernels are left out."
    )
    for note in assumed["notes"]:
        console.print(f"Note: {note}.")


_ALWAYS = ("engine", "policy", "largest micro-batch")
_ROWS = (
    ("engine", lambda one: one.engine),
    ("policy", lambda one: one.policy if one.fits else "does not fit"),
    ("micro-batch", lambda one: f"{one.micro_batch_tokens:,} tokens per GPU"),
    ("largest micro-batch", lambda one: f"{one.largest_micro_batch_tokens:,} tokens per GPU"),
    ("tokens/s", lambda one: f"{one.tokens_per_s:,.0f}"),
    ("hours", lambda one: f"{one.hours:,.1f}"),
    ("GPU hours", lambda one: f"{one.gpu_hours:,.1f}"),
    ("kWh", lambda one: f"{one.kwh:,.1f}"),
    ("kg CO2eq", lambda one: f"{one.kg_co2eq:,.1f}"),
)


def _gb(size: float | None) -> str:
    return "" if size is None else f"{size:,.2f}"


def _ms(one: TrainingPlan, kind: str) -> str:
    if kind not in one.seconds:
        return ""
    return f"{1e6 * one.seconds[kind] / one.micro_batch_tokens:,.2f}"


def to_json(made: TrainingPlan) -> str:
    """One JSON object."""
    return json.dumps(made.to_dict(), indent=2)


def plot(made: TrainingPlan, path: Path) -> None:
    """Stacked bars as a PNG: memory per GPU against what there is, and time per 1000 tokens, beside PEFT's default."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    assert made.peft is not None
    runs = {"fastlora": made, "PEFT default": made.peft}
    figure = Figure(figsize=(10.5, 5), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2)
    memory = [{k: v for k, v in one.memory_gb.items() if k not in ("total", "capacity")} for one in runs.values()]
    times = [
        {kind: 1e6 * s / one.micro_batch_tokens for kind, s in one.seconds.items()} if one.fits else {}
        for one in runs.values()
    ]
    for axes, stacks, unit in zip(panels, (memory, times), ("GB per GPU", "ms per 1000 tokens and GPU"), strict=True):
        kinds = list(dict.fromkeys(kind for stack in stacks for kind in stack))
        bottom = [0.0, 0.0]
        for i, kind in enumerate(kinds):
            heights = [stack.get(kind, 0.0) for stack in stacks]
            axes.bar(list(runs), heights, 0.55, bottom=bottom, label=kind, color=colormaps["tab20"](i % 20))
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.set_ylabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            handles[::-1], labels[::-1], frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5)
        )
    capacity = made.memory_gb["capacity"]
    panels[0].axhline(capacity, color="black", linewidth=1, linestyle="--")
    panels[0].annotate(
        f"{made.gpu}: {capacity:.1f} GB", (0.5, capacity), xytext=(0, 4), textcoords="offset points",
        ha="center", fontsize=8,
    )  # fmt: skip
    steps = [f"{one.micro_batch_tokens:,} tokens per step" if one.fits else "does not fit" for one in runs.values()]
    rates = [f"{one.tokens_per_s:,.0f} tokens/s" if one.fits else "does not fit" for one in runs.values()]
    again = [f"recomputes in {sum(one.layers.values()) - one.layers['keep']} layers" for one in runs.values()]
    panels[0].set_xticks([0, 1], ["\n".join(lines) for lines in zip(runs, steps, again, strict=True)])
    panels[1].set_xticks([0, 1], ["\n".join(lines) for lines in zip(runs, rates, strict=True)])
    labels = sorted({rate.label for rate in made.provenance.values()})
    layers, seq, base = made.shape.layers, made.seq, made.quant or "bf16"
    figure.suptitle(
        f"{layers} layers of width {made.shape.hidden}, {base}, rank {made.rank}, sequences of {seq},"
        f" {made.gpus} × {made.gpu}, {made.engine}. Memory counted; rates {' and '.join(labels)}.",
        fontsize=9,
    )
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")
