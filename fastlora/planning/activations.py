"""What one decoder layer keeps for backward, per token, by kind; of fastlora and of PEFT's own code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .shapes import PROJECTIONS, Shape

# What becomes of a layer: kept whole, its MLP recomputed in the backward, or checkpointed: all of it recomputed.
KEEP, MLP, LAYER = "keep", "mlp", "layer"
POLICIES = (KEEP, MLP, LAYER)
_MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Adapters:
    """LoRA on some projections: (name, rank) of each, and the probability of dropout."""

    ranks: tuple[tuple[str, int], ...]
    dropout: float = 0.0

    @classmethod
    def uniform(cls, rank: int, targets: Iterable[str] = PROJECTIONS, dropout: float = 0.0) -> Adapters:
        """The same rank on every projection of ``targets``."""
        return cls(tuple((name, rank) for name in targets), dropout)

    def parameters(self, shape: Shape) -> int:
        """Numbers in A (R, K) and B (N, R) of one layer."""
        sizes = shape.projections()
        return sum(rank * sum(sizes[name]) for name, rank in self.ranks)


def saved(
    shape: Shape, adapters: Adapters, policy: str = KEEP, itemsize: int = 2, residual_itemsize: int | None = None
) -> dict[str, float]:
    """Bytes per token that a fused layer keeps for backward, by kind.

    Kept whole: the input of both blocks, q, k, v and the attention output with its log-sum-exp, gate and up, s = x Aᵀ
    of every adapter, dropout masks as bits, 1/rms of both norms. docs/numerics.md says of each operator what it saves.

    Args:
        itemsize: bytes of a number of the products' dtype.
        residual_itemsize: of the residual stream, where autocast makes them differ.
    """
    residual = shape.hidden * (residual_itemsize or itemsize)
    if policy == LAYER:
        return {"residuals": residual}
    mine = [(n, r) for n, r in adapters.ranks if policy == KEEP or n not in _MLP_PROJECTIONS]
    kept = {
        "residuals": 2 * residual,
        "q, k, v": itemsize * (shape.q + 2 * shape.kv),
        "attention output": itemsize * shape.q,
        "log-sum-exp": 4 * shape.heads,
        "gate, up": itemsize * 2 * shape.ffn if policy == KEEP else 0,
        "s": itemsize * sum(rank for _, rank in mine),
        "dropout masks": _masks(shape, mine) if adapters.dropout else 0,
        "rstd": 4 * (2 if policy == KEEP else 1),
    }
    return {kind: float(size) for kind, size in kept.items() if size}


def _masks(shape: Shape, ranks: list[tuple[str, int]]) -> int:
    sizes = shape.projections()
    return sum(-(-sizes[name][1] // 8) for name, _ in ranks)


def peft_saved(
    shape: Shape, adapters: Adapters, policy: str = KEEP, itemsize: int = 2, residual_itemsize: int | None = None
) -> dict[str, float]:
    """As ``saved``, of transformers' and PEFT's own layer with fp32 adapters under autocast.

    The norms keep x in fp32, every adapter its own copy of its input, and SwiGLU silu(gate) beside gate and up.
    """
    residual = shape.hidden * (residual_itemsize or itemsize)
    if policy == LAYER:
        return {"residuals": residual}
    sizes = shape.projections()
    inputs = sum(sizes[name][1] for name, _ in adapters.ranks)
    kept = {
        "residuals": 8 * shape.hidden,
        "q, k, v": itemsize * (shape.q + 2 * shape.kv),
        "attention output": itemsize * shape.q,
        "log-sum-exp": 4 * shape.heads,
        "gate, up": itemsize * 3 * shape.ffn,
        "inputs of adapters": itemsize * inputs,
        "s": itemsize * sum(rank for _, rank in adapters.ranks),
        "dropout masks": inputs if adapters.dropout else 0,
        "rstd": 8,
    }
    return {kind: float(size) for kind, size in kept.items() if size}


def workspace(
    shape: Shape, adapters: Adapters, itemsize: int = 2, residual_itemsize: int | None = None
) -> tuple[float, float]:
    """Bytes per token, and beside them, that live where a layer's backward needs most: in that of SwiGLU.

    Per token: the gradient of the layer's output, in the products' dtype too where that is another; dh, dgate and dup;
    ds of down_proj. Beside them: dA of down_proj and dB of gate_proj and up_proj, in fp32.
    """
    residual = residual_itemsize or itemsize
    ranks = dict(adapters.ranks)
    output = shape.hidden * (residual + (itemsize if residual != itemsize else 0))
    reduced = sum(ranks.get(name, 0) for name in _MLP_PROJECTIONS)
    return float(output + itemsize * (3 * shape.ffn + ranks.get("down_proj", 0))), 4.0 * reduced * shape.ffn


def peft_workspace(
    shape: Shape, adapters: Adapters, itemsize: int = 2, residual_itemsize: int | None = None
) -> tuple[float, float]:
    """As ``workspace``, of PEFT: the gradient of down_proj's input comes once from W and once, in fp32, from A."""
    return float((residual_itemsize or itemsize) * shape.hidden + (2 * itemsize + 8) * shape.ffn), 0.0


def recomputed_flops(shape: Shape, adapters: Adapters, policy: str, sequence: int) -> float:
    """FLOPs per token that the backward of one layer computes a second time."""
    if policy == KEEP:
        return 0.0
    sizes = shape.projections()
    names = _MLP_PROJECTIONS if policy == MLP else PROJECTIONS
    flops = 2.0 * sum(sizes[name][0] * sizes[name][1] for name in names)
    flops += 2.0 * sum(rank * sum(sizes[name]) for name, rank in adapters.ranks if name in names)
    return flops + (2.0 * sequence * shape.q if policy == LAYER else 0.0)
