"""Training steps of every provider: gated, timed alone at once, then timed in turns.

A provider is timed alone as soon as it is green, so that a run that is cut off keeps what it has: that record is
"provisional". When all are gated they take turns, and the record of that takes its place. Profiles come last: what
torch.profiler leaves behind slows the launches of everybody down.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastlora.cli.energy import EnergyMeter
from fastlora.kernels import _tiles

from . import machine, memory, models, prediction, profiling, record
from .gate import Red
from .harness import SavedBytes, interleave
from .providers import environment
from .record import Record
from .setting import Batch, Setting, batch, work
from .step_providers import PROVIDERS, StepProvider
from .training import Gate, Trainee

# What is judged in float64 where the timed model has more: layers, weights, and tokens.
_FEW_LAYERS, _FEW_WEIGHTS = {"cpu": 8, "cuda": 4}, 2e9
_FEW_TOKENS = {"cpu": 2048, "cuda": 4096}
# Seconds alone below which the GPU's energy counter, which moves about ten times a second, says little.
_ENERGY_SECONDS = 1.0


def measure(
    setting: Setting,
    names: tuple[str, ...],
    seconds: float,
    ceilings: machine.Ceilings,
    rounds: int = 3,
    profile: bool = False,
) -> Iterator[Record]:
    """Gate every provider, time it alone, then all green ones in turns.

    Args:
        names: the providers, in the order in which they are listed in step_providers.py.
        seconds: timing of each setting: of the turns, all providers together; a quarter as much again alone, and on a
            GPU a second of each at least.
        rounds: turns of each provider at least.
        profile: put one step of each under torch.profiler.
    """
    base = setting.base_model()
    judged = _judged(setting)
    gate = Gate(judged, base if judged == setting else judged.base_model())
    made = batch(setting)
    floor = _floor_thunk(base, setting)
    floor_ms = record.spread(interleave({"floor": floor}, setting.device, 0, least=1)["floor"])["median"]
    green: dict[str, tuple[Trainee, Record]] = {}
    for provider in PROVIDERS:
        if provider.name not in names:
            continue
        line = setting.record() | {"provider": provider.name, "title": provider.title}
        if why := provider.why_not(setting.device, setting.dtype):
            yield line | {"parity": None, "why": why}
            continue
        refused: Record | None = None
        trainee = None
        alone = max(seconds / 4 / len(names), _ENERGY_SECONDS if setting.device == "cuda" else 0.0)
        try:
            trainee = Trainee(provider, gate.base, judged)
            line |= {"gate": gate.check(trainee), "parity": True}
            if judged != setting:
                trainee = Trainee(provider, base, setting)
            line |= _alone(trainee, made, alone)
        except Red as error:
            refused = {"parity": False, "why": f"parity is red: {error}"}
            if setting.device == "cuda":  # to find out why; no table shows it
                refused["red_ms"] = _speed_of_what_is_red(provider, base, setting, made, alone)
        except torch.OutOfMemoryError:
            refused = {"why": "out of memory"}
        except Exception as error:  # a provider that cannot run says why, and the others run on
            refused = {"parity": None, "why": f"{type(error).__name__}: {str(error).strip()[:200]}"}
        if refused:
            del trainee
            free_memory(setting.device)
            yield line | refused
            continue
        if "fastlora" in provider.name:
            line |= _what_ran(trainee)
        yield _rated(line | {"provisional": True}, made, setting, ceilings, floor_ms)
        line |= _beside(trainee, made)
        green[provider.name] = trainee, line
    del gate
    free_memory(setting.device)
    thunks: dict[str, Callable[[], Any]] = {name: lambda t=t: t.step(made) for name, (t, _) in green.items()}
    times = interleave(thunks | {"floor": floor}, setting.device, seconds, least=rounds, warm=0)
    floor_ms = record.spread(times["floor"])["median"]
    final = {
        name: _rated(line | {"ms": record.spread(times[name])}, made, setting, ceilings, floor_ms)
        for name, (_, line) in green.items()
    }
    yield from final.values()
    # Once more with its profile: what fails or hangs in the profiler must not cost the times.
    for name, line in final.items() if profile else ():
        try:
            yield line | {"profile": profiling.profile(thunks[name], setting.device)}
        except Exception as error:
            yield line | {"no_profile": f"{type(error).__name__}: {str(error).strip()[:200]}"}


def free_memory(device: str) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _alone(trainee: Trainee, made: Batch, seconds: float) -> Record:
    """A warm step, then steps one after the other: their times and joules."""
    device = trainee.setting.device
    trainee.step(made)
    machine.synchronize(device)
    meter, times = EnergyMeter(), []
    start = time.perf_counter()
    while not times or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        trainee.step(made)
        machine.synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))
    kwh = meter.kwh() if time.perf_counter() - start >= _ENERGY_SECONDS else None
    return {"ms": record.spread(times), "joules": None if kwh is None else round(kwh * 3.6e6 / len(times), 2)}


def _speed_of_what_is_red(
    provider: StepProvider, base: nn.Module, setting: Setting, made: Batch, seconds: float
) -> Record | str:
    try:
        return _alone(Trainee(provider, base, setting), made, seconds)["ms"]
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()[:200]}"


def _beside(trainee: Trainee, made: Batch) -> Record:
    """What a step takes beside time: peak memory and saved bytes, and what was planned."""
    setting, provider = trainee.setting, trainee.provider
    found: Record = {"peak_bytes": None, "saved_bytes": None}
    try:
        if setting.device == "cuda":
            trainee.optimizer.zero_grad()
            found["peak_bytes"] = memory.peak_cuda(lambda: trainee.step(made))
        if "compile" not in provider.name:  # hooks would make it compile anew
            with SavedBytes([*trainee.model.parameters(), *trainee.model.buffers()]) as saved:
                loss = trainee.forward(made)
            found["saved_bytes"] = saved.bytes
            del loss
        found["plan"] = prediction.of_step(setting, provider.name)
    except Exception as error:  # the times stand without it
        found["why_no_more"] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    return found


def _rated(line: Record, made: Batch, setting: Setting, ceilings: machine.Ceilings, floor_ms: float) -> Record:
    """A record with the figures that follow from its time."""
    tokens, sequence = work(made)
    seconds = line["ms"]["median"] / 1e3
    return line | {
        "tokens_per_s": round(tokens / seconds, 1),
        "mfu": round(setting.shape.flops(tokens, sequence) / seconds / ceilings.flops, 4),
        "floor_ms": floor_ms,
        "fraction": round(floor_ms / 1e3 / seconds, 4),
    }


def _judged(setting: Setting) -> Setting:
    """The setting that is judged: the timed one, or fewer layers and tokens of it where float64 would not fit."""
    most = _FEW_TOKENS[setting.device]
    sequence = min(setting.sequence, most)
    few = max(1, min(_FEW_LAYERS[setting.device], int(_FEW_WEIGHTS // setting.shape.layer_weights())))
    return replace(
        setting, layers=min(setting.layers, few), sequence=sequence, rows=max(1, min(setting.rows, most // sequence))
    )


def _floor_thunk(base: nn.Module, setting: Setting) -> Callable[[], None]:
    """The frozen products alone, forward and dx, of every projection and the head: what no exact step runs below."""
    linears = [m for m in base.modules() if isinstance(m, nn.Linear)]
    M, device, dtype = setting.rows * setting.sequence, setting.device, setting.dtype
    shapes = {(m.out_features, m.in_features) for m in linears}
    x = {s: torch.randn(M, s[1], device=device).to(dtype) for s in shapes}
    dy = {s: torch.randn(M, s[0], device=device).to(dtype) for s in shapes}
    # A weight in 4 bits is represented by one in the dtype of the products.
    like = {} if setting.base == "dense" else {s: torch.randn(s, device=device).to(dtype) for s in shapes}
    weights = [like.get((m.out_features, m.in_features), m.weight) for m in linears]

    def run() -> None:
        with torch.no_grad():
            for w in weights:
                x[tuple(w.shape)] @ w.t()
                dy[tuple(w.shape)] @ w

    return run


def _what_ran(trainee: Trainee) -> Record:
    """What of a patched model is not fastlora's, or not in its own tiles: "unfused" and "given_up", where it is so."""
    import fastlora

    with environment(trainee.provider.environment):
        plan = fastlora.explain(trainee.model)
    found: Record = {"explain": plan.backend}
    if left := sorted({f"{row.runs}: {row.why}" for row in plan.unfused}):
        found["unfused"] = left
    if lost := _tiles.given_up():
        found["given_up"] = lost
    return found


def largest_batch(setting: Setting, provider: StepProvider, base: nn.Module, most: int = 256) -> int:
    """The most rows of the setting's sequence length that one training step fits on the GPU; doubling, then halving."""
    trainee = Trainee(provider, base, setting)

    def fits(rows: int) -> bool:
        try:
            trainee.step(batch(replace(setting, rows=rows)))
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            trainee.optimizer.zero_grad()
            free_memory(setting.device)

    low = 0
    high = 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def layers_that_fit(model: str, dtype: torch.dtype, device: str, tokens: int, checkpointing: bool) -> int:
    """Layers of a model whose weights and PEFT's activations (204 KB per token and layer at 7B width) fit the GPU."""
    shape = models.shape(model)
    if device != "cuda":
        return shape.layers
    free = 0.85 * torch.cuda.mem_get_info()[0] - 4 * shape.vocab * shape.hidden * dtype.itemsize
    free -= tokens * shape.vocab * 12  # logits: bf16, fp32 and their gradient
    kept = 2 * shape.hidden if checkpointing else 204e3 * shape.hidden / 4096
    return max(1, min(shape.layers, int(free / (shape.layer_weights() * dtype.itemsize + kept * tokens))))
