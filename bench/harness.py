"""One harness for every op: gate, warm up, interleave, and report the median against the floor.

CPU: wall time around the call, after the caches were overwritten. GPU: CUDA events around the call, after the L2 was
overwritten ("ms", which holds what the host takes where that is longer), and the same call replayed from a CUDA graph
("graph_ms", kernels alone). Providers take turns within every round, in an order that changes from round to round, so
that a machine that drifts drifts under all of them.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .case import Case, Function, Inputs, Provider, tensors
from .gate import Witness, random_like, reason
from .machine import Ceilings, synchronize
from .record import Record, spread

Thunk = Callable[[], Any]
Clock = Callable[[], float]
_FLUSH_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}  # more than the last-level cache
_MOST_ROUNDS = 200


def measure(
    case: Case,
    device: str,
    dtype: torch.dtype,
    ceilings: Ceilings,
    seconds: float,
    only: tuple[str, ...] = (),
    clock: Clock = time.perf_counter,
) -> Iterator[Record]:
    """Gate every provider of a case and time those that are green; one record per provider and mode.

    Args:
        seconds: time to spend on timing each mode, all providers together.
        only: how the names of providers to run begin; all where empty. "eager" is the witness itself.
        clock: what tells the time on a CPU, in seconds.
    """
    torch.compiler.reset()  # else the ninth shape of a function would run eagerly, without a word
    witness = Witness(case, device, dtype)
    ready, refused = [], []
    for provider in providers(case, only):
        green, why = reason(provider, witness.check)
        (ready if green else refused).append((provider, green, why))
    del witness
    inputs = case.prepare(device, dtype)
    common = {"bench": "op", "op": case.op, "shape": case.shape, "dtype": str(dtype).removeprefix("torch.")}
    for mode in case.modes:
        common["mode"] = mode + code()
        for provider, green, why in refused:
            yield common | {"provider": provider.name, "parity": green, "why": why}
        thunks = {p.name: thunk(case, p.run, inputs, mode) for p, _, _ in ready}
        times = interleave(thunks, device, seconds, clock)
        graphs, why_no_graph = capture_all(thunks) if device == "cuda" else ({}, {})
        graph_times = interleave(graphs, device, seconds / 2, clock)
        floor = ceilings.floor_ms(*case.work(mode))
        for provider, _, _ in ready:
            ms = spread(times[provider.name])
            graph = spread(graph_times[provider.name]) if provider.name in graphs else None
            best = min(ms["median"], graph["median"]) if graph else ms["median"]
            yield common | {
                "provider": provider.name,
                "parity": True,
                "ms": ms,
                "graph_ms": graph,
                "why_no_graph": why_no_graph.get(provider.name),
                "floor_ms": floor,
                "fraction": round(floor / best, 4),
                "bytes": case.work(mode).bytes,
                "flops": case.work(mode).flops,
                "saved_bytes": saved_bytes(case, provider.run, inputs) if mode == "full" else None,
                "peak_bytes": peak_bytes(thunks[provider.name], device),
            }


def code() -> str:
    """What goes into a record's mode where kernels are another architecture's than the GPU's."""
    arch = os.environ.get("TRITON_OVERRIDE_ARCH")
    return f", code of {arch}" if arch else ""


def providers(case: Case, only: tuple[str, ...] = ()) -> list[Provider]:
    every = [Provider("eager", case.reference), *case.providers]
    return [p for p in every if not only or p.name.startswith(only)]


def thunk(case: Case, run: Function, inputs: Inputs, mode: str) -> Thunk:
    """One call to time: the forward (recording its graph where gradients are asked for), or forward and backward."""
    if mode == "forward":
        return lambda: run(**inputs)
    wrt = [inputs[name] for name in case.wrt]
    incoming = random_like(tensors(run(**inputs)), seed=2)
    return lambda: torch.autograd.grad(tensors(run(**inputs)), wrt, incoming)


def interleave(
    thunks: dict[str, Thunk],
    device: str,
    seconds: float,
    clock: Clock = time.perf_counter,
    least: int = 5,
    warm: int = 2,
) -> dict[str, list[float]]:
    """Times in ms, in turns for about ``seconds`` in all, ``least`` of each at least, after ``warm`` calls of each."""
    if not thunks:
        return {}
    flush = torch.empty(_FLUSH_BYTES[device] // 4, dtype=torch.float32, device=device)
    order = list(thunks)
    for name in order:
        for _ in range(warm):
            thunks[name]()
    synchronize(device)
    times: dict[str, list[float]] = {name: [] for name in order}
    shuffle = random.Random(0).shuffle
    one_round = _time_on_gpu if device == "cuda" else _time_on_cpu
    start = clock()
    for i in range(_MOST_ROUNDS):
        if i >= least and clock() - start >= seconds:
            break
        shuffle(order)
        for name, ms in one_round(thunks, order, flush, clock).items():
            times[name].append(ms)
    return times


def _time_on_cpu(thunks: dict[str, Thunk], order: list[str], flush: torch.Tensor, clock: Clock) -> dict[str, float]:
    times = {}
    for name in order:
        flush.zero_()
        start = clock()
        result = thunks[name]()
        times[name] = 1e3 * (clock() - start)
        del result  # freeing is not part of the call
    return times


def _time_on_gpu(thunks: dict[str, Thunk], order: list[str], flush: torch.Tensor, clock: Clock) -> dict[str, float]:
    events = {}
    for name in order:
        flush.zero_()
        # Else the host runs ahead of the flush, and the call seems to cost it less than it does.
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        thunks[name]()
        end.record()
        events[name] = start, end
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) for name, (start, end) in events.items()}


def capture_all(thunks: dict[str, Thunk]) -> tuple[dict[str, Thunk], dict[str, str]]:
    """A CUDA graph of each call, as a thunk that replays it, and why where there can be none."""
    graphs: dict[str, Thunk] = {}
    why: dict[str, str] = {}
    for name, run in thunks.items():
        try:
            graphs[name] = _capture(run)
        except Exception as error:
            torch.cuda.synchronize()
            why[name] = str(error).strip().splitlines()[0][:200]
    return graphs, why


def _capture(run: Thunk) -> Thunk:
    # A capture that fails half-way can leave the allocator in its pool: see first whether the call waits for the GPU.
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class SavedBytes:
    """Counts what autograd keeps for backward: every storage once and whole, but those of ``ignore``."""

    def __init__(self, ignore: Iterator[torch.Tensor] | list[torch.Tensor]) -> None:
        # Storages by address of the storage object: meta and fake tensors have no data to tell them apart.
        self._ignore = {t.untyped_storage()._cdata for t in ignore}
        self._kept: dict[int, torch.Tensor] = {}

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._hooks.__exit__(*exc)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        identity = tensor.untyped_storage()._cdata
        if identity not in self._ignore:
            self._kept[identity] = tensor.detach()  # held, so that no other storage takes its address
        return tensor

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self._kept.values())


def saved_bytes(case: Case, run: Function, inputs: Inputs) -> int:
    with SavedBytes([inputs[name] for name in case.weights]) as saved:
        kept = run(**inputs)
    del kept
    return saved.bytes


def peak_bytes(run: Thunk, device: str) -> int | None:
    """GPU memory above what was there before the call; None on a CPU, where no allocator tells."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
