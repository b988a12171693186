"""y = x Wᵀ + s · (x Aᵀ) Bᵀ with a frozen W (N, K), fp32 adapters of rank R as PEFT keeps them, over M rows.

FLOPs of the products: forward 2·M·N·K + 2·M·R·(K + N), backward 2·M·N·K + 4·M·R·(K + N). Bytes: x, W, y forward; dy,
W, dx, x backward (dA needs x).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from fastlora import reference

from ..case import Case, Inputs, New, Provider, Work
from ..providers import attribute, compiled, foreign, ours

SHAPES = {
    "cpu": [(2048, 1024, 2752, 16), (2048, 2752, 1024, 16)],
    "cuda": [(4096, 4096, 4096, 16), (8192, 4096, 11008, 16), (8192, 11008, 4096, 16), (8192, 4096, 4096, 64)],
    "quick": [(48, 64, 96, 8)],
}
SCALING = 2.0


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for M, K, N, R in SHAPES["quick" if quick else device]:
        e = dtype.itemsize
        yield Case(
            op="lora_linear",
            shape={"M": M, "K": K, "N": N, "R": R},
            inputs=lambda new, shape=(M, K, N, R): _inputs(new, *shape),
            reference=_eager,
            wrt=("x", "lora_a", "lora_b"),
            weights=("weight", "lora_a", "lora_b"),
            forward=Work((M * K + N * K + M * N) * e, 2 * M * N * K + 2 * M * R * (K + N)),
            backward=Work((2 * M * K + N * K + M * N) * e, 2 * M * N * K + 4 * M * R * (K + N)),
            providers=(
                ours("lora_linear", scaling=SCALING),
                Provider("peft fp32 adapters", _peft),
                compiled(_eager),
                Provider("base alone (floor)", _base, witness=_base),
                foreign("unsloth", "unsloth", device, _unsloth),
            ),
        )


def _inputs(new: New, M: int, K: int, N: int, R: int) -> Inputs:
    def master(*shape: int) -> torch.Tensor:
        return new(*shape, scale=shape[-1] ** -0.5).float()

    return {
        "x": new(M, K),
        "weight": new(N, K, scale=K**-0.5),
        "lora_a": master(R, K),
        "lora_b": master(N, R),
    }


def _eager(x, weight, lora_a, lora_b):
    return reference.lora_linear(x, weight, lora_a, lora_b, SCALING)


def _peft(x, weight, lora_a, lora_b):
    """peft.tuners.lora.Linear.forward as it stands, without autocast: x goes to fp32 and stays there."""
    y = F.linear(x, weight)
    wide = x.to(lora_a.dtype)
    return (y + F.linear(F.linear(wide, lora_a), lora_b) * SCALING).to(y.dtype)


def _base(x, weight, lora_a, lora_b):
    """The frozen product alone; the zeros keep the adapters in the graph without a product."""
    return F.linear(x, weight) + (lora_a[0, 0] * 0 + lora_b[0, 0] * 0).to(x.dtype)


def _unsloth():
    function = attribute("unsloth.kernels.fast_lora.LoRA_W")
    return lambda x, weight, lora_a, lora_b: function.apply(x, weight, None, lora_a, lora_b, SCALING)
