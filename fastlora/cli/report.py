"""The report and the loss plots of a run."""

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fastlora

from .files import whole_file

Curve = Sequence[Mapping[str, float]]


def versions() -> dict[str, str | None]:
    """The installed versions of what the numbers depend on; None where a package is absent."""
    found: dict[str, str | None] = {"fastlora": fastlora.__version__}
    for name in ("torch", "triton", "transformers", "peft", "trl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def loss_curve(log_history: Sequence[Mapping[str, float]]) -> list[dict[str, float | int | None]]:
    """Step and loss out of a trainer's log. A loss that is not finite is None: JSON has no NaN."""
    return [
        {"step": int(entry["step"]), "loss": entry["loss"] if math.isfinite(entry["loss"]) else None}
        for entry in log_history
        if "loss" in entry
    ]


def plot_loss(curve: Curve, path: Path) -> None:
    """The loss by step, as a PNG."""
    figure, (axes,) = _figure([1])
    _draw(axes, curve, "loss")
    axes.set_xlabel("step")
    _save(figure, path)


def plot_comparison(curves: Mapping[str, Curve], reference: str, ours: str, path: Path) -> None:
    """Two of the loss curves in one panel; below, how far every other curve is from ``reference``."""
    figure, (above, below) = _figure([3, 1.6])
    _draw(above, curves[reference], reference, linewidth=3, alpha=0.45)
    _draw(above, curves[ours], ours, linewidth=1.2, color="black")
    above.legend(frameon=False)
    for name in [*(name for name in curves if name not in (reference, ours)), ours]:
        steps, distances = zip(*loss_differences(curves[reference], curves[name]), strict=True)
        style = {"color": "black"} if name == ours else {}
        below.plot(steps, distances, label=f"{name} − {reference}", linewidth=1, **style)
    below.axhline(0, color="grey", linewidth=0.5)
    below.set_ylabel("difference")
    below.set_xlabel("step")
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    below.legend(frameon=False, fontsize=7)
    _save(figure, path)


def loss_differences(reference: Curve, other: Curve) -> list[tuple[int, float]]:
    """(step, other - reference) at the steps both curves have."""
    by_step = {point["step"]: point["loss"] for point in reference}
    return [(int(p["step"]), p["loss"] - by_step[p["step"]]) for p in other if p["step"] in by_step]


def _figure(heights: Sequence[float]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.6 + 0.9 * sum(heights)), dpi=150, layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights))
    for panel in axes[:, 0]:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes[:, 0]


def _draw(axes, curve: Curve, label: str, **style) -> None:
    axes.plot([p["step"] for p in curve], [p["loss"] for p in curve], label=label, **style)
    axes.set_ylabel("loss")


def _save(figure, path: Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")
