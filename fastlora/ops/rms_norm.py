from __future__ import annotations

import torch

from ..kernels import rms_norm as _kernels  # noqa: F401  registers the operators
from . import _check
from ._once import once
from ._transforms import refuse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, rstd = torch.ops.fastlora.rms_norm_fwd(x, weight, eps)
        ctx.op = "rms_norm"
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once
    def backward(ctx, saved, dy):
        x, weight, rstd = saved
        dx, dw, _ = torch.ops.fastlora.rms_norm_bwd(
            dy.contiguous(), x, weight, rstd, None, ctx.needs_input_grad[1], False
        )
        return dx, dw if ctx.needs_input_grad[1] else None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Root mean square normalisation over the last dimension.

    ``y = weight · round(x · (mean(x²) + eps)^-½)``: statistics in fp32, and Hugging Face's rounding order, in which
    the normalised x takes its own dtype before it is scaled.

    Args:
        x: (..., H), fp32, bf16 or fp16.
        weight: (H,), fp32, bf16 or fp16, whatever x is.
        eps: added to the mean square.

    Returns:
        (..., H) in the dtype of weight · x, which of bf16 and fp16 is fp32. Saved for backward: x and one fp32 number
        per row.

    Raises:
        ValueError, TypeError: a wrong shape or device, or dtype, by the name of the argument.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
    """
    refuse("rms_norm")
    _check.dtype("rms_norm", "x", x, _check.FLOATS)
    _check.shape("rms_norm", "weight", weight, (x.shape[-1],), "to match the last dimension of x")
    _check.dtype("rms_norm", "weight", weight, _check.FLOATS)
    _check.same_device("rms_norm", "x", x, weight=weight)
    weight = _check.widened(weight, x.dtype).contiguous()
    y = _RMSNorm.apply(x.reshape(-1, x.shape[-1]).contiguous(), weight, eps)
    return y.view(x.shape)
