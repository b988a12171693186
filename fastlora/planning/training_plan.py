"""``fastlora.plan``: will it fit, how fast, how many GPU hours, kilowatt hours and kilograms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import energy, policies, roofline
from .activations import KEEP, LAYER, MLP, Adapters, peft_saved, recomputed_flops, saved
from .cluster import BITS, ENGINES, Cluster
from .gpus import GPU, Rate, gpu_of, with_measured
from .policies import StepBytes
from .shapes import PROJECTIONS, Shape, shape_of
from .step import step_bytes

# The CUDA context, and the allocator's fragments and libraries' workspaces: a twentieth of the memory.
_CONTEXT, _RESERVE = 0.6e9, 0.05
MEMORY = ("auto", "fast", "lean")


@dataclass(frozen=True)
class TrainingPlan:
    """What a LoRA fine-tuning takes: the answer of ``plan``. ``print(plan)`` says it in a line.

    Attributes:
        fits: whether one sequence fits each GPU; where not, memory_gb is what it would need, and times are None.
        policy: what layers recompute, in words; ``layers`` counts them by "keep", "mlp" and "layer".
        micro_batch_tokens: per GPU and step, the fastest that fits.
        largest_micro_batch_tokens: the most that fits, with every layer checkpointed.
        tokens_per_s: all GPUs together.
        memory_gb: parts and total of the fullest moment of a step on each GPU, in 10⁹ bytes, and the GPU's "capacity".
        seconds: of one step of one micro-batch, by kind of work.
        provenance: of every rate the times rest on: value, unit, label ("measured" or "modelled"), source.
        peft: the same for PEFT's default, fp32 adapters on transformers' own layers, at its fastest; None in itself.
    """

    shape: Shape
    gpu: str
    gpus: int
    engine: str
    quant: str | None
    rank: int
    seq: int
    tokens: int
    fits: bool
    policy: str
    layers: dict[str, int]
    micro_batch_tokens: int
    largest_micro_batch_tokens: int
    tokens_per_s: float | None
    hours: float | None
    gpu_hours: float | None
    kwh: float | None
    kg_co2eq: float | None
    memory_gb: dict[str, float]
    seconds: dict[str, float]
    assumptions: dict[str, Any]
    provenance: dict[str, Rate] = field(default_factory=dict)
    peft: TrainingPlan | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        where = f"{self.gpus} × {self.gpu}, {self.engine}"
        if not self.fits:
            return (
                f"{where}: does not fit, needs {self.memory_gb['total']:.1f} GB of {self.memory_gb['capacity']:.1f} GB"
            )
        labels = " and ".join(sorted({rate.label for rate in self.provenance.values()}))
        return (
            f"{where}: {self.micro_batch_tokens} tokens per GPU and step, {self.policy}; {self.tokens_per_s:,.0f}"
            f" tokens/s, {self.gpu_hours:,.1f} GPU hours, {self.kwh:,.1f} kWh, {self.kg_co2eq:,.1f} kg CO2eq"
        ) + (f" (rates {labels})" if labels else "")


def plan(
    config: Any,
    tokens: int,
    gpu: str = "a100-80gb",
    *,
    gpus: int = 1,
    engine: str | None = None,
    rank: int = 16,
    targets: Iterable[str] = PROJECTIONS,
    dropout: float = 0.0,
    seq: int = 4096,
    quant: str | None = None,
    memory: str = "auto",
    micro_batch: int | None = None,
    watts: float | None = None,
    intensity: float = energy.INTENSITY,
    pue: float = energy.PUE,
    measured: str | Path | None = None,
) -> TrainingPlan:
    """Plan a LoRA fine-tuning before renting the GPUs. Computes; needs no GPU and loads no model.

    Memory is counted tensor by tensor; time is every kind of work over the rate it reaches, each rate with its
    provenance. bf16, AdamW, sequences of full length, one optimizer step per micro-batch.

    Args:
        config: "7b", "13b", "34b", "70b", a config.json or a directory with one, or a Hugging Face config.
        tokens: to train on, all epochs together.
        gpu: a100-80gb, a100-40gb, h100-80gb, h200-141gb, or auto for the one in this machine.
        gpus: how many.
        engine: single, ddp, zero2, fsdp2 or zero3; by default single on one GPU, on several ddp, or
            fsdp2 where ddp does not fit or is a twentieth slower.
        rank, targets, dropout: of LoRA.
        seq: tokens of one sequence.
        quant: "nf4" for 4-bit projections with double quantisation, None for bf16.
        memory: "auto": the least recomputation that fits; "fast": none; "lean": every layer checkpointed.
        micro_batch: sequences per GPU and step; by default the fastest that fits.
        watts: per GPU; by default its design limit.
        intensity: kg of CO2eq per kWh.
        pue: power usage effectiveness of the data centre.
        measured: results of ``python -m bench`` on this GPU, whose rates replace the modelled ones.

    Raises:
        ValueError: an unknown name, or a number out of range, by the name of the argument.
    """
    shape, card = shape_of(config), gpu_of(gpu)
    if measured is not None:
        card = with_measured(card, measured)
    adapters = Adapters.uniform(rank, _checked(targets, "targets", PROJECTIONS), dropout)
    _positive(tokens=tokens, gpus=gpus, rank=rank, seq=seq, intensity=intensity, watts=watts, micro_batch=micro_batch)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, needs a probability from 0 to less than 1")
    if pue < 1:
        raise ValueError(f"pue is {pue}, needs at least 1")
    if quant not in (None, *BITS):
        raise ValueError(f"quant is {quant!r}, needs 'nf4' or None")
    _checked([memory], "memory", MEMORY)
    job = _Job(shape, card, adapters, rank, seq, tokens, memory, micro_batch, watts or card.watts, intensity, pue)
    clusters = [Cluster(shape, adapters, gpus, one, quant) for one in _engines(engine, gpus)]
    ours, theirs = (_best([job.run(cluster, fused) for cluster in clusters]) for fused in (True, False))
    return TrainingPlan(**ours, provenance=dict(card.rates), peft=TrainingPlan(**theirs))


def _checked(names: Iterable[str], argument: str, known: Iterable[str]) -> tuple[str, ...]:
    chosen = tuple(names)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"{argument} has {unknown}, needs names among {', '.join(known)}")
    if not chosen:
        raise ValueError(f"{argument} is empty, needs names among {', '.join(known)}")
    return chosen


def _positive(**numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise ValueError(f"{name} is {number}, needs more than 0")


def _engines(engine: str | None, gpus: int) -> tuple[str, ...]:
    if engine is None:
        return ("ddp", "fsdp2") if gpus > 1 else ("single",)
    _checked([engine], "engine", ENGINES)
    if (engine == "single") != (gpus == 1):
        raise ValueError(f"engine is {engine!r} and gpus is {gpus}: 'single' goes with one, the others with several")
    return (engine,)


def _best(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The first that fits, unless another is a twentieth faster; where none fits, the one that lacks least."""
    fits = [one for one in found if one["fits"]]
    if not fits:
        return min(found, key=lambda one: one["memory_gb"]["total"])
    fastest = max(one["tokens_per_s"] for one in fits)
    return next(one for one in fits if one["tokens_per_s"] * 1.05 >= fastest)


@dataclass(frozen=True)
class _Job:
    shape: Shape
    gpu: GPU
    adapters: Adapters
    rank: int
    seq: int
    tokens: int
    memory: str
    micro_batch: int | None
    watts: float
    intensity: float
    pue: float

    def run(self, cluster: Cluster, fused: bool) -> dict[str, Any]:
        """The fields of a TrainingPlan: the fastest micro-batch that fits, or what one sequence would need."""
        resident = cluster.resident() | {"context and reserve": _CONTEXT + _RESERVE * self.gpu.memory}
        budget = self.gpu.memory - sum(resident.values())
        best: tuple[float, int, tuple[str, ...], dict[str, float]] | None = None
        for sequences in self._candidates():
            need = self._need(sequences, fused)
            chosen = self._choose(need, budget, fused)
            if chosen is None:
                break
            times = self._seconds(cluster, sequences, chosen, fused)
            speed = sequences * self.seq * cluster.gpus / sum(times.values())
            if best is None or speed > best[0]:
                best = speed, sequences, chosen, times
        sequences = best[1] if best else self.micro_batch or 1
        fallback = (KEEP if self.memory == "fast" else LAYER,) * self.shape.layers
        chosen, times = best[2:] if best else (fallback, {})
        rate = best[0] if best else None
        hours = None if rate is None else self.tokens / rate / 3600
        used = None if hours is None else hours * cluster.gpus
        spent = None if used is None else energy.kwh(used, self.watts, self.pue)
        return {
            "shape": self.shape, "gpu": self.gpu.name, "gpus": cluster.gpus, "engine": cluster.engine,
            "quant": cluster.quant, "rank": self.rank, "seq": self.seq, "tokens": self.tokens, "fits": best is not None,
            "policy": _words(chosen), "layers": policies.counts(chosen),
            "micro_batch_tokens": sequences * self.seq if best else 0,
            "largest_micro_batch_tokens": self._largest(budget, fused) * self.seq,
            "tokens_per_s": rate, "hours": hours, "gpu_hours": used, "kwh": spent,
            "kg_co2eq": None if spent is None else energy.kg_co2eq(spent, self.intensity),
            "memory_gb": self._memory(resident, sequences, chosen, fused), "seconds": times,
            "assumptions": {
                "watts": self.watts, "intensity_kg_per_kwh": self.intensity, "pue": self.pue,
                "targets": [name for name, _ in self.adapters.ranks], "dropout": self.adapters.dropout,
                "code": "fastlora" if fused else "transformers and PEFT, fp32 adapters under autocast",
                "notes": _notes(cluster) if fused else [],
            },
        }  # fmt: skip

    def _candidates(self) -> Iterator[int]:
        """Sequences per micro-batch to try: each up to 32, then in steps of a sixteenth, while tokens last."""
        if self.micro_batch:
            yield self.micro_batch
            return
        sequences, most = 1, max(1, min(self.tokens, 2**20) // self.seq)
        while sequences <= most:
            yield sequences
            sequences += max(1, sequences // 16 if sequences >= 32 else 1)

    def _need(self, sequences: int, fused: bool) -> StepBytes:
        return step_bytes(self.shape, self.adapters, sequences * self.seq, self.seq, fused=fused, fused_loss=fused)

    def _choose(self, need: StepBytes, budget: float, fused: bool) -> tuple[str, ...] | None:
        layers = self.shape.layers
        if self.memory == "fast":
            return (KEEP,) * layers if need.peak(layers, 0, 0) <= budget else None
        if fused and self.memory == "auto":
            costs = {p: recomputed_flops(self.shape, self.adapters, p, self.seq) for p in (MLP, LAYER)}
            return policies.least(layers, need, budget, costs)
        # PEFT's own choice is all or nothing.
        for chosen in (KEEP, LAYER) if self.memory == "auto" else (LAYER,):
            if need.peak(layers, 0, layers if chosen == LAYER else 0) <= budget:
                return (chosen,) * layers
        return None

    def _largest(self, budget: float, fused: bool) -> int:
        need, layers = self._need(1, fused), self.shape.layers
        if need.peak(layers, 0, layers) > budget:
            return 0
        low, high = 1, 2
        while self._need(high, fused).peak(layers, 0, layers) <= budget:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._need(middle, fused).peak(layers, 0, layers) <= budget
            low, high = (middle, high) if fits else (low, middle)
        return low

    def _seconds(self, cluster: Cluster, sequences: int, chosen: tuple[str, ...], fused: bool) -> dict[str, float]:
        return roofline.seconds(
            self.shape, self.adapters, self.gpu, tokens=sequences * self.seq, sequence=self.seq,
            layers=policies.counts(chosen), fused=fused, quantised=cluster.quant is not None,
            gathered=cluster.gathered(), updated=cluster.updated(), reduced=cluster.reduced(),
        )  # fmt: skip

    def _memory(
        self, resident: dict[str, float], sequences: int, chosen: tuple[str, ...], fused: bool
    ) -> dict[str, float]:
        """Parts and total, in GB, of the fullest moment: of the loss, or of the backward of the last layer."""
        tokens, kinds = sequences * self.seq, saved if fused else peft_saved
        need, parts = self._need(sequences, fused), dict(resident)
        for policy, n in policies.counts(chosen).items():
            for kind, size in kinds(self.shape, self.adapters, policy).items():
                if n:
                    parts[f"saved: {kind}"] = parts.get(f"saved: {kind}", 0.0) + n * tokens * size
            rest = need.saved[policy] - tokens * sum(kinds(self.shape, self.adapters, policy).values())
            if n and rest > 0:
                parts["saved: copies of adapters"] = n * rest
        again, work = need.saved[KEEP] - need.saved[chosen[-1]], need.work + need.outside
        if need.loss >= again + work:
            parts["loss chunk" if fused else "logits"] = need.loss
        else:
            parts |= {"recomputed layer": again, "workspace": work}
        in_gb = {kind: size / 1e9 for kind, size in parts.items() if size}
        return in_gb | {"total": sum(in_gb.values()), "capacity": self.gpu.memory / 1e9}


def _notes(cluster: Cluster) -> list[str]:
    """What a plan takes for granted that explain(model) has to confirm."""
    notes = []
    if cluster.quant:
        notes.append("4-bit projections are taken to run fused; explain(model) says what does")
    if cluster.engine in ("fsdp2", "zero3"):
        notes.append(f"layers sharded by {cluster.engine} are taken to run fused; explain(model) says what does")
    return notes


def _words(chosen: tuple[str, ...]) -> str:
    n, counts = len(chosen), policies.counts(chosen)
    said = {KEEP: "no recomputation", MLP: "MLP recomputation", LAYER: "full checkpointing"}
    if whole := [policy for policy, count in counts.items() if count == n]:
        return said[whole[0]]
    return ", ".join(f"{said[policy]} in {counts[policy]} of {n} layers" for policy in (MLP, LAYER) if counts[policy])
