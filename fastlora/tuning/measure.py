"""Which candidate is fastest on the GPU at hand: parity first, then CUDA graphs timed in turns."""

from __future__ import annotations

import logging
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple
from typing import Any, NamedTuple

import torch

from ..kernels import _cache, _tiles
from ..kernels._rows import Tile
from ..kernels._tiles import Call
from . import calls

Thunk = Callable[[], Any]
_LOG = logging.getLogger("fastlora")
_FLUSH_BYTES = 256 << 20  # more than any GPU's L2


class Candidate(NamedTuple):
    """A way to compute a call."""

    method: str
    tile: Tile

    def __str__(self) -> str:
        return f"{self.method} {self.tile}" if self.method == "triton" else self.method


class Refused(AssertionError):
    """A candidate whose result is further from the truth than its rounding explains."""


def candidates(call: Call, tiles: Iterable[Tile] = ()) -> list[Candidate]:
    """The library's ways, the tiles given, and the shipped ones."""
    rows, kernel = _tiles.shipped(call), calls.KERNELS[call.kernel]
    found = [Candidate(name, rows[0].tile) for name in kernel.methods]
    every = dict.fromkeys([*tiles, *(row.tile for row in rows)]) if kernel.launcher else ()
    return [*found, *(Candidate("triton", tile) for tile in every)]


def measure(call: Call, seconds: float = 0.5, tiles: Iterable[Tile] = ()) -> dict[str, Any]:
    """Time every candidate of a call; the entry for tuning.json.

    Raises:
        Refused: not one candidate passes parity.
        torch.OutOfMemoryError: the operands do not fit.
    """
    kernel, probe = calls.KERNELS[call.kernel], _probe(call)
    op, few, arguments = kernel.run, *(kernel.arguments(one, _new(one)) for one in (probe, call))
    truth = kernel.truth(*_copied(few))
    thunks: dict[Candidate, Thunk] = {}
    refused: dict[str, str] = {}
    for candidate in candidates(call, tiles):

        def run(candidate: Candidate = candidate) -> Any:
            with _tiles.forced(call.kernel, *candidate):
                return op(*arguments)

        try:
            with _tiles.forced(call.kernel, *candidate):
                check(op(*_copied(few)), truth, probe)
            run()
            thunks[candidate] = _captured(run) if call.device.type == "cuda" else run
        except torch.OutOfMemoryError:
            raise
        except (Refused, RuntimeError) as error:  # wrong, or it does not compile, launch, or let itself be captured
            refused[str(candidate)] = str(error).splitlines()[0][:200]
    if not thunks:
        raise Refused(f"{call.kernel}: no candidate is right on this GPU: {refused}")
    times = in_turns(thunks, seconds, call.device)
    order = sorted(times, key=times.__getitem__)
    runner_up = order[1] if len(order) > 1 else order[0]
    return {
        "method": order[0].method,
        "tile": list(astuple(order[0].tile)),
        "ms": round(times[order[0]], 5),
        "runner_up": str(runner_up),
        "runner_up_ms": round(times[runner_up], 5),
        "date": time.strftime("%Y-%m-%d"),
        "call": list(call[3:]),
        "all": {str(one): round(times[one], 5) for one in order},
        "refused": refused,
    }


def _probe(call: Call) -> Call:
    """The call with so few rows that its truth fits beside it: ragged against every tile, and, as the call itself, a
    multiple of 16, which is what Triton compiles for; a reduction over them is split in three."""
    return call._replace(m=min(call.m, 1040)) if call.m else call._replace(n=min(call.n, 1040 << 10))


def check(ours: Any, truth: list[torch.Tensor], call: Call) -> None:
    """Raise Refused unless rms(ours − truth) ≤ (2 u + 2 u₃₂ √length) · rms(truth) for every output.

    u is the unit roundoff of the output's dtype, which an addmm rounds to twice; u₃₂ that of the fp32 accumulators,
    whose errors over sums of ``length`` terms add up like a random walk; operands that a kernel makes on its way (the
    normed row, SwiGLU's product, probabilities) are rounded to the call's dtype once more.
    """
    outputs = [out for out in (ours if isinstance(ours, (list, tuple)) else (ours,)) if out.numel()]
    length = max(call.m, call.n if call.m else 1, call.k)
    makes = "project" in call.kernel or "attention" in call.kernel or call.kernel.startswith(("swiglu", "rms_norm"))
    made = torch.finfo(call.dtype).eps / 2 if makes else 0.0
    for i, (out, expected) in enumerate(zip(outputs, truth, strict=True)):
        u = max(torch.finfo(out.dtype).eps / 2, made)
        allowed = 2 * u + 2 * 2**-24 * length**0.5
        error = (out.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        if not error.item() <= allowed:  # NaN is refused
            raise Refused(f"output {i} is {error.item():.2e} from the truth, {allowed:.2e} is allowed")


def _new(call: Call) -> Callable[..., torch.Tensor]:
    generator = torch.Generator(call.device).manual_seed(0)

    def new(*shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        if dtype == torch.uint8:
            return torch.randint(256, shape, generator=generator, device=call.device, dtype=dtype)
        values = torch.randn(shape, generator=generator, device=call.device)
        return values.mul_(scale).to(dtype or call.dtype)

    return new


def _copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the tensors that an operator writes to: its logits; the rest as they are."""
    first = arguments[0]
    return (first.clone() if isinstance(first, torch.Tensor) else first, *arguments[1:])


def in_turns(thunks: dict[Any, Thunk], seconds: float, device: torch.device) -> dict[Any, float]:
    """Median milliseconds of each, in an order that changes every round, after the L2 was overwritten: between CUDA
    events; on a CPU, to rehearse, of the wall clock."""
    gpu = device.type == "cuda"
    flush = torch.empty(_FLUSH_BYTES if gpu else 1, dtype=torch.uint8, device=device)
    one_round = _round_on_gpu if gpu else _round_on_cpu
    order = list(thunks)
    shuffle = random.Random(0).shuffle
    times: dict[Any, list[float]] = {name: [] for name in order}
    start = time.monotonic()
    for i in range(200):
        if i >= 5 and time.monotonic() - start > seconds:
            break
        shuffle(order)
        for name, ms in one_round(thunks, order, flush).items():
            times[name].append(ms)
    return {name: statistics.median(every) for name, every in times.items()}


def _round_on_gpu(replays: dict[Any, Thunk], order: list[Any], flush: torch.Tensor) -> dict[Any, float]:
    events = {}
    for name in order:
        flush.zero_()
        events[name] = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[name][0].record()
        replays[name]()
        events[name][1].record()
    torch.cuda.synchronize()
    return {name: begin.elapsed_time(end) for name, (begin, end) in events.items()}


def _round_on_cpu(replays: dict[Any, Thunk], order: list[Any], flush: torch.Tensor) -> dict[Any, float]:
    times = {}
    for name in order:
        start = time.perf_counter()
        replays[name]()
        times[name] = 1e3 * (time.perf_counter() - start)
    return times


def _captured(run: Thunk) -> Thunk:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def tune(
    wanted: Iterable[Call],
    environment: str,
    again: bool = False,
    measure: Callable[[Call], dict[str, Any]] = measure,
) -> Iterator[tuple[Call, dict[str, Any]]]:
    """Measure the calls that the cache does not hold (all, with ``again``), and yield every call with its entry.

    Of several processes, one measures a call while the others wait for it and then read.
    """
    for call in wanted:
        with _cache.measuring():
            entry = None if again else _cache.entries(environment).get(_cache.key(call))
            if entry is None:
                entry = measure(call)
                _cache.store(environment, {_cache.key(call): entry})
                _tiles.forget()
        yield call, entry


def install() -> None:
    """From now on a call that no cache knows is measured when it first comes up: FASTLORA_AUTOTUNE=1."""
    _tiles.autotune = on_first_use


def on_first_use(call: Call) -> None:
    """Measure a call once, among the library's ways and the tiles at hand, unless a graph is being captured."""
    if call.kernel not in calls.KERNELS or torch.cuda.is_current_stream_capturing():
        return
    environment = _cache.environment(call.device, _tiles.arch(call.device))
    _tiles.autotune = None  # while one is measured, no other: it would wait for the first
    try:
        for _ in tune([call], environment, measure=lambda call: measure(call, seconds=0.1)):
            pass
    except (Refused, torch.OutOfMemoryError) as error:
        _LOG.warning("%s was not tuned, its row serves: %s", call.kernel, str(error).splitlines()[0])
    finally:
        install()
        _tiles.forget()
