"""Tile sizes: kernel × GPU architecture, each row with its provenance, always a default."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """One launch configuration: block sizes along M, N and K, warps, pipeline stages, and where the row comes from."""

    m: int = 1
    n: int = 1
    k: int = 1
    warps: int = 4
    stages: int = 2
    provenance: str = "screened"  # compiled for sm_80: no spills, within 166,912 B of shared memory


# Keyed by (kernel, architecture); architecture 0 is the default. fp32 runs without tensor cores, in smaller tiles.
_ROWS: dict[tuple[str, int], Tile] = {
    ("lora_gemm", 0): Tile(m=128, n=128, k=32, warps=4, stages=4),
    ("lora_gemm", 80): Tile(m=128, n=256, k=64, warps=8, stages=4),
    ("lora_gemm", 90): Tile(m=128, n=256, k=64, warps=8, stages=4),
    ("lora_gemm_fp32", 0): Tile(m=64, n=64, k=32, warps=4, stages=3),
    ("lora_project", 0): Tile(m=32, k=128, warps=4, stages=3),
    ("lora_project_fp32", 0): Tile(m=32, k=64, warps=4, stages=2),
    ("lora_reduce", 0): Tile(m=64, n=128, warps=4, stages=3),
    ("lora_reduce_fp32", 0): Tile(m=32, n=64, warps=4, stages=2),
    ("swiglu", 0): Tile(n=1024, warps=4),
    ("cross_entropy", 0): Tile(n=4096, warps=8),
}


def arch(device: torch.device) -> int:
    """Compute capability of a CUDA device as 80, 90, …; ``TRITON_OVERRIDE_ARCH=sm80`` wins; 80 without a GPU."""
    override = os.environ.get("TRITON_OVERRIDE_ARCH", "")
    if override:
        return int(override.removeprefix("sm").rstrip("a"))
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tile(kernel: str, like: torch.Tensor) -> Tile:
    """The row of ``kernel`` for the device and dtype of ``like``."""
    fp32 = f"{kernel}_fp32"
    if like.dtype == torch.float32 and (fp32, 0) in _ROWS:
        kernel = fp32
    return _ROWS.get((kernel, arch(like.device)), _ROWS[kernel, 0])
