"""Dropout masks as packed bits: bit k % 8 of byte (m, k // 8) says whether element (m, k) is kept."""

from __future__ import annotations

import torch

from ._library import register
from ._tl import cdiv, launch, require_no_capture, tl, triton


@triton.jit
def keep(p_mask, o_m, m_m, i_k, K8, WIDTH: tl.constexpr):
    """The mask of a tile, rows o_m (int64) by WIDTH columns from i_k on, a multiple of 8, as booleans.

    A byte is read once for its eight columns. Kernels that read it for each of them, in the layout of a product, took 3
    to 25 times as long as without a mask (H200).
    """
    o_b = i_k // 8 + tl.arange(0, WIDTH // 8)
    p = p_mask + o_m[:, None] * K8 + o_b[None, :]
    b_byte = tl.load(p, mask=m_m[:, None] & (o_b < K8)[None, :], other=0).to(tl.int32)
    b_bits = (b_byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(b_bits, [o_m.shape[0], WIDTH]) != 0


@triton.jit(do_not_specialize=["seed"])
def _dropout_mask_kernel(p_mask, seed, numel, threshold, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_byte = tl.zeros([BLOCK], dtype=tl.int32)
    # Four 32-bit words of Philox make four bits; the 64-bit index of the element is the counter.
    for half in tl.static_range(2):
        counter = o * 8 + 4 * half
        low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
        zero = low * 0
        r0, r1, r2, r3 = tl.philox(seed, low, high, zero, zero)
        b_byte |= (r0 >= threshold).to(tl.int32) << (4 * half)
        b_byte |= (r1 >= threshold).to(tl.int32) << (4 * half + 1)
        b_byte |= (r2 >= threshold).to(tl.int32) << (4 * half + 2)
        b_byte |= (r3 >= threshold).to(tl.int32) << (4 * half + 3)
    tl.store(p_mask + o, b_byte.to(tl.uint8), mask=o < numel)


def dropout_mask(like: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """Bits (M, ⌈K/8⌉) uint8 for like (M, K): each kept with probability 1 − p, a function of the seed alone.

    seed is an int64 scalar on the CPU, so that drawing it from torch's generator waits for no device.
    """
    M, K = like.shape
    mask = torch.empty((M, cdiv(K, 8)), dtype=torch.uint8, device=like.device)
    threshold = min(round(p * 2**32), 2**32 - 1)
    n = mask.numel()
    require_no_capture("dropout")
    launch(_dropout_mask_kernel, (cdiv(n, 1024),), mask, int(seed), n, threshold, BLOCK=1024, num_warps=4)
    return mask


def _signed(n: int) -> int:
    return n - (1 << 64) if n >> 63 else n


def _mix(z):
    """SplitMix64's bijection of 64-bit integers, as in csrc; a right shift of a signed integer brings in its sign."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _bits(device: torch.device) -> torch.Tensor:
    """1, 2, 4 … 128, made on the device: a copy from the host would wait."""
    return 1 << torch.arange(8, dtype=torch.uint8, device=device)


def _mask_aten(like, seed, p):
    M, K8 = like.shape[0], cdiv(like.shape[1], 8)
    pairs = torch.arange(M * K8 * 4, device=like.device)
    random = _mix(_mix(seed.to(like.device)) + pairs * _signed(0x9E3779B97F4A7C15))
    # The lower word first; the sign bit flipped makes an unsigned comparison of a signed one.
    words = random.view(torch.int32) ^ -(1 << 31)
    kept = (words > max(1, round(p * 2**32)) - 1 - (1 << 31)).view(M, K8, 8)
    return (kept * _bits(like.device)).sum(-1, dtype=torch.uint8)


def _apply_aten(x, mask):
    bits = (mask[:, :, None] & _bits(mask.device)).ne_(0).flatten(1)[:, : x.shape[1]]
    return x * bits


def apply_mask(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x (M, K) where its bit is set and 0 elsewhere; x itself without a mask."""
    return x if mask is None else torch.ops.fastlora.apply_mask(x, mask)


register(
    "dropout_mask(Tensor like, Tensor seed, float p) -> Tensor",
    triton=dropout_mask,
    aten=_mask_aten,
    fake=lambda like, seed, p: like.new_empty(like.shape[0], cdiv(like.shape[1], 8), dtype=torch.uint8),
    flops=None,
    cuda_graphs=False,
)
# Inside the fused kernels masks are read by keep(); this serves where a library's GEMM does the product.
register(
    "apply_mask(Tensor x, Tensor mask) -> Tensor",
    triton=_apply_aten,
    aten=_apply_aten,
    fake=lambda x, mask: torch.empty_like(x),
    flops=None,
)
