"""The tiles worth compiling: every combination that registers and shared memory could hold, by arithmetic alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from ..kernels._rows import ROWS, Tile
from . import attention
from .aot import SHARED_LIMIT

_HEAD = 128  # of every Llama 2
# Rows, columns, reduction, ranks per product, warps, stages.
Space = tuple[tuple[int, ...], ...]
_GEMM: Space = ((64, 128, 256), (64, 128, 256), (32, 64), (16, 32), (4, 8), (3, 4))
_PROJECT: Space = ((16, 32, 64), (1,), (64, 128), (64,), (4,), (2, 3))
_PROJECT_DROPOUT: Space = ((16, 32, 64), (1,), (64, 128), (32, 64), (4,), (2, 3))
_REDUCE: Space = ((32, 64), (64, 128), (1,), (64,), (4, 8), (2, 3))
_REDUCE_DROPOUT: Space = ((32, 64), (64, 128), (1,), (32, 64), (4, 8), (2, 3))
# Rows are of queries, columns of keys.
_ATTENTION: Space = ((64, 128), (32, 64, 128), (1,), (64,), (4, 8), (2, 3))
_ATTENTION_DQ: Space = ((32, 64, 128), (32, 64), (1,), (64,), (4, 8), (2, 3))
_ATTENTION_DKDV: Space = ((16, 32, 64), (32, 64, 128), (1,), (64,), (4, 8), (2, 3))
_SEVERAL_REDUCE: Space = ((32, 64), (64, 128), (1,), (16, 32), (4, 8), (2, 3))
SPACES: dict[str, Space] = {
    "lora_gemm": _GEMM,
    "lora_gemm_rotary": _GEMM,
    "lora_gemm_t": _GEMM,
    "lora_gemm_t_dropout": _GEMM,
    "lora_project": _PROJECT,
    "lora_project_dropout": _PROJECT_DROPOUT,
    "rms_norm_project": _PROJECT,
    "rms_norm_project_dropout": _PROJECT_DROPOUT,
    "swiglu_project": _PROJECT,
    "swiglu_project_dropout": _PROJECT_DROPOUT,
    "lora_project_t": _PROJECT,
    "lora_reduce": _REDUCE,
    "lora_reduce_dropout": _REDUCE_DROPOUT,
    "lora_reduce_t": _REDUCE,
    "rms_norm_reduce": _REDUCE,
    "rms_norm_reduce_dropout": _SEVERAL_REDUCE,
    "swiglu_reduce": _SEVERAL_REDUCE,
    "swiglu_reduce_dropout": _SEVERAL_REDUCE,
    "swiglu": ((1,), (512, 1024, 2048), (1,), (64,), (4, 8), (2,)),
    "cross_entropy": ((1,), (2048, 4096, 8192), (1,), (64,), (4, 8), (2,)),
    "dequantize_4bit": ((1,), (512, 1024, 2048), (1,), (64,), (4, 8), (2,)),
    "flash_attention_decode": ((16,), (32, 64, 128), (1,), (64,), (2, 4), (2, 3)),
}
_BY_PRODUCT = {"fwd": _ATTENTION, "dq": _ATTENTION_DQ, "dkdv": _ATTENTION_DKDV}
SPACES |= {name: _BY_PRODUCT[name.split("_")[2]] for name in attention.KERNELS if name not in SPACES}


def enumerated(kernel: str, arch: int) -> Iterator[Tile]:
    """The tiles of a kernel's space that its architecture could hold; none where a kernel has no space."""
    for sizes in itertools.product(*SPACES.get(kernel, ())) if kernel in SPACES else ():
        tile = Tile(*sizes)
        if _holds(kernel, tile, arch):
            yield tile


def shipped(kernel: str) -> set[Tile]:
    """The tiles of a kernel in the rows of any architecture."""
    return {row.tile for row in ROWS if row.kernel == kernel}


def candidates(kernel: str, arch: int) -> list[Tile]:
    """The space of a kernel and its shipped tiles. Outside Llama 2's 16-bit step the latter are all there is."""
    return list(dict.fromkeys([*enumerated(kernel, arch), *sorted(shipped(kernel), key=repr)]))


def _holds(kernel: str, tile: Tile, arch: int) -> bool:
    if shared_bytes(kernel, tile, arch) > SHARED_LIMIT[arch]:
        return False
    if kernel == "lora_gemm_rotary" and tile.n % _HEAD:
        return False  # it rotates the heads that it holds whole
    if kernel.startswith("lora_gemm"):
        # fp32 accumulators: at most half of a thread's 255 registers, and enough that operands are used often; with
        # dropout a second product is alive beside them, and what it takes. Near a square, where bytes per FLOP are
        # least. And 96 elements of every operand's row on their way.
        per_thread = tile.m * tile.n / (32 * tile.warps)
        least, most = (32, 32) if kernel.endswith("dropout") else (64, 128)
        square = max(tile.m, tile.n) <= 2 * min(tile.m, tile.n)
        return least <= per_thread <= most and square and tile.k * (tile.stages - 1) >= 96
    if kernel in attention.KERNELS and "decode" not in kernel:
        # Likewise: the accumulators, and the scores with what the backward has beside them.
        D, scores = attention.head_dim(kernel), tile.m * tile.n
        outputs, of_scores = {"fwd": (tile.m * D, 1), "dq": (tile.m * D, 2), "dkdv": (2 * tile.n * D, 2)}[
            kernel.split("_")[2]
        ]
        least, most = (40, 96) if "dropout" in kernel else (64, 128)
        return least <= (outputs + of_scores * scores) / (32 * tile.warps) <= most
    return True


def shared_bytes(kernel: str, tile: Tile, arch: int) -> int:
    """The least shared memory that the software pipeline of a kernel takes, for 16-bit operands.

    Triton keeps stages − 1 copies of every operand tile before Hopper, and stages from Hopper on.
    """
    copies = tile.stages if arch >= 90 else tile.stages - 1
    if kernel.startswith("lora_gemm"):
        elements = (tile.m + tile.n) * tile.k
    elif "project" in kernel:
        elements = (tile.m + 16) * tile.k
    elif "reduce" in kernel:
        elements = ((3 if kernel.startswith("swiglu") else 1) * tile.n + 16) * tile.m
    elif kernel in attention.KERNELS:
        elements = 2 * (tile.m if "dkdv" in kernel else tile.n) * attention.head_dim(kernel)
    else:
        return 0
    return 2 * copies * elements
