"""The second half of a decoder layer: x + down(silu(gate(n)) · up(n)), n = rms_norm(x); fp32 adapters of rank R on all.

FLOPs: 6·M·H·F and LoRA's 6·M·R·(H + F) forward; as much for the base and twice that for LoRA backward. Bytes: x, the
weights, gate and up written and read, and the output once forward; backward gate, up and their gradients read and
written, the weights, x, and the gradients of both ends.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import fastlora.ops
from fastlora import reference

from ..case import Case, Inputs, New, Provider, Work
from ..providers import compiled

# M, hidden, ffn, R
SHAPES = {"cpu": [(2048, 1024, 2752, 16)], "cuda": [(8192, 4096, 11008, 16)], "quick": [(48, 64, 96, 8)]}
NAMES = ("gate", "up", "down")
SCALING, EPS = 2.0, 1e-5


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for M, H, ffn, R in SHAPES["quick" if quick else device]:
        e = dtype.itemsize
        base, lora, weights = 6 * M * H * ffn, 6 * M * R * (H + ffn), 3 * H * ffn
        adapters = tuple(f"{name}_{letter}" for name in NAMES for letter in "ab")
        yield Case(
            op="lora_mlp",
            shape={"M": M, "H": H, "F": ffn, "R": R},
            inputs=lambda new, shape=(M, H, ffn, R): _inputs(new, *shape),
            reference=_eager,
            wrt=("x", *adapters),
            weights=("norm", *(f"{name}_w" for name in NAMES), *adapters),
            forward=Work((2 * M * H + weights + 4 * M * ffn) * e, base + lora),
            backward=Work((4 * M * H + weights + 6 * M * ffn) * e, base + 2 * lora),
            providers=(
                Provider("fastlora", _ours),
                Provider("peft fp32 adapters", _peft),
                compiled(_eager),
            ),
        )


def _inputs(new: New, M: int, H: int, ffn: int, R: int) -> Inputs:
    made: Inputs = {"x": new(M, H), "norm": 1 + new(H, scale=0.1)}
    for name, (n, k) in zip(NAMES, ((ffn, H), (ffn, H), (H, ffn)), strict=True):
        made |= {
            f"{name}_w": new(n, k, scale=k**-0.5),
            f"{name}_a": new(R, k, scale=k**-0.5).float(),
            f"{name}_b": new(n, R, scale=R**-0.5).float(),
        }
    return made


def _through(ops) -> object:
    def run(**inputs):
        branch, projection = fastlora.ops.Branch, fastlora.ops.Projection
        three = (
            projection(inputs[f"{name}_w"], None, (branch(inputs[f"{name}_a"], inputs[f"{name}_b"], SCALING),))
            for name in NAMES
        )
        return ops.lora_mlp(inputs["x"], *three, norm_weight=inputs["norm"], eps=EPS)

    return run


_ours, _eager = _through(fastlora.ops), _through(reference)


def _peft(**inputs):
    """The modules of transformers and PEFT one after the other, without autocast: x goes to fp32 for every adapter."""

    def project(n, name):
        a, b = inputs[f"{name}_a"], inputs[f"{name}_b"]
        base = F.linear(n, inputs[f"{name}_w"])
        return (base + F.linear(F.linear(n.to(a.dtype), a), b) * SCALING).to(base.dtype)

    n = reference.rms_norm(inputs["x"], inputs["norm"], EPS)
    return inputs["x"] + project(reference.swiglu(project(n, "gate"), project(n, "up")), "down")
