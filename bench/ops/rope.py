"""Rotary position embedding of q (1, heads, T, D) and k (1, kv_heads, T, D), as the projections leave them in memory.

Forward and backward each read and write q and k once: 2·T·(heads + kv_heads)·D·e bytes, and the tables 2·T·D·e.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastlora import reference

from ..case import Case, Inputs, New, Work
from ..providers import attribute, compiled, foreign, ours

SHAPES = {
    "cpu": [(2048, 16, 16, 64), (512, 32, 32, 128)],
    "cuda": [(4096, 32, 32, 128), (8192, 64, 8, 128)],
    "quick": [(32, 2, 1, 16)],
}


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for T, heads, kv_heads, D in SHAPES["quick" if quick else device]:
        work = Work((2 * T * (heads + kv_heads) * D + 2 * T * D) * dtype.itemsize, 6 * T * (heads + kv_heads) * D)
        yield Case(
            op="rope",
            shape={"T": T, "heads": heads, "kv_heads": kv_heads, "D": D},
            inputs=lambda new, shape=(T, heads, kv_heads, D): _inputs(new, *shape),
            reference=reference.rope,
            wrt=("q", "k"),
            weights=("cos", "sin"),
            forward=work,
            backward=work,
            providers=(
                ours("rope"),
                compiled(reference.rope),
                foreign("hf", "transformers", device, _hf, needs_gpu=False),
                foreign("liger", "liger_kernel", device, _liger),
            ),
        )


def _inputs(new: New, T: int, heads: int, kv_heads: int, D: int) -> Inputs:
    angles = torch.outer(
        torch.arange(T, device=new.device), 1e4 ** -(torch.arange(0, D, 2, device=new.device) / D)
    ).repeat(1, 2)
    return {
        "q": new(1, T, heads, D).transpose(1, 2),
        "k": new(1, T, kv_heads, D).transpose(1, 2),
        "cos": angles.cos()[None].to(new.dtype),
        "sin": angles.sin()[None].to(new.dtype),
    }


def _hf():
    return attribute("transformers.models.llama.modeling_llama.apply_rotary_pos_emb")


def _liger():
    function = attribute("liger_kernel.ops.rope.LigerRopeFunction")
    return lambda q, k, cos, sin: function.apply(q.clone(), k.clone(), cos, sin)  # it rotates in place
