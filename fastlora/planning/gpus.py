"""GPUs: memory, watts, and the rates that work reaches on them, each with its provenance."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

MEASURED, MODELLED = "measured", "modelled"


@dataclass(frozen=True)
class Rate:
    """What one kind of work reaches per second: FLOPs or bytes."""

    value: float
    unit: str
    label: str
    source: str


@dataclass(frozen=True)
class GPU:
    """One GPU as a plan sees it.

    Attributes:
        memory: bytes that its driver reports.
        watts: of the board, its design limit.
        cuda_name: what CUDA calls it, in part.
        rates: gemm, attention forward, attention backward (FLOP/s); elementwise, skinny products, link (byte/s).
    """

    name: str
    memory: float
    watts: float
    cuda_name: str
    rates: Mapping[str, Rate]


def _rates(
    gemm: tuple[float, str], attention: tuple[float, float, str], copy: tuple[float, str], skinny: float, link: float
) -> dict[str, Rate]:
    forward, backward, chart = attention
    return {
        "gemm": Rate(gemm[0] * 1e12, "FLOP/s", MODELLED, gemm[1]),
        "attention forward": Rate(forward * 1e12, "FLOP/s", MODELLED, chart),
        "attention backward": Rate(backward * 1e12, "FLOP/s", MODELLED, chart),
        "elementwise": Rate(copy[0] * 1e12, "B/s", MODELLED, copy[1]),
        "skinny products": Rate(skinny * 1e12, "B/s", MODELLED, "assumed: 0.7 of the elementwise rate"),
        "link": Rate(link * 1e9, "B/s", MODELLED, "assumed: 0.77 of the datasheet's NVLink, one direction"),
    }


_LIGER_GEMM = "Liger-Kernel's published A100 benchmark: the MLP of Llama 7B at 242 to 244 TFLOP/s; datasheet 312"
_FA2_CHART = "FlashAttention-2's published A100 chart: 173 TFLOP/s forward and backward at 4096; the split is assumed"
_FA3_CHART = "assumed, below FlashAttention-3's published H100 chart (579 TFLOP/s forward at 4096)"
_HOPPER_GEMM = "assumed: 0.69 of the datasheet's 989"


def _stream(datasheet: float) -> tuple[float, str]:
    return round(datasheet * 0.833, 2), (
        f"0.83 of the datasheet's {datasheet:g} TB/s; Liger-Kernel's published A100 benchmark reaches 0.80 in RoPE"
    )


def _a100(bandwidth: float, skinny: float) -> dict[str, Rate]:
    return _rates((245, _LIGER_GEMM), (190, 165, _FA2_CHART), _stream(bandwidth), skinny, 230)


def _hopper(bandwidth: float, skinny: float) -> dict[str, Rate]:
    return _rates((680, _HOPPER_GEMM), (520, 430, _FA3_CHART), _stream(bandwidth), skinny, 345)


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100-80gb", 84.9e9, 400, "A100-SXM4-80GB", _a100(2.04, 1.2)),
        GPU("a100-40gb", 42.3e9, 400, "A100-SXM4-40GB", _a100(1.555, 0.9)),
        GPU("h100-80gb", 84.9e9, 700, "H100 80GB", _hopper(3.35, 1.95)),
        GPU("h200-141gb", 150.1e9, 700, "H200", _hopper(4.8, 2.8)),
    )
}


def gpu_of(name: str) -> GPU:
    """The GPU called so; "auto": the one in this machine.

    Raises:
        ValueError: there is no such GPU, or none in this machine.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    known = ", ".join(GPUS)
    if name != "auto":
        raise ValueError(f"gpu is {name!r}, needs one of {known}, or auto")
    import torch

    if not torch.cuda.is_available():
        raise ValueError(f"gpu is 'auto' and there is no GPU in this machine; needs one of {known}")
    properties = torch.cuda.get_device_properties(0)
    for gpu in GPUS.values():
        if gpu.cuda_name in properties.name:
            return replace(gpu, memory=float(properties.total_memory))
    raise ValueError(f"gpu is 'auto' and this machine's is a {properties.name}, which is unknown; needs one of {known}")


def with_measured(gpu: GPU, path: str | Path) -> GPU:
    """``gpu`` with the rates found in a results file of ``python -m bench``, or a folder of them.

    GEMM and skinny products from the benchmarks of those kernels, elementwise from RMSNorm, RoPE and SwiGLU,
    attention from the fastest of all that ran; in bf16, green in parity, timed from a CUDA graph where there is one.

    Raises:
        ValueError: the file is not there, is of another GPU, or holds none of these.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    records = [record for file in files for record in _records(file)]
    machines = {(r.get("gpu") or {}).get("name", "no GPU") for r in records if r["bench"] == "machine"}
    if wrong := [name for name in machines if gpu.cuda_name not in name]:
        raise ValueError(f"measured: {path} was measured on {', '.join(wrong)}, needs {gpu.cuda_name}")
    green = [r for r in records if r["bench"] == "op" and r.get("parity") and r["dtype"] == "bfloat16"]
    found = dict(_found(green))
    if not found:
        raise ValueError(f"measured: {path} holds no measurement of a kernel in bfloat16, needs python -m bench's")
    source = f"python -m bench on {', '.join(machines)}: {path.name}"
    rates = {name: Rate(value, gpu.rates[name].unit, MEASURED, source) for name, value in found.items()}
    return replace(gpu, rates={**gpu.rates, **rates})


def _records(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # a run that was cut off leaves half a line
            yield json.loads(line)


def _found(records: list[dict[str, Any]]) -> Iterable[tuple[str, float]]:
    def rates(ops: tuple[str, ...], work: str) -> list[float]:
        """Of every case of the ops the fastest of our ways to compute it."""
        best: dict[str, float] = {}
        for r in records:
            if r["op"] in ops and r["mode"] == "forward" and r["provider"].startswith("fastlora"):
                case = f"{r['op']} {r['shape']}"
                best[case] = max(best.get(case, 0.0), r[work] / _seconds(r))
        return list(best.values())

    for name, ops, work in (
        ("gemm", ("lora_gemm", "lora_gemm_t"), "flops"),
        ("skinny products", ("lora_project", "lora_reduce"), "bytes"),
        ("elementwise", ("rms_norm", "rope", "swiglu"), "bytes"),
    ):
        if speeds := rates(ops, work):
            yield name, median(speeds)
    attention = [r for r in records if r["op"] == "attention"]
    for forward in sorted((r for r in attention if r["mode"] == "forward"), key=_seconds)[:1]:
        yield "attention forward", forward["flops"] / _seconds(forward)
        full = [r for r in attention if r["mode"] == "full" and r["shape"] == forward["shape"]]
        for both in sorted(full, key=_seconds)[:1]:
            yield "attention backward", (both["flops"] - forward["flops"]) / (_seconds(both) - _seconds(forward))


def _seconds(record: Mapping[str, Any]) -> float:
    return (record.get("graph_ms") or record["ms"])["median"] / 1e3
