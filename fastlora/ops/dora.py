from __future__ import annotations

import torch

from . import _check
from ._once import once
from ._transforms import refuse


class _Dora(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, g, bias):
        ctx.op = "dora"
        ctx.save_for_backward(y, g)
        ctx.bias_dtype = None if bias is None else bias.dtype
        scaled = y * g if bias is None else torch.addcmul(bias.to(g.dtype), y, g)
        # A second name for the result, as .to() of its own dtype gives, costs it its gradient in torch 2.11's compile:
        # pytorch/pytorch#180642.
        return scaled if scaled.dtype == y.dtype else scaled.to(y.dtype)

    @staticmethod
    @once
    def backward(ctx, saved, dout):
        y, g = saved
        dy = (dout * g).to(y.dtype) if ctx.needs_input_grad[0] else None
        dg = torch.einsum("mn,mn->n", dout.to(g.dtype), y.to(g.dtype)) if ctx.needs_input_grad[1] else None
        dbias = dout.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dy, dg, dbias


def _cross(weight, lora_a):
    """W Aᵀ (N, R) in fp32, W being read once and widened nowhere, or on the CPU a few rows at a time."""
    if weight.dtype == torch.float32:
        return weight @ lora_a.float().t()
    if not weight.is_cuda:
        return torch.cat([rows.float() @ lora_a.float().t() for rows in weight.split(128)])
    parts, left = [], lora_a.float()
    for _ in range(1 if lora_a.dtype == weight.dtype else 3):  # A is the sum of three numbers of W's dtype
        parts.append(left.to(weight.dtype))
        left = left - parts[-1]
    products = torch.mm(weight, torch.cat(parts).t(), out_dtype=torch.float32)
    return products.view(len(weight), len(parts), -1).sum(1)


@torch.no_grad()
def _column_norms(weight, lora_a, lora_b, scaling):
    """‖W + s B A‖ of each row, fp32, without the sum: ‖W‖² + 2s (W Aᵀ)·B + s² (B A Aᵀ)·B."""
    a, b = lora_a.double(), lora_b.double()  # small, and the three terms may cancel
    base = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).square()
    with torch.autocast(weight.device.type, enabled=False):
        cross = _cross(weight, lora_a).double()
    squares = base + scaling * (b * (2 * cross + scaling * (b @ (a @ a.t())))).sum(1)
    return squares.clamp(min=0).sqrt().float()


def dora(
    y: torch.Tensor,
    magnitude: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weight-decomposed LoRA from its direction: ``out = (m / ‖W + s B A‖) · y + bias``, y = x Wᵀ + s x Aᵀ Bᵀ.

    The norm is taken per output, held constant in the backward as the paper proposes, and never materialises
    W + s B A: its square is a sum of products of rank R.

    Args:
        y: (..., N), without bias.
        magnitude: m, (N,).
        weight: W, (N, K). lora_a: A, (R, K). lora_b: B, (N, R). No gradient flows to them from here.
        scaling: s.
        bias: (N,).

    Returns:
        (..., N), dtype of y. Saved for backward: y and one number per output.

    Raises:
        ValueError: a wrong shape or device, by the name of the argument.

    Source: Liu et al., DoRA, arXiv:2402.09353, section 4.3.
    """
    refuse("dora")
    N = y.shape[-1]
    _check.shape("dora", "weight", weight, (N, None), "as (N, K) with N the last dimension of y")
    _check.shape("dora", "magnitude", magnitude, (N,), "to match the last dimension of y")
    _check.shape("dora", "lora_a", lora_a, (None, weight.shape[1]), "as (R, K)")
    _check.shape("dora", "lora_b", lora_b, (N, lora_a.shape[0]), "as (N, R)")
    if bias is not None:
        _check.shape("dora", "bias", bias, (N,), "to match the last dimension of y")
    _check.same_device("dora", "y", y, magnitude=magnitude, weight=weight, lora_a=lora_a, lora_b=lora_b, bias=bias)
    norms = _column_norms(weight, lora_a, lora_b, scaling)
    return _Dora.apply(y.reshape(-1, N), magnitude.float() / norms, bias).view(y.shape)
