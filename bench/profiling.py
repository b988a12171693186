"""One call under torch.profiler: microseconds by kernel, launches, and how long the host and the GPU took.

On a GPU the kernels are the device's own; "busy" is the time in which at least one runs, "host" the time the call takes
to return, without its waits for the GPU: synchronizations, copies, and launches that wait for room in the GPU's queue.
The profiler slows the host down, so "host" is an upper bound. On a CPU the kernels are ATen's operators, by their own
time.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from .machine import synchronize
from .record import Record

# Kinds of kernels by what their names hold; the first that fits. Ours, cuBLAS's, cuDNN's, PyTorch's.
KINDS = {
    "attention": r"flash|fmha|attention|sdpa|softmax_warp|mha_",
    "loss": r"cross_entropy|nll_loss|softmax",
    "optimizer": r"adam|multi_tensor|foreach",
    "low-rank": r"lora_project|lora_reduce|norm_project|swiglu_project|bwd_reduce|tall_product",
    "products": r"gemm|nvjet|cutlass|cublas|xmma|aten::(add)?b?mm$|aten::_?addmm|lora_gemm|splitk",
    "norm, rotary, SwiGLU": r"rms_norm|rope|swiglu|silu|dropout",
}
REST = "copies and elementwise"


# What a launch takes at most while there is room in the queue; what is above it is a wait.
_LAUNCH_US = 30.0


def kind(name: str) -> str:
    """What a kernel is for, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), REST)


def profile(run: Callable[[], Any], device: str) -> Record:
    """Profile one call of ``run``, which has run before.

    Returns:
        "kernels": [name, launches, µs] of each, longest first; "launches"; "busy_ms", "host_ms" and "ms", the call
        until the GPU is done, all under the profiler.
    """
    gpu = device == "cuda"
    synchronize(device)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        run()
        returned = time.perf_counter()
        synchronize(device)
        end = time.perf_counter()
    events = list(profiler.events())
    times: dict[str, list[float]] = defaultdict(list)
    if gpu:
        ours = [e for e in events if e.device_type == DeviceType.CUDA and not e.name.startswith("ProfilerStep")]
        for e in ours:
            times[e.name].append(e.time_range.elapsed_us())
        busy = _covered((e.time_range.start, e.time_range.end) for e in ours)
        # cudaDeviceSynchronize is the one above, after the call.
        waits = re.compile("cuda(Stream|Event)Synchronize|cudaMemcpy")
        waited = sum(e.time_range.elapsed_us() for e in events if waits.match(e.name))
        launches = (e.time_range.elapsed_us() for e in events if re.match("cu(da)?Launch", e.name))
        waited += sum(max(0.0, us - _LAUNCH_US) for us in launches)
    else:
        for e in events:
            times[e.name].append(e.self_cpu_time_total)
        busy, waited = 1e6 * (end - start), 0.0
    kernels = sorted(([name, len(us), round(sum(us), 1)] for name, us in times.items()), key=lambda one: -one[2])
    return {
        "device": device,
        "kernels": kernels,
        "launches": sum(n for _, n, _ in kernels),
        "busy_ms": round(busy / 1e3, 4),
        "host_ms": round(1e3 * (returned - start) - waited / 1e3, 4),
        "ms": round(1e3 * (end - start), 4),
    }


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals: kernels on two streams count once."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > until:
            total += end - max(start, until)
            until = end
    return total


def by_kind(kernels: list[list[Any]]) -> dict[str, float]:
    """Milliseconds of each kind, in the order of KINDS."""
    found = dict.fromkeys([*KINDS, REST], 0.0)
    for name, _, us in kernels:
        found[kind(name)] += us / 1e3
    return {name: ms for name, ms in found.items() if ms}
