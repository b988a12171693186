"""Tile sizes: kernel × GPU architecture, each row with its provenance, always a default."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """One launch configuration and where it comes from.

    Attributes:
        m, n, k: block sizes along the rows, the columns of the output, and the reduction.
        r: the most ranks one product takes.
        warps, stages: of the program, and of its software pipeline.
        provenance: "screened": compiled for sm_80 and sm_90, no spills, within the shared memory of both.
    """

    m: int = 1
    n: int = 1
    k: int = 1
    r: int = 64
    warps: int = 4
    stages: int = 2
    provenance: str = "screened"


# Keyed by kernel and architecture; architecture 0 is the default. fp32 runs without tensor cores, in smaller tiles.
_ROWS: dict[tuple[str, int], Tile] = {
    ("lora_gemm", 0): Tile(m=128, n=128, k=32, r=32, warps=4, stages=4),
    ("lora_gemm", 80): Tile(m=128, n=256, k=64, r=16, warps=8, stages=4),
    ("lora_gemm", 90): Tile(m=128, n=256, k=64, r=32, warps=8, stages=4),
    ("lora_gemm_fp32", 0): Tile(m=32, n=32, k=32, r=16, warps=4, stages=2),
    ("lora_gemm_t", 0): Tile(m=128, n=128, k=32, r=32, warps=4, stages=4),
    ("lora_gemm_t", 80): Tile(m=128, n=256, k=64, r=16, warps=8, stages=4),
    ("lora_gemm_t", 90): Tile(m=128, n=256, k=64, r=32, warps=8, stages=4),
    ("lora_gemm_t_fp32", 0): Tile(m=32, n=32, k=32, r=16, warps=4, stages=2),
    ("lora_gemm_t_dropout", 0): Tile(m=64, n=128, k=32, r=32, warps=8, stages=4),
    ("lora_gemm_t_dropout", 90): Tile(m=64, n=64, k=32, r=32, warps=4, stages=4),
    ("lora_gemm_t_dropout_fp32", 0): Tile(m=32, n=32, k=16, r=16, warps=4, stages=2),
    ("lora_project", 0): Tile(m=32, k=128, warps=4, stages=3),
    ("lora_project_fp32", 0): Tile(m=16, k=32, r=16, warps=4, stages=2),
    ("lora_project_dropout", 0): Tile(m=32, k=64, r=32, warps=4, stages=3),
    ("lora_project_dropout_fp32", 0): Tile(m=16, k=32, r=16, warps=4, stages=2),
    ("lora_project_t", 0): Tile(m=32, k=128, warps=4, stages=3),
    ("lora_project_t", 90): Tile(m=32, k=64, warps=4, stages=3),
    ("lora_project_t_fp32", 0): Tile(m=16, k=32, r=16, warps=4, stages=2),
    ("rms_norm_project", 0): Tile(m=32, k=128, warps=4, stages=3),
    ("rms_norm_project_fp32", 0): Tile(m=16, k=32, r=16, warps=4, stages=2),
    ("rms_norm_project_dropout", 0): Tile(m=32, k=64, r=32, warps=4, stages=3),
    ("rms_norm_project_dropout_fp32", 0): Tile(m=16, k=32, r=16, warps=4, stages=2),
    ("swiglu_project", 0): Tile(m=32, k=128, warps=4, stages=3),
    ("swiglu_project", 90): Tile(m=32, k=128, warps=4, stages=2),
    ("swiglu_project_fp32", 0): Tile(m=16, k=32, r=16, warps=4, stages=2),
    ("swiglu_project_dropout", 0): Tile(m=32, k=64, r=32, warps=4, stages=3),
    ("swiglu_project_dropout_fp32", 0): Tile(m=16, k=32, r=16, warps=4, stages=2),
    ("lora_reduce", 0): Tile(m=64, n=128, warps=4, stages=3),
    ("lora_reduce_fp32", 0): Tile(m=32, n=32, r=16, warps=4, stages=2),
    ("lora_reduce_dropout", 0): Tile(m=32, n=64, r=32, warps=4, stages=2),
    ("lora_reduce_dropout_fp32", 0): Tile(m=16, n=32, r=16, warps=4, stages=2),
    ("lora_reduce_t", 0): Tile(m=64, n=128, warps=8, stages=3),
    ("lora_reduce_t_fp32", 0): Tile(m=32, n=32, r=16, warps=4, stages=2),
    ("swiglu", 0): Tile(n=1024, warps=4),
    # m: queries, n: keys. By head dimension, up to 64, 128 and 256; decode: at most 16 queries.
    ("flash_attention_decode", 0): Tile(m=16, n=32, warps=4, stages=2),
    ("flash_attention_fwd_d64", 0): Tile(m=128, n=64, warps=8, stages=3),
    ("flash_attention_fwd_d64_fp32", 0): Tile(m=64, n=32, warps=8, stages=1),
    ("flash_attention_fwd_d128", 0): Tile(m=128, n=64, warps=8, stages=3),
    ("flash_attention_fwd_d128_fp32", 0): Tile(m=32, n=32, warps=8, stages=1),
    ("flash_attention_fwd_d256", 0): Tile(m=64, n=32, warps=8, stages=2),
    ("flash_attention_fwd_d256_fp32", 0): Tile(m=16, n=16, warps=4, stages=1),
    # Padding takes registers in the forward.
    ("flash_attention_fwd_d128_padded", 0): Tile(m=128, n=32, warps=8, stages=3),
    ("flash_attention_dq_d64", 0): Tile(m=64, n=32, warps=4, stages=3),
    ("flash_attention_dq_d64_fp32", 0): Tile(m=32, n=32, warps=8, stages=1),
    ("flash_attention_dq_d128", 0): Tile(m=64, n=32, warps=4, stages=2),
    ("flash_attention_dq_d128_fp32", 0): Tile(m=16, n=16, warps=8, stages=1),
    ("flash_attention_dq_d256", 0): Tile(m=64, n=32, warps=8, stages=2),
    ("flash_attention_dq_d256", 90): Tile(m=32, n=32, warps=8, stages=2),
    ("flash_attention_dq_d256_fp32", 0): Tile(m=16, n=16, warps=4, stages=1),
    ("flash_attention_dq_d256_fp32", 90): Tile(m=16, n=16, warps=8, stages=1),
    ("flash_attention_dkdv_d64", 0): Tile(m=32, n=128, warps=8, stages=2),
    ("flash_attention_dkdv_d64_fp32", 0): Tile(m=32, n=32, warps=8, stages=1),
    ("flash_attention_dkdv_d128", 0): Tile(m=64, n=64, warps=8, stages=2),
    ("flash_attention_dkdv_d128", 90): Tile(m=16, n=128, warps=8, stages=3),
    ("flash_attention_dkdv_d128_fp32", 0): Tile(m=16, n=64, warps=8, stages=1),
    ("flash_attention_dkdv_d128_fp32", 90): Tile(m=16, n=16, warps=8, stages=1),
    ("flash_attention_dkdv_d256", 0): Tile(m=32, n=32, warps=8, stages=2),
    ("flash_attention_dkdv_d256_fp32", 0): Tile(m=16, n=16, warps=8, stages=1),
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


# Which way lora_gemm goes: on sm_80 Triton's GEMM is near the library's, elsewhere the library's is the safe floor
# until a measurement says otherwise.
_GEMM = {80: "triton", 0: "addmm"}


def gemm_method(like: torch.Tensor) -> str:
    """ "triton", "addmm" or "augmented" for the device of ``like``; FASTLORA_GEMM overrides."""
    override = os.environ.get("FASTLORA_GEMM")
    if override is None:
        return _GEMM.get(arch(like.device), _GEMM[0])
    if override not in ("triton", "addmm", "augmented"):
        raise ValueError(f"FASTLORA_GEMM is {override!r}, needs 'triton', 'addmm' or 'augmented'")
    return override
