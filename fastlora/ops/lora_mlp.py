from __future__ import annotations

from typing import Any

import torch

from ..kernels import swiglu_reduce as _swiglu_reduce  # noqa: F401  registers the operators
from . import _check
from ._group import (
    Group,
    NormBackward,
    Projection,
    check_projections,
    dweights,
    parts,
    product_dtype,
    shaped,
    through_norm,
)
from ._once import link, once
from ._transforms import refuse
from .dequantize_4bit import Quantised


class _LoraMLP(torch.autograd.Function):
    """x + down(silu(gate(n)) · up(n)) with n = rms_norm(x); or, without a norm, down(silu(gate(x)) · up(x)).

    Saved: x, rstd, gate, up, the s of both inputs, and the masks as bits. n and h are remade by the kernels that
    reduce over tokens.
    """

    @staticmethod
    def forward(ctx, x, linked, norm_weight, seeds, h_seeds, eps, dtype, wide, down, n_wide, *params):
        ops = torch.ops.fastlora
        first, last = wide.filled(params[:n_wide]), down.filled(params[n_wide:])
        wide_dtype = torch.promote_types(x.dtype, dtype)
        if norm_weight is None:
            x = x.to(dtype)
        masks = first.masks(x, seeds)
        rstd, n = None, x
        if norm_weight is not None:
            n, rstd, s = ops.rms_norm_project(x, norm_weight, eps, first.a, first.a_scale, masks, dtype)
        else:
            s = ops.lora_project(x, first.a, first.a_scale, masks)
        gate, up = first.gemm(n, s)
        h_masks = last.masks(gate, h_seeds)
        h, h_s = ops.swiglu_project(gate, up, last.a, last.a_scale, h_masks)
        residual = None if norm_weight is None else x.to(wide_dtype)
        (y,) = last.gemm(h, h_s, residual)
        need = wide.filled(ctx.needs_input_grad[10 : 10 + n_wide])
        # Without a norm dx asks for the parameters alone.
        kept = x if norm_weight is not None or any(need.a) or any(need.w) else None
        ctx.op = "lora_mlp"
        ctx.save_for_backward(kept, linked, norm_weight, rstd, gate, up, s, h_s, *masks, *h_masks, *params)
        ctx.static = eps, dtype, wide_dtype, wide, down, n_wide, len(masks), len(h_masks)
        return y

    @staticmethod
    @once
    def backward(ctx, saved, dout):
        ops = torch.ops.fastlora
        eps, dtype, wide_dtype, wide, down, n_wide, n_masks, n_h_masks = ctx.static
        x, _, norm_weight, rstd, gate, up, s, h_s, *rest = saved
        masks, h_masks, params = rest[:n_masks], rest[n_masks : n_masks + n_h_masks], rest[n_masks + n_h_masks :]
        first, last = wide.filled(params[:n_wide]), down.filled(params[n_wide:])
        need_x, _, need_norm = ctx.needs_input_grad[:3]
        wanted = ctx.needs_input_grad[10:]
        need, h_need = wide.filled(wanted[:n_wide]), down.filled(wanted[n_wide:])
        need_input = need_x or need_norm
        dout = dout.contiguous()
        dy = [dout.to(dtype)]

        need_first = need_input or any((*need.a, *need.b, *need.w, *need.bias))
        h_ds = h_s
        if last.a and (need_first or any(h_need.a)):
            h_ds = ops.lora_project_t(dy, last.b, last.b_scale)
        h = ops.swiglu_fwd(gate, up) if any(h_need.w) or (any(h_need.a) and not need_first) else None
        dx = dnorm = db = h_da = None
        dgate_up: list[Any] = []
        if need_first:
            dh = last.gemm_t(dy, h_ds, h_masks, dtype)
            # Ranks of nobody's gradient are left out: they would be summed for nothing.
            reduced = (h_ds, last.ranks(), h_masks) if any(h_need.a) else (h_ds[:, :0], [], [])
            b_ranks = first.b_ranks() if any(need.b) else [0, 0]
            dgate, dup, flat = ops.swiglu_bwd_reduce(dh, gate, up, *reduced, s if any(b_ranks) else s[:, :0], b_ranks)
            del dh
            dgate_up = [dgate, dup]
            split = sum(reduced[1]) * gate.shape[1]
            h_da = flat[:split] if any(h_need.a) else None
            db = flat[split:] if any(b_ranks) else None
        elif any(h_need.a):
            h_da = ops.lora_reduce(h_ds, h, last.ranks(), h_masks)
        h_db = ops.lora_reduce_t(h_s, dy, last.b_ranks()) if any(h_need.b) and any(last.b_ranks()) else None
        h_dw, h_dbias = dweights(dy, h, h_need)
        if need_first:
            ds = s
            if first.a and (need_input or any(need.a)):
                ds = ops.lora_project_t(dgate_up, first.b, first.b_scale)
            dn = first.gemm_t(dgate_up, ds, masks, wide_dtype) if need_input else None
            if not any((*need.w, *need.bias)):
                dgate_up = [None, None]  # the norm needs their memory
                del dgate, dup
            if norm_weight is not None:
                back = through_norm(dn, x, norm_weight, eps, rstd, dout.to(x.dtype), need_norm, need, ds, first, masks)
            else:
                da = ops.lora_reduce(ds, x, first.ranks(), masks) if any(need.a) else None
                back = NormBackward(dn, None, da, x)
            dx, dnorm = back.dx, back.dnorm
            dw, dbias = dweights(dgate_up, back.n, need)
            first_grads = first._replace(w=dw, bias=dbias, b=parts(db, first.b), a=parts(back.da, first.a))
            found = first.fit(wanted[:n_wide], first_grads)
        else:
            found = [None] * n_wide
        last_grads = last._replace(w=h_dw, bias=h_dbias, b=parts(h_db, last.b), a=parts(h_da, last.a))
        return dx, None, dnorm, *(None,) * 7, *found, *last.fit(wanted[n_wide:], last_grads)


def lora_mlp(
    x: torch.Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Llama's MLP, ``down(silu(gate(n)) · up(n))``, each projection ``n Wᵀ + Σ_j s_j drop_j(n) A_jᵀ B_jᵀ + bias``.

    n is x. With norm_weight n is rms_norm(x, norm_weight, eps), and x is added to the result: the second half of a
    decoder layer. h = silu(gate) · up is made once, with its products on A, and not saved; the kernel that makes dgate
    and dup sums over tokens what they and h contribute to the adapters' gradients. Masks as in lora_group. Under
    autocast the products take autocast's dtype.

    Args:
        x: (..., K), fp32, bf16 or fp16.
        gate, up: weights (F, K); adapters in that dtype or fp32, ranks from 1 to 512.
        down: weight (N, F), N = K with norm_weight.
        norm_weight: (K,), fp32, bf16 or fp16, whatever x is.
        eps: of the norm.

    Returns:
        (..., N), with norm_weight in the dtype of the sum. Saved for backward: x, rstd, gate and up (..., F), the s.

    Raises:
        ValueError, TypeError: a wrong shape, rank, rate or device, or dtype, by the name of the argument.

    Source: Shazeer, arXiv:2002.05202; Hu et al., arXiv:2106.09685; Zhang and Sennrich, arXiv:1910.07467.
    """
    op = "lora_mlp"
    refuse(op)
    K, F = x.shape[-1], gate.weight.shape[0]
    _check.dtype(op, "x", x, _check.FLOATS)
    check_projections(op, x, {"gate": gate, "up": up}, K, "the last dimension of x")
    _check.shape(op, "up.weight", up.weight, (F, K), "to match gate")
    check_projections(op, x, {"down": down}, F, "the rows of gate")
    _check.dtype(op, "down.weight", down.weight, (gate.weight.dtype,), "to match gate")
    if norm_weight is not None:
        _check.shape(op, "norm_weight", norm_weight, (K,), "to match the last dimension of x")
        _check.dtype(op, "norm_weight", norm_weight, _check.FLOATS)
        _check.same_device(op, "x", x, norm_weight=norm_weight)
        _check.shape(op, "down.weight", down.weight, (K, F), "as (K, F), since x is added to the result")
        norm_weight = _check.widened(norm_weight, x.dtype).contiguous()
    elif not torch.is_autocast_enabled(x.device.type) and not isinstance(gate.weight, Quantised):
        _check.dtype(op, "x", x, (gate.weight.dtype,), "to match the weights")
    dtype = product_dtype(x, [gate])
    wide, last = Group.of([gate, up], dtype), Group.of([down], dtype)
    first, rows = wide.tensors(), x.reshape(-1, K).contiguous()
    linked = link(rows) if norm_weight is None and wide.hides(rows) else None
    y = _LoraMLP.apply(
        rows, linked, norm_weight, wide.seeds(), last.seeds(), eps, dtype,
        wide.static(), last.static(), len(first), *first, *last.tensors(),
    )  # fmt: skip
    return shaped(y, (*x.shape[:-1], down.weight.shape[0]))
