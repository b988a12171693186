"""Projections that share an input, with the norm that makes that input; fp32 adapters, rank R.

qkv       q, k, v = LoRA projections of rms_norm(x)          P = 3, N each
gate_up   gate, up = LoRA projections of rms_norm(x)         P = 2, N each
q_v       as qkv, k without an adapter: PEFT's own default targets

FLOPs: 2·M·N·K·P and LoRA's 2·M·R·(K + N)·P forward; as much for the base and twice that for LoRA backward. Bytes:
inputs, weights and outputs once forward; outputs' gradients, weights, inputs and their gradients backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import fastlora.ops
from fastlora import reference

from ..case import Case, Inputs, New, Provider, Work
from ..providers import compiled

SHAPES = {
    "cpu": [("qkv", 2048, 1024, 1024, 16), ("gate_up", 2048, 1024, 2752, 16)],
    "cuda": [("qkv", 8192, 4096, 4096, 16), ("gate_up", 8192, 4096, 11008, 16)],
    "quick": [("qkv", 48, 64, 64, 8), ("gate_up", 48, 64, 96, 8), ("q_v", 48, 64, 64, 8)],
}
_P = {"qkv": 3, "gate_up": 2, "q_v": 3}
_BARE = {"q_v": (1,)}  # projections without an adapter
SCALING, EPS = 2.0, 1e-5


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for block, M, K, N, R in SHAPES["quick" if quick else device]:
        e, P = dtype.itemsize, _P[block]
        adapted = [i for i in range(P) if i not in _BARE.get(block, ())]
        inner, outer = M * K, M * N * P
        base, lora = 2 * M * N * K * P, 2 * M * R * (K + N) * len(adapted)
        adapters = tuple(f"{letter}{i}" for letter in "ab" for i in adapted)
        names = [*(f"w{i}" for i in range(P)), *adapters]
        yield Case(
            op=f"lora_group {block}",
            shape={"M": M, "K": K, "N": N, "R": R},
            inputs=lambda new, shape=(block, M, K, N, R): _inputs(new, *shape),
            reference=_eager,
            wrt=("x", *adapters),
            weights=(*names, "norm"),
            forward=Work((inner + N * K * P + outer) * e, base + lora),
            backward=Work((2 * inner + N * K * P + outer) * e, base + 2 * lora),
            providers=(
                Provider("fastlora", _ours),
                Provider("peft fp32 adapters", _peft),
                compiled(_eager),
                Provider("base alone (floor)", _base, witness=_base),
            ),
        )


def _inputs(new: New, block: str, M: int, K: int, N: int, R: int) -> Inputs:
    made: Inputs = {"x": new(M, K), "norm": 1 + new(K, scale=0.1)}
    for i in range(_P[block]):
        made[f"w{i}"] = new(N, K, scale=K**-0.5)
        if i not in _BARE.get(block, ()):
            made |= {f"a{i}": new(R, K, scale=K**-0.5).float(), f"b{i}": new(N, R, scale=R**-0.5).float()}
    return made


def _projections(inputs: Inputs) -> list[tuple]:
    return [
        fastlora.ops.Projection(
            inputs[f"w{i}"],
            None,
            (fastlora.ops.Branch(inputs[f"a{i}"], inputs[f"b{i}"], SCALING),) if f"a{i}" in inputs else (),
        )
        for i in range(sum(name[0] == "w" for name in inputs))
    ]


def _through(ops) -> object:
    def run(**inputs):
        return ops.lora_group(inputs["x"], _projections(inputs), norm_weight=inputs["norm"], eps=EPS)[:-1]

    return run


_ours, _eager = _through(fastlora.ops), _through(reference)


def _peft(**inputs):
    """The modules of transformers and PEFT one after the other, without autocast: x goes to fp32 for every adapter."""
    n = reference.rms_norm(inputs["x"], inputs["norm"], EPS)
    y = []
    for w, _, branches in _projections(inputs):
        base = F.linear(n, w)
        low = [F.linear(F.linear(n.to(a.dtype), a), b) * scaling for a, b, scaling, _ in branches]
        y.append((base + low[0]).to(base.dtype) if low else base)
    return tuple(y)


def _base(**inputs):
    """Without adapters; zeros keep them in the graph without a product."""
    n = reference.rms_norm(inputs["x"], inputs["norm"], EPS)
    y = []
    for w, _, branches in _projections(inputs):
        y.append(F.linear(n, w) + sum((a[0, 0] * 0 + b[0, 0] * 0).to(n.dtype) for a, b, _, _ in branches))
    return tuple(y)
