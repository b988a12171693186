"""Seconds of one training step: every kind of work over the rate it reaches, one after the other."""

from __future__ import annotations

from collections.abc import Mapping

from .activations import LAYER, MLP, Adapters, recomputed_flops
from .gpus import GPU
from .shapes import Shape

# Bytes moved per number of a 4-bit weight made bf16: half a byte and its scale read, two bytes written.
_DEQUANTISE = 2.56


def elementwise_bytes(shape: Shape, fused: bool) -> float:
    """Bytes that one layer's elementwise kernels move per token, forward and backward, in bf16.

    Every tensor once per kernel, as ``python -m bench launches`` counts them.
    """
    H, q, kv, F = shape.hidden, shape.q, shape.kv, shape.ffn
    if fused:
        return 16.0 * H + 4 * q + 4 * kv + 10 * F + 4 * shape.head_dim
    return 450.0 * H + 107 * q + 80 * kv + 86 * F


def skinny_bytes(shape: Shape, adapters: Adapters, fused: bool) -> float:
    """Bytes that the products with A and B of one layer move per token; as elementwise_bytes."""
    H, q, kv, F = shape.hidden, shape.q, shape.kv, shape.ffn
    ranks = sum(rank for _, rank in adapters.ranks)
    if fused:
        every = 22.0 * H + 6 * q + 8 * kv + 10 * F
    else:
        every = 42.0 * H + 12 * q + 12 * kv + 18 * F
    # In proportion to the widths that carry an adapter, all of which the counts are of.
    sizes = shape.projections()
    share = sum(sum(sizes[name]) for name, _ in adapters.ranks) / sum(map(sum, sizes.values()))
    return every * share + (8 if fused else 12) * ranks


def seconds(
    shape: Shape,
    adapters: Adapters,
    gpu: GPU,
    *,
    tokens: int,
    sequence: int,
    layers: Mapping[str, int],
    fused: bool = True,
    quantised: bool = False,
    gathered: float = 0.0,
    updated: float = 0.0,
    reduced: float = 0.0,
) -> dict[str, float]:
    """Seconds of one step of ``tokens`` tokens on one GPU, by kind of work.

    Time on the host, and gaps between kernels, are not in it: below about 2000 tokens a step is slower than this.

    Args:
        layers: how many layers follow each policy.
        gathered: bytes of weights that the step fetches from the other GPUs, beside the computation.
        updated: numbers that this GPU's optimizer updates; AdamW reads and writes 28 bytes of each.
        reduced: bytes of gradients that it exchanges.
    """
    rate = {name: one.value for name, one in gpu.rates.items()}
    frozen = shape.layers * shape.layer_weights() + shape.vocab * shape.hidden
    scores = 2.0 * sequence * shape.q * shape.layers
    moved = elementwise_bytes(shape, fused)
    head = (4.0 if fused else 42.0) * shape.vocab
    again = {policy: recomputed_flops(shape, adapters, policy, sequence) for policy in (MLP, LAYER)}
    anew = layers.get(LAYER, 0) * 2.0 * sequence * shape.q
    products = sum(layers.get(policy, 0) * flops for policy, flops in again.items()) - anew
    # The forward moves a third of a layer's bytes, about half of that in the MLP.
    passes = moved * (layers.get(LAYER, 0) / 3 + layers.get(MLP, 0) / 6)
    weights = shape.layers * shape.layer_weights()
    mlp = shape.layer_weights() * 0.67 * layers.get(MLP, 0) + shape.layer_weights() * layers.get(LAYER, 0)
    parts = {
        "base products": tokens * 4.0 * frozen / rate["gemm"],
        "adapters": tokens * shape.layers * skinny_bytes(shape, adapters, fused) / rate["skinny products"],
        "attention": tokens * scores * (1 / rate["attention forward"] + 2.5 / rate["attention backward"]),
        "elementwise": tokens * (shape.layers * moved + head) / rate["elementwise"],
        "recomputation": tokens
        * (products / rate["gemm"] + anew / rate["attention forward"] + passes / rate["elementwise"]),
        "dequantisation": _DEQUANTISE * (2 * weights + mlp) / rate["elementwise"] if quantised else 0.0,
        "optimizer": 28.0 * updated / rate["elementwise"],
    }
    # Weights are fetched while layers compute; gradients of adapters are small, and wait.
    exposed = max(0.0, gathered / rate["link"] - sum(parts.values()))
    parts["communication"] = exposed + reduced / rate["link"]
    return {kind: time for kind, time in parts.items() if time}
