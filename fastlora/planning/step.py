"""The bytes that one training step adds to a model, from the number of tokens."""

from __future__ import annotations

from ..kernels.linear_cross_entropy import CHUNK_BYTES
from . import activations
from .activations import POLICIES, Adapters
from .policies import StepBytes
from .shapes import Shape


def step_bytes(
    shape: Shape,
    adapters: Adapters,
    tokens: int,
    *,
    itemsize: int = 2,
    residual_itemsize: int | None = None,
    device: str = "cuda",
    fused: bool = True,
    fused_loss: bool = True,
) -> StepBytes:
    """What a step of ``tokens`` tokens adds, by policy.

    Args:
        itemsize, residual_itemsize: as in activations.saved.
        device: "cuda" or "cpu", by which the loss chooses its chunk.
        fused: the layers run fused; False: as transformers and PEFT compute them.
        fused_loss: the loss never holds the logits; False: it holds them, and their gradient, in fp32 and in the dtype.
    """
    kept, work = activations.saved, activations.workspace
    if not fused:
        kept, work = activations.peft_saved, activations.peft_workspace
    layer = {p: tokens * sum(kept(shape, adapters, p, itemsize, residual_itemsize).values()) for p in POLICIES}
    if not fused and itemsize < 4:  # autocast's copies of A and B
        layer[activations.KEEP] += itemsize * adapters.parameters(shape)
    hidden = float(tokens * shape.hidden * itemsize)
    return StepBytes(layer, tokens * work(shape, itemsize), hidden + loss_bytes(
        shape, tokens, itemsize, residual_itemsize, device, fused_loss
    ), hidden)  # fmt: skip


def loss_bytes(
    shape: Shape, tokens: int, itemsize: int, residual_itemsize: int | None, device: str, fused: bool
) -> float:
    """What the last norm and the loss hold at once, beside the norm's output."""
    x = tokens * (shape.hidden * (residual_itemsize or itemsize) + 4.0)
    logits = tokens * shape.vocab
    if not fused:
        return x + tokens * shape.hidden * 4.0 + logits * (itemsize * 2 + 8.0)
    chunk = min(logits * itemsize, CHUNK_BYTES[device])
    return x + tokens * shape.hidden * itemsize + chunk
