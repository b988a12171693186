"""A linear map's place in the graph. Its value is the caller's to make, now or later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _LinearNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, make: Any, check: Any) -> Any:
        # An engine passes no gradient for an output outside the loss: zeros in its place would be as large as it is.
        ctx.set_materialize_grads(False)
        # Not save_for_backward: hooks on saved tensors would copy both in each step, for a backward that rarely runs.
        ctx.factors, ctx.dtype, ctx.check = (x, weight), dtype, check
        return make()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None) -> Any:
        if dy is None:
            return None, None, None, None, None
        ctx.check()
        x, weight = ctx.factors
        need_dx, need_dw, *_ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = (rows @ weight.to(ctx.dtype)).view(x.shape) if need_dx else None
        dw = rows.t() @ x.reshape(-1, x.shape[-1]).to(ctx.dtype) if need_dw else None
        return dx, dw, None, None, None  # autograd casts to the dtypes of x and weight


def linear_node(
    x: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype,
    make: Callable[[], torch.Tensor],
    check: Callable[[], None],
) -> torch.Tensor:
    """What ``make()`` returns, in the graph as ``y = x weightᵀ``: dx = dy weight, dweight = dyᵀ x.

    In torch's operators, so that gradients of gradients work. Both factors are held, and not saved for backward.

    Args:
        x: (..., H).
        weight: (V, H).
        dtype: of y and dy, to which both are cast.
        make: gives y, (..., V), without a graph.
        check: is called in the backward, to raise where x or weight has changed.
    """
    return _LinearNode.apply(x, weight, dtype, make, check)
