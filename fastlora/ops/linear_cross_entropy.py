from __future__ import annotations

import torch

from ..kernels import linear_cross_entropy as _kernels  # noqa: F401  registers the operators
from . import _check
from ._once import link, once
from ._transforms import refuse


class _LinearCrossEntropy(torch.autograd.Function):
    """loss / divisor, per row or summed.

    The forward's gradient carries the mantissa of 1/divisor and the backward its power of two, which is exact: dlogits
    is rounded at the size of a probability, so that it does not underflow in fp16 before a loss scale arrives.
    """

    @staticmethod
    def forward(ctx, hidden, weight, hidden_link, weight_link, labels, divisor, ignore_index, summed, grad):
        mantissa, exponent = torch.frexp(1 / divisor)
        need_dh, need_dw = (grad and needed for needed in ctx.needs_input_grad[:2])
        loss, dh, dw = torch.ops.fastlora.linear_cross_entropy_fwd(
            hidden, weight, labels, mantissa, ignore_index, need_dh, need_dw
        )
        ctx.op = "linear_cross_entropy"
        ctx.save_for_backward(dh, dw, exponent, hidden_link, weight_link)
        ctx.weight_dtype = weight.dtype
        return (loss.sum() if summed else loss) / divisor

    @staticmethod
    @once
    def backward(ctx, saved, dloss):
        dh, dw, exponent, *_ = saved
        need_dh, need_dw = ctx.needs_input_grad[:2]
        scale = torch.ldexp(dloss, exponent)
        dhidden = (dh * (scale[:, None] if scale.dim() else scale)).to(dh.dtype) if need_dh else None
        dweight = (dw * scale).to(ctx.weight_dtype) if need_dw else None
        return dhidden, dweight, *(None,) * 7


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of ``logits = hidden weightᵀ`` against labels, without ever holding the full logits.

    ``loss_i = logsumexp(logits_i) − logits_i[label_i]`` in fp32 over logits in the dtype of hidden. The gradient,
    ``softmax − onehot``, is made chunk by chunk in the forward; rows labelled ignore_index reach no matrix product.
    Under autocast hidden and weight take autocast's dtype.

    Args:
        hidden: (..., H), fp32, bf16 or fp16. Labels are not shifted here.
        weight: (V, H), dtype of hidden.
        labels: (...), int64, in [0, V) or ignore_index.
        ignore_index: the label of rows that count nothing.
        reduction: "mean" over the counted rows, "sum", or "none" (a frozen weight only).
        num_items: where given, the sum of losses is divided by it instead, as Hugging Face does under gradient
            accumulation; reduction must then be "mean". A tensor has one element, and the loss its shape.

    Returns:
        fp32: a scalar, or (...) for reduction "none". The mean over no rows is NaN. Saved for backward: one (M, H)
        gradient in the dtype of hidden, and (V, H) fp32 where weight trains.

    Raises:
        ValueError, TypeError: a wrong shape, device or reduction, or dtype, by the name of the argument.
        IndexError: a label out of range, on the CPU. On a GPU its loss and gradient are NaN.

    Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, arXiv:2411.09009, for the problem;
    the gradient in the forward is exact here, with no filtering.
    """
    op = "linear_cross_entropy"
    refuse(op)
    hidden, weight = _check.autocast(hidden.device, hidden, weight)
    _check.dtype(op, "hidden", hidden, _check.FLOATS)
    _check.shape(op, "weight", weight, (None, hidden.shape[-1]), "as (V, H) with H the last dimension of hidden")
    _check.dtype(op, "weight", weight, (hidden.dtype,), "to match hidden")
    _check.shape(op, "labels", labels, tuple(hidden.shape[:-1]), "to match hidden in all but the last dimension")
    _check.dtype(op, "labels", labels, (torch.int64,))
    _check.same_device(op, "hidden", hidden, weight=weight, labels=labels)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction is {reduction!r}, needs 'mean', 'sum' or 'none'")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"{op}: num_items goes with reduction 'mean', got {reduction!r}")
    shape: tuple[int, ...] = ()
    if isinstance(num_items, torch.Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"{op}: num_items has shape {tuple(num_items.shape)}, needs one element")
        shape, num_items = tuple(num_items.shape), num_items.reshape(())
    if reduction == "none" and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: weight requires a gradient, needs reduction 'mean' or 'sum', got 'none'")
    divisor = torch.ones((), dtype=torch.float32, device=hidden.device)
    if num_items is not None:
        divisor = (divisor * num_items).float()
    elif reduction == "mean":
        counted = (labels != ignore_index).sum()
        divisor = divisor * counted.clamp(min=1)
    rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    flat = labels.reshape(-1).contiguous()
    grad = torch.is_grad_enabled()  # autograd asks for gradients under no_grad too
    links = [link(t) if t.requires_grad else None for t in (rows, weight)]
    loss = _LinearCrossEntropy.apply(rows, weight, *links, flat, divisor, ignore_index, reduction != "none", grad)
    if reduction == "none":
        return loss.view(labels.shape)
    if reduction == "mean" and num_items is None:
        loss = loss.masked_fill(counted == 0, float("nan"))
    return loss.view(shape) if shape else loss
