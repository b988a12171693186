from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ..kernels import lora as _kernels  # noqa: F401  registers the operators
from . import _check


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, scaling, bias):
        ops = torch.ops.fastlora
        s = ops.lora_project(x, lora_a.to(x.dtype), scaling)
        ctx.save_for_backward(x, weight, lora_a, lora_b, s)
        ctx.scaling = scaling
        return ops.lora_gemm(x, weight, s, lora_b.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        ops = torch.ops.fastlora
        x, weight, lora_a, lora_b, s = ctx.saved_tensors
        need_dx, need_dw, need_da, need_db, _, need_dbias = ctx.needs_input_grad
        dy = dy.contiguous()
        dx = dw = da = db = dbias = None
        if need_dx or need_da:
            ds = ops.lora_project(dy, lora_b.to(dy.dtype).t(), ctx.scaling)
        if need_dx:
            dx = ops.lora_gemm(dy, weight.t(), ds, lora_a.to(dy.dtype).t(), None)
        if need_da:
            da = ops.lora_reduce(ds, x).to(lora_a.dtype)
        if need_db:
            db = ops.lora_reduce(s, dy).t().to(lora_b.dtype)
        if need_dw:
            dw = dy.t() @ x
        if need_dbias:
            dbias = dy.sum(0)
        return dx, dw, da, db, None, dbias


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer with a low-rank adapter: ``y = x Wᵀ + scaling · (x Aᵀ) Bᵀ + bias``.

    On a GPU the base product, the low-rank product and the bias are one kernel; s = scaling · x Aᵀ comes from a skinny
    kernel before it. With ds = scaling · dy B: ``dx = dy W + ds A``, ``dA = dsᵀ x``, ``dBᵀ = sᵀ dy``; dW and dbias are
    computed only where they train. Products are accumulated in fp32. A and B may be fp32 masters of a bf16 or fp16
    base: they are cast, x never is, and their gradients come in their own dtype. Under autocast x, W and bias take
    autocast's dtype.

    Args:
        x: (..., K), fp32, bf16 or fp16.
        weight: W, (N, K), dtype of x.
        lora_a: A, (R, K), dtype of x or fp32. R from 1 to 512.
        lora_b: B, (N, R), dtype of lora_a.
        scaling: alpha / R, or alpha / √R for rsLoRA.
        bias: (N,), dtype of x.

    Returns:
        (..., N), dtype of x. Saved for backward: x and s (M, R), beside the parameters.

    Raises:
        ValueError, TypeError: a wrong shape or device, or dtype, by the name of the argument.

    Source: Hu et al., LoRA, arXiv:2106.09685.
    """
    x, weight, bias = _check.autocast(x.device, x, weight, bias)
    K = x.shape[-1]
    _check.dtype("lora_linear", "x", x, _check.FLOATS)
    _check.shape("lora_linear", "weight", weight, (None, K), "as (N, K) with K the last dimension of x")
    _check.shape("lora_linear", "lora_a", lora_a, (None, K), "as (R, K) with K the last dimension of x")
    N, R = weight.shape[0], lora_a.shape[0]
    if not 1 <= R <= 512:
        raise ValueError(f"lora_linear: lora_a has rank {R}, needs a rank from 1 to 512")
    _check.shape("lora_linear", "lora_b", lora_b, (N, R), "as (N, R) with N from weight and R from lora_a")
    _check.dtype("lora_linear", "weight", weight, (x.dtype,), "to match x")
    if lora_a.dtype != torch.float32:
        _check.dtype("lora_linear", "lora_a", lora_a, (x.dtype, torch.float32), "to go with x")
    _check.dtype("lora_linear", "lora_b", lora_b, (lora_a.dtype,), "to match lora_a")
    if bias is not None:
        _check.shape("lora_linear", "bias", bias, (N,), "to match the rows of weight")
        _check.dtype("lora_linear", "bias", bias, (x.dtype,), "to match x")
    _check.same_device("lora_linear", "x", x, weight=weight, lora_a=lora_a, lora_b=lora_b, bias=bias)
    y = _LoraLinear.apply(x.reshape(-1, K).contiguous(), weight, lora_a, lora_b, float(scaling), bias)
    return y.view(*x.shape[:-1], N)
