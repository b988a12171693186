"""The skinny products of LoRA, which only move bytes: s = x Aᵀ (M·K + M·R numbers) and dA = dsᵀ x (M·K + M·R read)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import fastlora.ops  # noqa: F401  registers the operators

from ..case import Case, Work
from ..providers import Provider

SHAPES = {
    "cpu": [(2048, 1024, 16), (2048, 2752, 16)],
    "cuda": [(M, K, R) for R in (16, 64) for M in (4096, 8192) for K in (4096, 11008)],
    "quick": [(64, 96, 8)],
}


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for M, K, R in SHAPES["quick" if quick else device]:
        e, flops = dtype.itemsize, 2 * M * K * R
        yield Case(
            op="lora_project",
            shape={"M": M, "K": K, "R": R},
            inputs=lambda new, M=M, K=K, R=R: {"x": new(M, K), "a": new(R, K, scale=K**-0.5)},
            reference=lambda x, a: x @ a.t(),
            forward=Work((M * K + R * K + M * R) * e, flops),
            providers=(
                Provider("fastlora", lambda x, a: torch.ops.fastlora.lora_project(x, [a], [1.0], [None])),
                Provider("addmm", lambda x, a: torch.addmm(x.new_zeros(1), x, a.t(), beta=0)),
            ),
        )
        yield Case(
            op="lora_reduce",
            shape={"M": M, "K": K, "R": R},
            inputs=lambda new, M=M, K=K, R=R: {"s": new(M, R), "x": new(M, K)},
            reference=lambda s, x: s.t() @ x,
            forward=Work((M * K + M * R) * e + 4 * R * K, flops),
            providers=(Provider("fastlora", _reduce),),
        )


def _reduce(s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    ranks = s.shape[1]
    return torch.ops.fastlora.lora_reduce(s, x, [ranks], [None]).view(ranks, x.shape[1])
