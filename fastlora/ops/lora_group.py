from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..kernels import dropout as _dropout  # noqa: F401  registers the operators, as the next lines do
from ..kernels import lora_gemm as _gemm  # noqa: F401
from ..kernels import lora_project as _project  # noqa: F401
from ..kernels import lora_reduce as _reduce  # noqa: F401
from ..kernels import rms_norm as _rms_norm  # noqa: F401
from ..kernels import swiglu as _swiglu  # noqa: F401
from . import _check
from .dequantize_4bit import Quantised


class Branch(NamedTuple):
    """One adapter of a projection: ``scaling · drop(x) Aᵀ Bᵀ``, a (R, K), b (N, R), dropout a probability."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float = 1.0
    dropout: float = 0.0


class Projection(NamedTuple):
    """A linear layer ``x Wᵀ + bias`` with any number of adapters: weight (N, K), dense or 4-bit, bias (N,)."""

    weight: torch.Tensor | Quantised
    bias: torch.Tensor | None = None
    branches: tuple[Branch, ...] = ()


class _Params(NamedTuple):
    """The tensors of a group, per projection (w, bias, b, b_scale) and per branch (a, a_scale, rates)."""

    w: list[torch.Tensor]
    bias: list[torch.Tensor | None]
    b: list[torch.Tensor]
    a: list[torch.Tensor]


def _per_projection(counts: Sequence[int], params: Sequence[Any]) -> _Params:
    P = len(counts)
    return _Params(list(params[:P]), list(params[P : 2 * P]), list(params[2 * P : 3 * P]), list(params[3 * P :]))


class _LoraGroup(torch.autograd.Function):
    """Projections of one shared input n, which is x, rms_norm(x) or silu(x) · up.

    Saved: x (and up), rstd, s, and the masks as bits. n is recomputed by the backward kernel that needs it least; where
    n is x, and neither an A nor a W trains, x is not saved.
    """

    @staticmethod
    def forward(
        ctx, x, up, norm_weight, residual, seeds, eps, dtype, carry, quantised, counts, a_scale, b_scale, rates, *params
    ):
        ops = torch.ops.fastlora
        p, wide = _per_projection(counts, params), torch.promote_types(x.dtype, dtype)
        bias = [None if one is None else one.to(dtype) for one in p.bias]
        if norm_weight is None and up is None:
            x = x.to(dtype)
        masks = [ops.dropout_mask(x, seed, rate) if rate else None for seed, rate in zip(seeds, rates, strict=True)]
        rstd = None
        if norm_weight is not None:
            n, rstd, s = ops.rms_norm_project(x, norm_weight, eps, p.a, a_scale, masks, dtype)
        elif up is not None:
            n, s = ops.swiglu_project(x, up, p.a, a_scale, masks)
        else:
            n, s = x, ops.lora_project(x, p.a, a_scale, masks)
        if any(quantised):
            y = _gemm_one_by_one(n, p.w, quantised, s, p.b, bias, residual)
        else:
            y = ops.lora_gemm(n, [one.to(dtype) for one in p.w], s, p.b, bias, residual)
        need = _per_projection(counts, ctx.needs_input_grad[13:])
        if norm_weight is None and up is None and not any(need.a) and not any(need.w):
            x = None  # dx asks for the parameters alone, dB for s
        ctx.save_for_backward(x, up, norm_weight, rstd, s, *masks, *params)
        ctx.static = eps, dtype, carry, quantised, counts, b_scale, len(masks), residual is not None, wide
        return (*y, x) if carry else tuple(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        ops = torch.ops.fastlora
        eps, dtype, carry, quantised, counts, b_scale, n_masks, has_residual, wide = ctx.static
        x, up, norm_weight, rstd, s, *rest = ctx.saved_tensors
        masks, params = rest[:n_masks], rest[n_masks:]
        p = _per_projection(counts, params)
        need_x, need_up, need_norm, need_residual = ctx.needs_input_grad[:4]
        need = _per_projection(counts, ctx.needs_input_grad[13:])
        dcarry = grads[-1].contiguous() if carry else None
        dresidual = grads[0] if has_residual and need_residual else None
        dy = [one.to(dtype).contiguous() for one in grads[: len(counts)]]
        ranks = [one.shape[0] for one in p.a]
        b_ranks = [one.shape[1] for one in p.b]

        need_input = need_x or need_up or need_norm
        need_n = any(need.a) or any(need.w)
        ds = s
        if ranks and (need_input or any(need.a)):
            ds = ops.lora_project_t(dy, p.b, b_scale)
        dx = dup = dnorm = n = None
        if need_input:
            if any(quantised):
                dn = _gemm_t_one_by_one(dy, p.w, quantised, ds, p.a, masks, counts, wide)
            else:
                dn = ops.lora_gemm_t(dy, [one.to(dtype) for one in p.w], ds, p.a, masks)
            if norm_weight is not None:
                dx, dnorm, n = ops.rms_norm_bwd(dn, x, norm_weight, rstd, dcarry, need_norm, need_n)
                n = n.to(dtype)
            elif up is not None:
                dx, dup, n = ops.swiglu_bwd(dn, x, up, need_n)
            else:
                dx = dn
        elif need_n and norm_weight is not None:
            n = ops.rms_norm_fwd(x, norm_weight, eps)[0].to(dtype)
        elif need_n and up is not None:
            n = ops.swiglu_fwd(x, up)
        if n is None:
            n = x
        da: list[torch.Tensor | None] = [None] * len(p.a)
        db: list[torch.Tensor | None] = [None] * len(p.b)
        if any(need.a):
            da = _parts(ops.lora_reduce(ds, n, ranks, masks), p.a)
        if any(need.b) and any(b_ranks):
            db = _parts(ops.lora_reduce_t(s, dy, b_ranks), p.b)
        dw = [one.t() @ n if wanted else None for one, wanted in zip(dy, need.w, strict=True)]
        dbias = [one.sum(0, dtype=torch.float32) if wanted else None for one, wanted in zip(dy, need.bias, strict=True)]
        fit = [
            None if g is None or not wanted else g.to(like.dtype)
            for g, wanted, like in zip((*dw, *dbias, *db, *da), ctx.needs_input_grad[13:], params, strict=True)
        ]
        return dx, dup, dnorm if need_norm else None, dresidual, *(None,) * 9, *fit


def _dense(weight, quantised, dtype):
    return weight.to(dtype) if quantised is None else quantised.dense(dtype)


def _gemm_one_by_one(n, w, quantised, s, b, bias, residual):
    """lora_gemm, a launch per projection: one dense W is gone before the next is made."""
    y, columns = [], s.split([one.shape[1] for one in b], 1)
    for i, (si, bi) in enumerate(zip(columns, b, strict=True)):
        dense = [_dense(w[i], quantised[i], n.dtype)]
        y += torch.ops.fastlora.lora_gemm(n, dense, si.contiguous(), [bi], [bias[i]], residual)
        del dense
    return y


def _gemm_t_one_by_one(dy, w, quantised, ds, a, masks, counts, dtype):
    """lora_gemm_t, a launch per projection; the parts of dx are added as autograd adds them, in an x that is wider."""
    dx, first, columns = None, 0, ds.split([one.shape[0] for one in a], 1)
    for i, count in enumerate(counts):
        own = slice(first, first + count)
        first += count
        dsi = torch.cat(columns[own], 1) if count else ds.new_empty(len(ds), 0)
        dense = [_dense(w[i], quantised[i], dy[i].dtype)]
        part = torch.ops.fastlora.lora_gemm_t([dy[i]], dense, dsi, a[own], masks[own])
        del dense
        dx = part.to(dtype) if dx is None else dx.add_(part)
    return dx


def _parts(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """A flat gradient as tensors in the shapes of their parameters."""
    sizes = [one.numel() for one in like]
    return [part.view(one.shape) for part, one in zip(flat.split(sizes), like, strict=True)]


def _product_dtype(x, projections):
    """What the products are computed in: autocast's dtype, or the weights'."""
    autocast = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if autocast else projections[0].weight.dtype


def _apply(x, up, norm_weight, residual, eps, carry, projections):
    counts, w, quantised, bias, b, b_scale, a, a_scale, rates = [], [], [], [], [], [], [], [], []
    dtype = _product_dtype(x, projections)
    for projection in projections:
        branches = projection.branches
        scales = [0.0 if one.dropout == 1 else one.scaling / (1 - one.dropout) for one in branches]
        counts.append(len(branches))
        # The kernels read parameters by row: a strided view is copied.
        weight = projection.weight
        quantised.append(weight if isinstance(weight, Quantised) else None)
        w.append(weight.packed if isinstance(weight, Quantised) else weight.contiguous())
        bias.append(None if projection.bias is None else projection.bias.contiguous())
        if len(branches) == 1:
            b.append(branches[0].b.contiguous())
            b_scale.append(scales[0])
        else:
            # Several adapters become one of their ranks together, the scalings folded into B.
            halves = [one.b * scale for one, scale in zip(branches, scales, strict=True)]
            b.append(torch.cat(halves, 1) if halves else x.new_empty(weight.shape[0], 0, dtype=dtype))
            b_scale.append(1.0)
            scales = [1.0] * len(branches)
        a += [one.a.contiguous() for one in branches]
        a_scale += scales
        rates += [one.dropout for one in branches]
    # Drawn from torch's generator, so that checkpointing replays the masks.
    seeds = torch.randint(2**62, (len(rates),)) if any(rates) else torch.zeros(len(rates), dtype=torch.int64)
    return _LoraGroup.apply(
        *(x, up, norm_weight, residual, seeds, eps, dtype, carry, quantised, counts, a_scale, b_scale, rates),
        *(*w, *bias, *b, *a),
    )


def _shaped(y, shape):
    """y, which nobody else holds, in another shape and no view: FSDP warns of a layer whose output is one."""
    return torch.ops.aten._unsafe_view(y, shape)


def _check_projections(op: str, x: torch.Tensor, projections: Sequence[Projection]) -> None:
    K = x.shape[-1]
    if not projections:
        raise ValueError(f"{op}: projections is empty, needs at least one")
    base = projections[0].weight.dtype
    _check.dtype(op, "projections[0].weight", projections[0].weight, _check.FLOATS)
    for i, (weight, bias, branches) in enumerate(projections):
        name = f"projections[{i}]"
        _check.shape(op, f"{name}.weight", weight, (None, K), "as (N, K) with K the last dimension of x")
        _check.dtype(op, f"{name}.weight", weight, (base,), "to match the other projections")
        if bias is not None:
            _check.shape(op, f"{name}.bias", bias, (weight.shape[0],), "to match the rows of weight")
        for a, b, _, rate in branches:
            check_adapter(op, name, base, weight, a, b)
            if not 0 <= rate <= 1:
                raise ValueError(f"{op}: {name}.dropout is {rate}, needs a probability from 0 to 1")
            _check.same_device(op, "x", x, **{f"{name}.a": a, f"{name}.b": b})
        _check.same_device(op, "x", x, **{f"{name}.weight": weight, f"{name}.bias": bias})


def check_adapter(op, name, base, weight, a, b):
    """Raise unless a (R, K) and b (N, R) fit weight (N, K), in fp32 or its dtype."""
    prefix = f"{name}." if name else "lora_"
    _check.shape(op, f"{prefix}a", a, (None, weight.shape[1]), "as (R, K) with K the last dimension of x")
    if not 1 <= a.shape[0] <= 512:
        raise ValueError(f"{op}: {prefix}a has rank {a.shape[0]}, needs a rank from 1 to 512")
    _check.shape(op, f"{prefix}b", b, (weight.shape[0], a.shape[0]), "as (N, R), N from weight, R from a")
    if not torch.is_autocast_enabled(weight.device.type):
        _check.dtype(op, f"{prefix}a", a, tuple({base, torch.float32}), "to go with weight")
    _check.dtype(op, f"{prefix}b", b, (a.dtype,), f"to match {prefix}a")


def lora_group(
    x: torch.Tensor,
    projections: Sequence[Projection],
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
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
        norm_weight: (K,), the dtype of x or fp32.
        eps: of the norm.
        residual: (..., N), added to the output of a single projection, in the residual's dtype.

    Returns:
        The y_i, (..., N_i). With norm_weight, x itself comes last: a residual connection that continues from there has
        its gradient added inside the backward of the norm.

    Raises:
        ValueError, TypeError: a wrong shape, rank, rate or device, or dtype, by the name of the argument.

    Source: Hu et al., LoRA, arXiv:2106.09685; Zhang and Sennrich, arXiv:1910.07467.
    """
    op = "lora_group"
    _check.dtype(op, "x", x, _check.FLOATS)
    _check_projections(op, x, projections)
    lead, K = x.shape[:-1], x.shape[-1]
    if norm_weight is not None:
        _check.shape(op, "norm_weight", norm_weight, (K,), "to match the last dimension of x")
        _check.dtype(op, "norm_weight", norm_weight, (x.dtype, torch.float32), "to go with x")
        _check.same_device(op, "x", x, norm_weight=norm_weight)
    elif not torch.is_autocast_enabled(x.device.type) and not isinstance(projections[0].weight, Quantised):
        _check.dtype(op, "x", x, (projections[0].weight.dtype,), "to match the weights")
    residual = _check_residual(op, residual, (*lead, projections[0].weight.shape[0]), len(projections))
    rows = x.reshape(-1, K).contiguous()
    norm = None if norm_weight is None else norm_weight.contiguous()
    *y, last = _apply(rows, None, norm, residual, eps, norm_weight is not None, projections)
    if norm_weight is None:
        y.append(last)
    shaped = [_shaped(one, (*lead, one.shape[1])) for one in y]
    return tuple(shaped) if norm_weight is None else (*shaped, last.view(x.shape))


def swiglu_lora(
    gate: torch.Tensor, up: torch.Tensor, projection: Projection, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """A LoRA projection of ``h = silu(gate) · up``: ``h Wᵀ + Σ_j s_j drop_j(h) A_jᵀ B_jᵀ + bias + residual``.

    h is made once, with its projections on A, and not saved: the backward remakes it beside dgate and dup.

    Args:
        gate, up: (..., F), dtype of projection.weight.
        projection: weight (N, F); as for lora_group.
        residual: (..., N); the output takes its dtype.

    Returns:
        (..., N). Saved for backward: gate, up, and s.

    Raises:
        ValueError, TypeError: as lora_group.

    Source: Shazeer, arXiv:2002.05202; Hu et al., arXiv:2106.09685.
    """
    op = "swiglu_lora"
    _check.dtype(op, "gate", gate, _check.FLOATS)
    _check.shape(op, "up", up, tuple(gate.shape), "to match gate")
    _check.dtype(op, "up", up, (gate.dtype,), "to match gate")
    _check_projections(op, gate, [projection])
    _check.same_device(op, "gate", gate, up=up)
    _check.dtype(op, "gate", gate, (_product_dtype(gate, [projection]),), "to match the product")
    F, N = gate.shape[-1], projection.weight.shape[0]
    residual = _check_residual(op, residual, (*gate.shape[:-1], N), 1)
    rows = gate.reshape(-1, F).contiguous(), up.reshape(-1, F).contiguous()
    (y,) = _apply(*rows, None, residual, 0.0, False, [projection])
    return _shaped(y, (*gate.shape[:-1], N))


def _check_residual(op, residual, shape, projections):
    if residual is None:
        return None
    if projections != 1:
        raise ValueError(f"{op}: residual goes with one projection, got {projections}")
    _check.shape(op, "residual", residual, shape, "to match the output")
    return residual.reshape(-1, shape[-1]).contiguous()
