from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.lora_gemm import rotate
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


class _LoraGroup(torch.autograd.Function):
    """Projections of one shared input n, which is x or rms_norm(x).

    Saved: x, rstd, s, and the masks as bits. n is remade where it is needed; where n is x, and neither an A nor a W
    trains, x is not saved, but a ``link`` to it.
    """

    @staticmethod
    def forward(ctx, op, x, linked, norm_weight, residual, seeds, cos, sin, eps, dtype, static, *params):
        ops = torch.ops.fastlora
        group, wide = static.filled(params), torch.promote_types(x.dtype, dtype)
        need = static.filled(ctx.needs_input_grad[11:])
        if norm_weight is None:
            x = x.to(dtype)
        masks = group.masks(x, seeds)
        rstd, n = None, x
        if norm_weight is not None:
            n, rstd, s = ops.rms_norm_project(x, norm_weight, eps, group.a, group.a_scale, masks, dtype)
        else:
            s = ops.lora_project(x, group.a, group.a_scale, masks)
        y = group.gemm(n, s, residual, cos, sin)
        carry = norm_weight is not None
        # Without a norm dx asks for the parameters alone, dB for s.
        kept = x if carry or any(need.a) or any(need.w) else None
        ctx.op = op
        ctx.save_for_backward(kept, linked, norm_weight, cos, sin, rstd, s, *masks, *params)
        ctx.static = eps, dtype, wide, static, len(masks), residual is not None
        return (*y, x) if carry else tuple(y)

    @staticmethod
    @once
    def backward(ctx, saved, *grads):
        ops = torch.ops.fastlora
        eps, dtype, wide, static, n_masks, has_residual = ctx.static
        x, _, norm_weight, cos, sin, rstd, s, *rest = saved
        masks, params = rest[:n_masks], rest[n_masks:]
        group = static.filled(params)
        _, need_x, _, need_norm, need_residual = ctx.needs_input_grad[:5]
        need = static.filled(ctx.needs_input_grad[11:])
        carry = norm_weight is not None
        dcarry = grads[-1].contiguous() if carry else None
        dresidual = grads[0] if has_residual and need_residual else None
        dy = [one.to(dtype).contiguous() for one in grads[: len(group.w)]]
        if cos is not None:
            dy[:2] = rotate(dy[0], dy[1], cos, sin, True)

        need_input = need_x or need_norm
        ds = s
        if group.a and (need_input or any(need.a)):
            ds = ops.lora_project_t(dy, group.b, group.b_scale)
        dn = group.gemm_t(dy, ds, masks, wide) if need_input else None
        if carry:
            back = through_norm(dn, x, norm_weight, eps, rstd, dcarry, need_norm, need, ds, group, masks)
        else:
            da = ops.lora_reduce(ds, x, group.ranks(), masks) if any(need.a) else None
            back = NormBackward(dn, None, da, x)
        db = ops.lora_reduce_t(s, dy, group.b_ranks()) if any(need.b) and any(group.b_ranks()) else None
        dw, dbias = dweights(dy, back.n, need)
        found = group._replace(w=dw, bias=dbias, b=parts(db, group.b), a=parts(back.da, group.a))
        return None, back.dx, None, back.dnorm, dresidual, *(None,) * 6, *group.fit(ctx.needs_input_grad[11:], found)


def apply_group(op, x, projections, norm_weight=None, residual=None, rotary=None, eps=0.0):
    """_LoraGroup on x (M, K), for the operator op."""
    dtype = product_dtype(x, projections)
    group = Group.of(projections, dtype)
    cos, sin = (_check.widened(table, dtype) for table in rotary) if rotary else (None, None)
    if residual is not None:
        residual = residual.to(torch.promote_types(residual.dtype, dtype))
    linked = link(x) if norm_weight is None and group.hides(x) else None
    return _LoraGroup.apply(
        op, x, linked, norm_weight, residual, group.seeds(), cos, sin, eps, dtype, group.static(), *group.tensors()
    )


def lora_group(
    x: torch.Tensor,
    projections: Sequence[Projection],
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Every LoRA projection that reads one x, in one pass: ``y_i = n W_iᵀ + Σ_j s_ij drop_ij(n) A_ijᵀ B_ijᵀ + bias_i``.

    n is x, or rms_norm(x, norm_weight, eps) where norm_weight is given. All the s = s_ij drop(n) A_ijᵀ are made by the
    kernel that makes n, all y_i by one launch, and dx is accumulated over the projections by one kernel. Masks are
    independent per adapter, drawn by a seed from torch's generator, and kept as bits. Gradients of A and B are fp32
    sums over fixed runs of tokens: two runs agree to the bit. Under autocast the products take autocast's dtype.

    Args:
        x: (..., K), fp32, bf16 or fp16.
        projections: weights (N_i, K) of one dtype; adapters in that dtype or fp32, ranks from 1 to 512. A 4-bit weight
            is made dense for its own product, in forward and again in backward, one at a time; x may then have any
            dtype, and the products that of the weights.
        norm_weight: (K,), fp32, bf16 or fp16, whatever x is.
        eps: of the norm.
        residual: (..., N), added to the output of a single projection, which takes the dtype of their sum.
        rotary: cos and sin, (B, T, D) or (1, T, D), fp32, bf16 or fp16, for x (B, T, K): the first two outputs,
            queries and keys, are rotated as heads of D before they are stored, as ``rope`` does.

    Returns:
        The y_i, (..., N_i). With norm_weight, x itself comes last: a residual connection that continues from there has
        its gradient added inside the backward of the norm.

    Raises:
        ValueError, TypeError: a wrong shape, rank, rate or device, or dtype, by the name of the argument.

    Source: Hu et al., LoRA, arXiv:2106.09685; Zhang and Sennrich, arXiv:1910.07467.
    """
    op = "lora_group"
    refuse(op)
    _check.dtype(op, "x", x, _check.FLOATS)
    if not projections:
        raise ValueError(f"{op}: projections is empty, needs at least one")
    named = {f"projections[{i}]": one for i, one in enumerate(projections)}
    check_projections(op, x, named, x.shape[-1], "the last dimension of x")
    lead, K = x.shape[:-1], x.shape[-1]
    if norm_weight is not None:
        _check.shape(op, "norm_weight", norm_weight, (K,), "to match the last dimension of x")
        _check.dtype(op, "norm_weight", norm_weight, _check.FLOATS)
        _check.same_device(op, "x", x, norm_weight=norm_weight)
    elif not torch.is_autocast_enabled(x.device.type) and not isinstance(projections[0].weight, Quantised):
        _check.dtype(op, "x", x, (projections[0].weight.dtype,), "to match the weights")
    residual = _check_residual(op, residual, (*lead, projections[0].weight.shape[0]), len(projections))
    if rotary is not None:
        rotary = _check_rotary(op, x, projections, *rotary)
    rows = x.reshape(-1, K).contiguous()
    norm = None if norm_weight is None else _check.widened(norm_weight, x.dtype).contiguous()
    y = apply_group(op, rows, projections, norm, residual, rotary, eps)
    outputs = tuple(shaped(one, (*lead, one.shape[1])) for one in y[: len(projections)])
    return outputs if norm_weight is None else (*outputs, y[-1].view(x.shape))


def _check_residual(op, residual, shape, projections):
    if residual is None:
        return None
    if projections != 1:
        raise ValueError(f"{op}: residual goes with one projection, got {projections}")
    _check.shape(op, "residual", residual, shape, "to match the output")
    return residual.reshape(-1, shape[-1]).contiguous()


def _check_rotary(op, x, projections, cos, sin):
    if len(projections) < 2:
        raise ValueError(f"{op}: rotary goes with queries and keys, got {len(projections)} projection")
    _check.shape(op, "x", x, (None, None, None), "as (B, T, K), for rotary")
    for name, table in (("rotary[0]", cos), ("rotary[1]", sin)):
        rows = 1 if table.shape[:1] == (1,) else x.shape[0]
        _check.shape(op, name, table, (rows, x.shape[1], None), "as (B, T, D) or (1, T, D), to match x")
        _check.dtype(op, name, table, _check.FLOATS)
    _check.shape(op, "rotary[1]", sin, tuple(cos.shape), "to match rotary[0]")
    _check.dtype(op, "rotary[1]", sin, (cos.dtype,), "to match rotary[0]")
    _check.same_device(op, "x", x, **{"rotary[0]": cos, "rotary[1]": sin})
    for i, one in enumerate(projections[:2]):
        if cos.shape[2] % 2 or one.weight.shape[0] % max(2, cos.shape[2]):
            raise ValueError(
                f"{op}: projections[{i}] has {one.weight.shape[0]} outputs and rotary[0] heads of {cos.shape[2]}, "
                "needs whole heads of an even size"
            )
    return cos.contiguous(), sin.contiguous()
