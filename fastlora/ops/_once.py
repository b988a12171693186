"""Gradients that know that they cannot be differentiated again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward of ``backward(ctx, saved, *grads)``, where saved are ctx's tensors and ``ctx.op`` names the operator.

    Under create_graph=True the gradients come with a node that raises RuntimeError where it is differentiated. It hangs
    on all that they are made of: on incoming gradients, and on saved inputs. A second derivative that did not pass the
    node would be wrong in silence, so an operator whose gradients depend on an input that it does not save, saves a
    ``link`` to it.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors  # once: checkpointing counts
        if not torch.is_grad_enabled():
            return backward(ctx, saved, *grads)
        with torch.no_grad():
            found = backward(ctx, saved, *grads)
        return _refusing(ctx.op, found, (*saved, *grads))

    return run


def link(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor on the graph of x that does not keep x in memory."""
    return x[:0].clone()


def _refusing(op: str, gradients: Any, sources: Sequence[Any]) -> tuple[Any, ...]:
    """The gradients, with a node that raises between them and their sources."""
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    # One input that requires a gradient makes the node; others may have no graph at all.
    leaves = [g if g is None else g.detach().requires_grad_() for g in gradients]
    edges = [t for t in sources if isinstance(t, torch.Tensor) and t.requires_grad]
    text = (
        f"fastlora.ops.{op} has no second derivative: use the plain PyTorch expression there, or call"
        " fastlora.unpatch(model) first"
    )
    node: Any = torch._C._functions.DelayedError(text.encode(), len(leaves) + len(edges))
    return tuple(node(*leaves, *edges)[: len(leaves)])
