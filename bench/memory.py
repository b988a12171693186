"""Peak memory of a training step, and the allocator every provider of a run shares."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .machine import ROOT

# glibc gives large blocks back to the kernel when they are freed and faults every page in anew. These keep them.
_TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36), "MALLOC_TOP_PAD_": str(64 << 20)}


def allocator() -> str:
    """ "tuned" where this process runs under the tuned glibc thresholds, else "default"."""
    return "tuned" if all(os.environ.get(name) == value for name, value in _TUNED.items()) else "default"


def use_allocator(name: str, argv: list[str]) -> None:
    """Start ``python -m bench argv`` anew under the wanted allocator, unless this process is it already."""
    if name == allocator():
        return
    environment = {k: v for k, v in os.environ.items() if k not in _TUNED} | (_TUNED if name == "tuned" else {})
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "bench", *argv], environment)


def peak_cuda(step: Callable[[], Any]) -> int:
    """GPU memory of one step above what is there without it: activations, gradients and workspace."""
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_rss(step: Callable[[], Any]) -> int | None:
    """Resident memory of one step above the loaded model, in a process that did nothing else; None off Linux.

    One step runs first: it compiles what compiles and makes the optimizer's state, which belong to the model. What it
    left to the allocator is given back before the second is measured.
    """
    step()
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _status("VmRSS")
        # 5 sets the high-water mark back to the present.
        Path("/proc/self/clear_refs").write_text("5")
        step()
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _status(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def in_its_own_process(argv: list[str], timeout: float = 300) -> dict[str, Any]:
    """The JSON that ``python -m bench argv`` prints last; {"why": …} where it fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench", *argv], cwd=ROOT, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {"why": f"took more than {timeout:.0f} s"}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (json.JSONDecodeError, IndexError):
        return {"why": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
