"""The bytes that one training step adds to a model, from the number of tokens."""

from __future__ import annotations

from . import activations
from .activations import POLICIES, Adapters
from .policies import StepBytes
from .shapes import Shape


def step_bytes(
    shape: Shape,
    adapters: Adapters,
    tokens: int,
    sequence: int,
    *,
    itemsize: int = 2,
    residual_itemsize: int | None = None,
    device: str = "cuda",
    fused: bool = True,
    fused_loss: bool = True,
) -> StepBytes:
    """What a step of ``tokens`` tokens adds, by policy.

    Args:
        sequence: tokens of one row, for the rotary tables and positions.
        itemsize: bytes of a number of the products' dtype.
        residual_itemsize: of the residual stream, where autocast makes them differ.
        device: "cuda" or "cpu", by which the loss chooses its chunk.
        fused: the layers run fused; False: as transformers and PEFT compute them.
        fused_loss: the loss never holds the logits; False: it holds them, and their gradient, in fp32 and in the dtype.
    """
    residual = residual_itemsize or itemsize
    kept, work = activations.saved, activations.workspace
    if not fused:
        kept, work = activations.peft_saved, activations.peft_workspace
    layer = {p: tokens * sum(kept(shape, adapters, p, itemsize, residual).values()) for p in POLICIES}
    if not fused and itemsize < 4:  # autocast's copies of A and B
        layer[activations.KEEP] += itemsize * adapters.parameters(shape)
    per_token, beside = work(shape, adapters, itemsize, residual)
    # The last norm's output, which the caller may still read logits from; cos, sin and positions; loss and divisor.
    outside = float(tokens * shape.hidden * residual + sequence * (2 * shape.head_dim * residual + 8) + 8)
    loss = loss_bytes(shape, tokens, itemsize, residual, device, fused_loss)
    return StepBytes(layer, tokens * per_token + beside, outside + loss, outside)


def loss_bytes(shape: Shape, tokens: int, itemsize: int, residual: int, device: str, fused: bool) -> float:
    """What the last norm and the loss hold at once, beside the norm's output."""
    from ..kernels.linear_cross_entropy import chunk_rows  # here, so that planning itself imports no torch

    x = tokens * (shape.hidden * residual + 4.0)
    if not fused:
        return x + tokens * shape.hidden * 4.0 + tokens * shape.vocab * (itemsize * 2 + 8.0)
    copy = itemsize if residual != itemsize else 0
    logits = min(tokens, chunk_rows(device, shape.vocab, itemsize)) * shape.vocab * itemsize
    return x + tokens * shape.hidden * (itemsize + copy) + logits
