"""The machine of a run: versions, processor, clocks, and its two measured ceilings."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "liger-kernel",
    "flash-attn",
    "unsloth",
    "bitsandbytes",
    "numpy",
)
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile", "sve", "asimd")


class Ceilings(NamedTuple):
    """The fastest this machine was seen to move bytes (B/s, read plus written) and multiply matrices (FLOP/s)."""

    bandwidth: float
    flops: float

    def floor_ms(self, nbytes: float, flops: float) -> float:
        """No version runs much faster: the larger of the time for the bytes and the time for the FLOPs."""
        return 1e3 * max(nbytes / self.bandwidth, flops / self.flops)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def slug(device: str) -> str:
    """The name of this class of machine, for a folder: "nvidia-h200", "amd-epyc-2-cores"."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_cpu()['name']} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def info(device: str) -> dict[str, Any]:
    """Everything a reader needs to judge or repeat a figure; the first line of every results file."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found = {
        "bench": "machine",
        "slug": slug(device),
        "device": device,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "cpu": _cpu() | {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "csrc": _csrc(),
    }
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": p.name,
            "memory": p.total_memory,
            "sm": p.multi_processor_count,
            "capability": f"{p.major}.{p.minor}",
            "cuda": torch.version.cuda,
            "clocks": _nvidia_smi("clocks.sm,clocks.mem"),
            "limits": _nvidia_smi("clocks.max.sm,power.limit,driver_version"),
        }
    return found


def ceilings(device: str, dtype: torch.dtype, quick: bool = False) -> Ceilings:
    """Measured now: a copy of 256 MB (1 GB on a GPU), and a square matrix product of random data.

    quick: of small ones, where the figures do not matter: in fp16 a CPU takes minutes for the large product.
    """
    gpu = device == "cuda"
    n = (1 << 22) if quick else (1 << 30) if gpu else (1 << 28)
    source = torch.empty(n // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    side = 256 if quick else 8192 if gpu else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = 0.3 if gpu and not quick else 0.0
    copy, product = _median(lambda: target.copy_(source), device, seconds), _median(lambda: a @ b, device, seconds)
    return Ceilings(2 * n / copy, 2 * side**3 / product)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _median(run: Any, device: str, least: float) -> float:
    """Seconds of a call: the median of the later calls, of nine at least and for so many seconds, so that an idle GPU's
    clocks have risen."""
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < 9 or time.perf_counter() - begin < least:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[max(2, len(seconds) // 2) if least else 2 :])


def _cpu() -> dict[str, Any]:
    name, flags = platform.processor() or platform.machine(), []
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {"name": name, "flags": flags}
    if found := re.search(r"model name\s*:\s*(.+)", text):
        name = found.group(1).strip()
    if found := re.search(r"(?:flags|Features)\s*:\s*(.+)", text):
        flags = [flag for flag in _FLAGS if flag in found.group(1).split()]
    return {"name": name, "flags": flags}


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    if given := os.environ.get("GIT_COMMIT"):  # of a copy of the tree, whose history may be another's
        return given
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "fastlora", "csrc")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _csrc() -> str:
    from fastlora.kernels import _library

    return _library.csrc_state.partition(";")[0]  # without the command, which names a folder of this machine


def _nvidia_smi(query: str) -> str:
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
