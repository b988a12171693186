"""Causal self-attention of B sequences of T tokens, GQA where kv_heads < heads.

q (B, heads, T, D), k and v (B, kv_heads, T, D) are views of projections' outputs, (B, T, ·, D) in memory. The output is
(B, T, heads, D), as the projection after it takes it, so that its gradient is laid out as in a model.

FLOPs: forward 2·B·heads·T²·D (half of the square), backward 2.5 times that, as FlashAttention counts. Bytes: q, k, v,
out forward; those, dout and three gradients backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..case import Case, Inputs, New, Work
from ..providers import Provider, attribute, compiled, foreign, ours

SHAPES = {
    "cpu": [(4, 512, 16, 16, 64), (1, 2048, 16, 16, 64)],
    "cuda": [(1, 4096, 32, 32, 128), (8, 1024, 32, 32, 128), (1, 4096, 64, 8, 128)],
    "quick": [(2, 32, 4, 2, 32)],
}


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for B, T, heads, kv_heads, D in SHAPES["quick" if quick else device]:
        q, kv = B * T * heads * D * dtype.itemsize, B * T * kv_heads * D * dtype.itemsize
        flops = 2 * B * heads * T * T * D
        yield Case(
            op="attention",
            shape={"B": B, "T": T, "heads": heads, "kv_heads": kv_heads, "D": D},
            inputs=lambda new, shape=(B, T, heads, kv_heads, D): heads_of(new, *shape),
            reference=eager,
            wrt=("q", "k", "v"),
            forward=Work(2 * q + 2 * kv, flops),
            backward=Work(4 * q + 4 * kv, 2.5 * flops),
            providers=(
                _ours(),
                *(Provider(f"sdpa {name}", _sdpa(backend)) for name, backend in _backends(device)),
                compiled(eager),
                foreign("flash-attn", "flash_attn", device, _flash_attn),
            ),
        )


def heads_of(new: New, B: int, T: int, heads: int, kv_heads: int, D: int) -> Inputs:
    sizes = {"q": heads, "k": kv_heads, "v": kv_heads}
    return {name: new(B, T, n, D).transpose(1, 2) for name, n in sizes.items()}


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q kᵀ / √D + causal mask) v with the softmax in fp32 at least, as transformers' eager attention.

    Query i sees the keys up to i, of which there may be fewer than queries.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(future, float("-inf"))
    weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1).to(q.dtype)
    return (weights @ v).transpose(1, 2)


def _ours() -> Provider:
    provider = ours("flash_attention")
    return provider if provider.why else Provider("fastlora", lambda q, k, v: provider.run(q, k, v).transpose(1, 2))


def _backends(device: str) -> list[tuple[str, SDPBackend]]:
    named = [("flash", SDPBackend.FLASH_ATTENTION), ("math", SDPBackend.MATH)]
    if device == "cuda":
        named += [("efficient", SDPBackend.EFFICIENT_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)]
    return named


def _sdpa(backend: SDPBackend):
    def run(q, k, v):
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return run


def _flash_attn():
    function = attribute("flash_attn.flash_attn_func")
    return lambda q, k, v: function(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)
