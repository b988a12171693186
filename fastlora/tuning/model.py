"""A static model of how long a tile takes on an A100: what screening ranks by. Its results are modelled, not measured.

One launch is P equal programs on 108 multiprocessors (SMs), each with a number of them at once (the occupancy, from
registers, shared memory and threads). With n = ⌈P / 108⌉ programs on the busiest SM:

    tensor  n · FLOPs of a program / (312 TFLOP/s / 108), padding of the tile included
    shared  n · bytes its warps read from shared memory for them / (128 B per cycle and SM)
    L2      bytes that all programs load / (70% of 5120 B per cycle)
    memory  bytes of DRAM / (2.04 TB/s · fraction in flight · min(1, 2 P / 108))
    start   ⌈n / occupancy⌉ · 1.5 µs: filling the pipeline and storing the result, which nothing hides in a program

    ms = max(tensor + ½ start where one program has the SM, shared, L2, memory) + start of the first + 3 µs of launch

"Fraction in flight" is how much of the 11 KB that an SM must have on order at a latency of 0.6 µs the pipelines hold.
Tensor-core instructions per shared byte come in through the warp tile: a warp that multiplies wm × wn reads
(wm + wn) · 2 bytes per step of the reduction and does 2 · wm · wn FLOPs with them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..kernels._rows import Tile
from ..kernels._tiles import Call
from . import attention
from .candidates import shared_bytes

SMS, FLOPS, BANDWIDTH, CLOCK = 108, 312e12, 2.04e12, 1.41e9
_REGISTERS, _SHARED, _THREADS = 65536, 167_936, 2048
_IN_FLIGHT = BANDWIDTH / SMS * 0.6e-6
_START, _LAUNCH = 1.5e-6, 3e-6
_L2 = 0.7 * 5120 * CLOCK


def occupancy(registers: int, shared: int, warps: int) -> int:
    """Programs that one SM holds at once: registers come in lots of 256 per warp, and each takes 1 KB more shared."""
    per_warp = math.ceil(32 * registers / 256) * 256
    return max(1, min(_REGISTERS // (per_warp * warps), _SHARED // (shared + 1024), _THREADS // (32 * warps), 32))


def milliseconds(call: Call, tile: Tile, registers: int, shared: int) -> float:
    """The modelled time of a call in 16-bit operands."""
    work = _work(call, tile)
    held = occupancy(registers, shared, tile.warps)
    rounds = math.ceil(work.programs / SMS)
    tensor = rounds * work.flops / (FLOPS / SMS)
    from_shared = rounds * work.shared / (128 * CLOCK)
    at_once = min(held, rounds)
    flight = max(shared_bytes(call.kernel, tile, 80), 32 * tile.warps * 16) * at_once
    memory = work.dram / (BANDWIDTH * min(1.0, flight / _IN_FLIGHT) * min(1.0, 2 * work.programs / SMS))
    l2 = work.l2 / _L2
    start = math.ceil(rounds / held) * _START
    exposed = start / 2 if held == 1 else 0.0
    return 1e3 * (max(tensor + exposed, from_shared, l2, memory) + _START + _LAUNCH)


class _Work(NamedTuple):
    """Programs; what one of them does: FLOPs, and bytes that its warps read from shared memory; bytes of all that come
    from L2, and from DRAM, where every operand is read once."""

    programs: int
    flops: float
    shared: float
    l2: float
    dram: float


def _work(call: Call, tile: Tile) -> _Work:
    m, n, k, r, p = call.m, call.n, call.k, call.r, max(1, call.p)
    # Ranks that one product sees: of a projection.
    together = call.kernel in ("lora_gemm", "lora_gemm_rotary") or call.kernel.endswith("_t")
    ranks = max(1, r // p if together and call.kernel != "lora_gemm_t" else r)
    block = min(tile.r, max(16, 1 << (ranks - 1).bit_length()))
    if call.kernel.startswith("lora_gemm"):
        depth = _up(k, tile.k) + _up(ranks, block)
        programs = math.ceil(m / tile.m) * math.ceil(n / tile.n)
        l2 = 2.0 * programs * (tile.m + tile.n) * depth
        shared = _operands(tile.m, tile.n, tile.warps) * depth
        return _Work(programs, 2.0 * tile.m * tile.n * depth, shared, l2, 2.0 * (m * k + k * n + m * n + r * (m + n)))
    if "project" in call.kernel:
        programs = math.ceil(m / tile.m) * math.ceil(ranks / block) * (p if call.kernel.endswith("_t") else 1)
        depth = k // p if call.kernel.endswith("_t") else k
        passes = {"swiglu_project": 3, "rms_norm_project": 2}.get(call.kernel.removesuffix("_dropout"), 1)
        l2 = 2.0 * programs * (passes * tile.m + block) * depth
        shared = _operands(tile.m, block, tile.warps) * depth
        return _Work(programs, 2.0 * tile.m * block * depth, shared, l2, 2.0 * (passes * m * k + r * (m + k)))
    if "reduce" in call.kernel:
        tiles = math.ceil(n / tile.n) * math.ceil(ranks / block)
        splits = max(1, min(math.ceil(216 / tiles), math.ceil(m / 512)))
        depth = _up(m / splits, tile.m)
        # SwiGLU's has three products, of three tensors read and of what it makes of them, of which it writes two.
        products, written = (3, 2) if call.kernel.startswith("swiglu") else (1, 0)
        l2 = 2.0 * tiles * splits * products * (block + tile.n) * depth
        shared = products * _operands(block, tile.n, tile.warps) * depth
        dram = 2.0 * ((products + written) * m * n + products * m * r) + 8.0 * splits * products * ranks * n
        return _Work(tiles * splits, 2.0 * products * block * tile.n * depth, shared, l2, dram)
    if call.kernel == "swiglu":
        return _Work(math.ceil(n / tile.n), 0.0, 0.0, 12.0 * n, 12.0 * n)
    if call.kernel == "dequantize_4bit":
        return _Work(math.ceil(n / 2 / tile.n), 0.0, 0.0, 2.5 * n, 2.5 * n)
    if call.kernel in attention.KERNELS:
        return _attention_work(call, tile)
    return _Work(m, 0.0, 0.0, 6.0 * m * n, 6.0 * m * n)  # cross_entropy


def _attention_work(call: Call, tile: Tile) -> _Work:
    """Causal: of the other side a program sees half, and half of the tiles on the diagonal in vain. Its warps share
    the rows of the output in lots of 16, each lot reads all of the other side. Beside the tensor cores 64 lanes do a
    dozen operations for a score, and the forward scales its output anew for every tile."""
    T, D, heads, group = call.m, call.k, call.n // call.k, call.p
    T_kv = max(T, attention.DECODE_KEYS) if "decode" in call.kernel else T
    of_keys = "dkdv" in call.kernel
    rows, other = (tile.n, tile.m) if of_keys else (tile.m, tile.n)
    depth = _up(T_kv - T / 2 + rows / 2, other) * (group if of_keys else 1)
    programs = math.ceil(T / rows) * heads // (group if of_keys else 1)
    # Products of the rows with the other side, and tensors of the rows read or written.
    products, tensors = {"dq": (3, 4), "dkdv": (4, 4)}.get(call.kernel.split("_")[2], (2, 2))
    lanes = rows * depth * (12 + (D / other if products == 2 else 0)) / 64
    flops = 2.0 * products * rows * D * depth + lanes * FLOPS / SMS / CLOCK
    l2 = 2.0 * programs * D * (tensors * rows + 2 * depth)
    dram = 2.0 * D * heads * ((tensors if not of_keys else 2) * T + (tensors if of_keys else 2) * T_kv / group)
    shared = 2.0 * min(tile.warps, math.ceil(rows / 16)) * products * D * depth
    return _Work(programs, flops, shared, l2, dram)


def _up(size: float, block: int) -> int:
    return math.ceil(size / block) * block


def _operands(rows: int, columns: int, warps: int) -> float:
    """Bytes that the warps of a program read from shared memory per step of the reduction, in the best split."""
    splits = [(a, warps // a) for a in (1, 2, 4, 8) if a <= warps and rows // a >= 16 and columns // (warps // a) >= 8]
    if not splits:  # more warps than the tile has fragments: they repeat each other's
        return 2.0 * warps * (rows + columns)
    return min(2.0 * warps * (rows / a + columns / b) for a, b in splits)
