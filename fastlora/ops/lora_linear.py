from __future__ import annotations

import torch

from . import _check
from ._group import Branch, Projection, check_adapter
from ._transforms import refuse
from .dequantize_4bit import Quantised
from .lora_group import apply_group


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | Quantised,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer with a low-rank adapter: ``y = x Wᵀ + scaling · (x Aᵀ) Bᵀ + bias``.

    On a GPU the base product, the low-rank product and the bias are one kernel; s = scaling · x Aᵀ comes from a skinny
    kernel before it. With ds = scaling · dy B: ``dx = dy W + ds A``, ``dA = dsᵀ x``, ``dB = dyᵀ s``; dW and dbias are
    computed only where they train. Products are accumulated in fp32. A and B may be fp32 masters of a bf16 or fp16
    base: they are cast, x never is, and their gradients come in their own dtype. Under autocast x, W and bias take
    autocast's dtype. For several projections of one x, dropout or several adapters, see lora_group.

    Args:
        x: (..., K), fp32, bf16 or fp16.
        weight: W, (N, K), dtype of x; or a 4-bit weight, made dense in forward and again in backward.
        lora_a: A, (R, K), dtype of x or fp32. R from 1 to 512.
        lora_b: B, (N, R), dtype of lora_a.
        scaling: alpha / R, or alpha / √R for rsLoRA.
        bias: (N,), dtype of x.

    Returns:
        (..., N), dtype of x, or the dtype of a 4-bit weight. Saved for backward: x and s (M, R), beside the parameters.

    Raises:
        ValueError, TypeError: a wrong shape or device, or dtype, by the name of the argument.

    Source: Hu et al., LoRA, arXiv:2106.09685.
    """
    op = "lora_linear"
    refuse(op)
    K = x.shape[-1]
    _check.dtype(op, "x", x, _check.FLOATS)
    _check.shape(op, "weight", weight, (None, K), "as (N, K) with K the last dimension of x")
    check_adapter(op, "", weight.dtype, weight, lora_a, lora_b)
    if bias is not None:
        _check.shape(op, "bias", bias, (weight.shape[0],), "to match the rows of weight")
    if not torch.is_autocast_enabled(x.device.type) and not isinstance(weight, Quantised):
        _check.dtype(op, "weight", weight, (x.dtype,), "to match x")
        if bias is not None:
            _check.dtype(op, "bias", bias, (x.dtype,), "to match x")
    _check.same_device(op, "x", x, weight=weight, lora_a=lora_a, lora_b=lora_b, bias=bias)
    projection = Projection(weight, bias, (Branch(lora_a, lora_b, float(scaling)),))
    (y,) = apply_group(op, x.reshape(-1, K).contiguous(), [projection])
    return y.view(*x.shape[:-1], weight.shape[0])
