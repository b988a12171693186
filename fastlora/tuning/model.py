"""A static model of how long a tile takes on an A100: what screening ranks by. Its results are modelled, not measured.

One launch is P equal programs on 108 multiprocessors (SMs), each with a number of them at once (the occupancy, from
registers, shared memory and threads). With n = ⌈P / 108⌉ programs on the busiest SM:

    tensor  n · FLOPs of a program / (312 TFLOP/s / 108), padding of the tile included
    shared  n · bytes its warps read from shared memory for them / (128 B per cycle and SM)
    memory  bytes of DRAM / (2.04 TB/s · fraction in flight · min(1, 2 P / 108))
    start   ⌈n / occupancy⌉ · 1.5 µs: filling the pipeline and storing the result, which nothing hides in a program

    ms = max(tensor + ½ start where one program has the SM, shared, memory) + start of the first + 3 µs of launch

"Fraction in flight" is how much of the 11 KB that an SM must have on order at a latency of 0.6 µs the pipelines hold.
Tensor-core instructions per shared byte come in through the warp tile: a warp that multiplies wm × wn reads
(wm + wn) · 2 bytes per step of the reduction and does 2 · wm · wn FLOPs with them.
"""

from __future__ import annotations

import math

from ..kernels._rows import Tile
from ..kernels._tiles import Call
from .candidates import shared_bytes

SMS, FLOPS, BANDWIDTH, CLOCK = 108, 312e12, 2.04e12, 1.41e9
_REGISTERS, _SHARED, _THREADS = 65536, 167_936, 2048
_IN_FLIGHT = BANDWIDTH / SMS * 0.6e-6
_START, _LAUNCH = 1.5e-6, 3e-6


def occupancy(registers: int, shared: int, warps: int) -> int:
    """Programs that one SM holds at once: registers come in lots of 256 per warp, and each takes 1 KB more shared."""
    per_warp = math.ceil(32 * registers / 256) * 256
    return max(1, min(_REGISTERS // (per_warp * warps), _SHARED // (shared + 1024), _THREADS // (32 * warps), 32))


def milliseconds(call: Call, tile: Tile, registers: int, shared: int) -> float:
    """The modelled time of a call in 16-bit operands."""
    programs, flops, shared_read, dram = _work(call, tile)
    held = occupancy(registers, shared, tile.warps)
    rounds = math.ceil(programs / SMS)
    tensor = rounds * flops / (FLOPS / SMS)
    from_shared = rounds * shared_read / (128 * CLOCK)
    at_once = min(held, rounds)
    flight = max(shared_bytes(call.kernel, tile, 80), 32 * tile.warps * 16) * at_once
    memory = dram / (BANDWIDTH * min(1.0, flight / _IN_FLIGHT) * min(1.0, 2 * programs / SMS))
    start = math.ceil(rounds / held) * _START
    exposed = start / 2 if held == 1 else 0.0
    return 1e3 * (max(tensor + exposed, from_shared, memory) + _START + _LAUNCH)


def _work(call: Call, tile: Tile) -> tuple[int, float, float, float]:
    """Programs; FLOPs and shared bytes read by one; DRAM bytes of all, every operand once."""
    m, n, k, r, p = call.m, call.n, call.k, call.r, max(1, call.p)
    block = min(tile.r, max(16, 1 << max(0, (r if "reduce" == call.kernel[5:11] else r // p) - 1).bit_length()))
    if call.kernel.startswith("lora_gemm"):
        rank = r / p if call.kernel == "lora_gemm" else r
        depth = _up(k, tile.k) + _up(rank, block)
        programs = math.ceil(m / tile.m) * math.ceil(n / tile.n)
        bytes_ = 2 * (m * k + k * n + m * n + r * (m + n))
        return programs, 2 * tile.m * tile.n * depth, _operands(tile.m, tile.n, tile.warps) * depth, bytes_
    if "project" in call.kernel:
        block = min(tile.r, max(16, 1 << max(0, (r // p if call.kernel.endswith("_t") else r) - 1).bit_length()))
        columns = math.ceil(r / block)
        programs = math.ceil(m / tile.m) * columns
        reads = {"swiglu_project": 3, "rms_norm_project": 2}.get(call.kernel.removesuffix("_dropout"), 1)
        mine = k / p if call.kernel.endswith("_t") else k
        # Rows beyond the first block of ranks, and A itself, come from L2 as often as there are programs.
        l2 = 2 * programs * mine * block / 4
        dram = 2 * (reads * m * k + r * (m + k)) + l2
        return programs, 2 * tile.m * block * _up(mine, tile.k), _operands(tile.m, block, tile.warps) * mine, dram
    if "reduce" in call.kernel:
        wide = r if not call.kernel.endswith("_t") else r // p
        block = min(tile.r, max(16, 1 << max(0, wide - 1).bit_length()))
        tiles = math.ceil(n / tile.n) * math.ceil(wide / block)
        splits = max(1, min(math.ceil(216 / tiles), math.ceil(m / 512)))
        rows = m / splits
        dram = 2 * (m * n * math.ceil(wide / block) + m * r) + 8 * splits * wide * n
        return tiles * splits, 2 * block * tile.n * rows, _operands(block, tile.n, tile.warps) * rows, dram
    if call.kernel == "swiglu":
        return math.ceil(n / tile.n), 0.0, 0.0, 2 * 6 * n
    return m, 0.0, 0.0, 2 * 3 * m * n  # cross_entropy


def _up(size: float, block: int) -> int:
    return math.ceil(size / block) * block


def _operands(rows: int, columns: int, warps: int) -> float:
    """Bytes that the warps of a program read from shared memory per step of the reduction, in the best split."""
    splits = [(a, warps // a) for a in (1, 2, 4, 8) if a <= warps and rows // a >= 16 and columns // (warps // a) >= 8]
    if not splits:  # more warps than the tile has fragments: they repeat each other's
        return 2.0 * warps * (rows + columns)
    return min(2.0 * warps * (rows / a + columns / b) for a, b in splits)
