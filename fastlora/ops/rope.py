from __future__ import annotations

import torch

from ..kernels import rope as _kernels  # noqa: F401  registers the operators
from . import _check
from ._once import once
from ._transforms import refuse


def _unit_stride(x):
    return x if x.stride(-1) == 1 else x.contiguous()


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.op = "rope"
        ctx.save_for_backward(cos, sin)
        return torch.ops.fastlora.rope(q, k, cos, sin, False)

    @staticmethod
    @once
    def backward(ctx, saved, dq, dk):
        cos, sin = saved
        return *torch.ops.fastlora.rope(_unit_stride(dq), _unit_stride(dk), cos, sin, True), None, None


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding of queries and keys, rotate-half convention.

    ``out = x · cos + (−x₂, x₁) · sin`` with x₁ and x₂ the halves of the last dimension; computed in fp32, rounded once.

    Args:
        q: (B, H, T, D), any strides, D even; fp32, bf16 or fp16.
        k: (B, H_kv, T, D), dtype of q.
        cos, sin: (B, T, D) or (1, T, D); fp32, bf16 or fp16, whatever q is. No gradient flows to them.

    Returns:
        Rotated q and k, in the strides of the inputs. Saved for backward: cos and sin.

    Raises:
        ValueError, TypeError: a wrong shape or device, or dtype, by the name of the argument.

    Source: Su et al., RoFormer, arXiv:2104.09864; the halves as in Hugging Face's Llama.
    """
    refuse("rope")
    _check.dtype("rope", "q", q, _check.FLOATS)
    _check.shape("rope", "q", q, (None,) * 4, "as (B, H, T, D)")
    B, _, T, D = q.shape
    if D % 2:
        raise ValueError(f"rope: q has shape {tuple(q.shape)}, needs an even last dimension")
    _check.shape("rope", "k", k, (B, None, T, D), "to match q in all but the heads")
    _check.dtype("rope", "k", k, (q.dtype,), "to match q")
    for name, table in (("cos", cos), ("sin", sin)):
        rows = 1 if table.shape[:1] == (1,) else B
        _check.shape("rope", name, table, (rows, T, D), "or a first size of 1, to match q")
        _check.dtype("rope", name, table, _check.FLOATS)
    _check.shape("rope", "sin", sin, tuple(cos.shape), "to match cos")
    _check.dtype("rope", "sin", sin, (cos.dtype,), "to match cos")
    _check.same_device("rope", "q", q, k=k, cos=cos, sin=sin)
    cos, sin = (_check.widened(table, q.dtype).contiguous() for table in (cos, sin))
    return _RoPE.apply(_unit_stride(q), _unit_stride(k), cos, sin)
