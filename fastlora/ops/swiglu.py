from __future__ import annotations

import torch

from ..kernels import swiglu as _kernels  # noqa: F401  registers the operators
from . import _check
from ._once import once
from ._transforms import refuse


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.op = "swiglu"
        ctx.save_for_backward(gate, up)
        return torch.ops.fastlora.swiglu_fwd(gate, up)

    @staticmethod
    @once
    def backward(ctx, saved, dh):
        gate, up = saved
        return torch.ops.fastlora.swiglu_bwd(dh.contiguous(), gate, up)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) · up`` elementwise, with silu(g) = g / (1 + e⁻ᵍ) rounded to the dtype before the product.

    Args:
        gate, up: the same shape (..., F) and dtype, fp32, bf16 or fp16.

    Returns:
        (..., F) in that dtype. Saved for backward: gate and up.

    Raises:
        ValueError, TypeError: a wrong shape or device, or dtype, by the name of the argument.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """
    refuse("swiglu")
    _check.dtype("swiglu", "gate", gate, _check.FLOATS)
    _check.shape("swiglu", "up", up, tuple(gate.shape), "to match gate")
    _check.dtype("swiglu", "up", up, (gate.dtype,), "to match gate")
    _check.same_device("swiglu", "gate", gate, up=up)
    F = gate.shape[-1]
    return _SwiGLU.apply(gate.reshape(-1, F).contiguous(), up.reshape(-1, F).contiguous()).view(gate.shape)
