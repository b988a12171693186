"""Projections and their adapters, and what the autograd functions over groups of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..kernels import dropout as _dropout  # noqa: F401  registers the operators, as the next lines do
from ..kernels import lora_gemm as _gemm  # noqa: F401
from ..kernels import lora_project as _project  # noqa: F401
from ..kernels import lora_reduce as _reduce  # noqa: F401
from ..kernels import rms_norm as _rms_norm  # noqa: F401
from ..kernels.lora_gemm import rotate
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


class Group(NamedTuple):
    """Projections of one input as an autograd function takes them: flat tensors, and what goes with them.

    Per projection a weight, a bias and one B of all its branches, with its scale; per branch an A, its scale and rate.
    Of a 4-bit weight w holds the bytes, and quantised the rest.
    """

    dtype: torch.dtype  # of the products
    counts: list[int]
    quantised: list[Quantised | None]
    w: list[torch.Tensor]
    bias: list[torch.Tensor | None]
    b: list[torch.Tensor]
    b_scale: list[float]
    a: list[torch.Tensor]
    a_scale: list[float]
    rates: list[float]

    @staticmethod
    def of(projections: Sequence[Projection], dtype: torch.dtype) -> Group:
        group = Group(dtype, [], [], [], [], [], [], [], [], [])
        adapters = next((one.b.dtype for _, _, branches in projections for one in branches), dtype)
        for weight, bias, branches in projections:
            scales = [0.0 if one.dropout == 1 else one.scaling / (1 - one.dropout) for one in branches]
            group.counts.append(len(branches))
            # The kernels read parameters by row: a strided view is copied.
            group.quantised.append(weight if isinstance(weight, Quantised) else None)
            group.w.append(weight.packed if isinstance(weight, Quantised) else weight.contiguous())
            group.bias.append(None if bias is None else bias.contiguous())
            if len(branches) == 1:
                group.b.append(branches[0].b.contiguous())
                group.b_scale.append(scales[0])
            else:
                # Several adapters become one of their ranks together, the scalings folded into B. Autocast to bf16 has
                # no rule for torch.cat of fp16, nor the other way round.
                halves = [_check.widened(one.b, dtype) * scale for one, scale in zip(branches, scales, strict=True)]
                # Of the dtype of its neighbours: a kernel takes the pointers of a group as one type.
                none = torch.empty(weight.shape[0], 0, dtype=adapters, device=weight.device)
                group.b.append(torch.cat(halves, 1) if halves else none)
                group.b_scale.append(1.0)
                scales = [1.0] * len(branches)
            group.a.extend(one.a.contiguous() for one in branches)
            group.a_scale.extend(scales)
            group.rates.extend(one.dropout for one in branches)
        return group

    def tensors(self) -> list[torch.Tensor | None]:
        return [*self.w, *self.bias, *self.b, *self.a]

    def static(self) -> Group:
        """Without tensors: what an autograd function may keep in its context."""
        return self._replace(w=[], bias=[], b=[], a=[])

    def filled(self, tensors: Sequence[Any]) -> Group:
        """The static part with tensors, or anything that stands for each of them, in the order of ``tensors()``."""
        P = len(self.counts)
        w, bias, b, a = tensors[:P], tensors[P : 2 * P], tensors[2 * P : 3 * P], tensors[3 * P :]
        dtype, counts, quantised, _, _, _, b_scale, _, a_scale, rates = self
        return Group(dtype, counts, quantised, list(w), list(bias), list(b), b_scale, list(a), a_scale, rates)

    def hides(self, x: torch.Tensor) -> bool:
        """Whether gradients may depend on x, which trains, without x being saved as it is: see `once`."""
        read = any(one.requires_grad for one in (*self.w, *self.a))
        return x.requires_grad and not (read and x.dtype == self.dtype)

    def ranks(self) -> list[int]:
        return [one.shape[0] for one in self.a]

    def b_ranks(self) -> list[int]:
        return [one.shape[1] for one in self.b]

    def seeds(self) -> torch.Tensor | None:
        """Drawn from torch's CPU generator, so that checkpointing replays the masks; None where nothing drops. Whatever
        the default device is: a checkpoint's second forward does not see it."""
        return torch.randint(2**62, (len(self.rates),), device="cpu") if any(self.rates) else None

    def masks(self, x: torch.Tensor, seeds: torch.Tensor | None) -> list[torch.Tensor | None]:
        if seeds is None:
            return [None] * len(self.rates)
        draw = torch.ops.fastlora.dropout_mask
        return [draw(x, seed, rate) if rate else None for seed, rate in zip(seeds, self.rates, strict=True)]

    def _dense(self, i: int) -> torch.Tensor:
        quantised = self.quantised[i]
        return _in(self.dtype, self.w[i]) if quantised is None else quantised.dense(self.dtype)

    def gemm(self, n, s, residual=None, cos=None, sin=None) -> list[torch.Tensor]:
        """lora_gemm; with 4-bit weights a launch per projection, where one dense W is gone before the next is made."""
        gemm = torch.ops.fastlora.lora_gemm
        bias = [None if one is None else _in(self.dtype, one) for one in self.bias]
        if not any(self.quantised):
            return gemm(n, [self._dense(i) for i in range(len(self.w))], s, self.b, bias, residual, cos, sin)
        y: list[torch.Tensor] = []
        for i, si in enumerate(s.split(self.b_ranks(), 1)):
            y += gemm(n, [self._dense(i)], si.contiguous(), [self.b[i]], [bias[i]], residual)
        if cos is not None:
            y[:2] = rotate(y[0], y[1], cos, sin, False)
        return y

    def gemm_t(self, dy, ds, masks, wide) -> Any:
        """lora_gemm_t, dx added up in the wide dtype of x, as autograd does; with 4-bit weights by projection."""
        gemm_t = torch.ops.fastlora.lora_gemm_t
        if not any(self.quantised):
            return gemm_t(dy, [self._dense(i) for i in range(len(self.w))], ds, self.a, masks, wide)
        dx, first, columns = None, 0, ds.split(self.ranks(), 1)
        for i, count in enumerate(self.counts):
            own = slice(first, first + count)
            first += count
            dsi = torch.cat(columns[own], 1) if count else ds.new_empty(len(ds), 0)
            part = gemm_t([dy[i]], [self._dense(i)], dsi, self.a[own], masks[own], wide)
            dx = part if dx is None else dx.add_(part)
        return dx

    def fit(self, need: Sequence[bool], grads: Group) -> list[torch.Tensor | None]:
        """The gradients of ``tensors()`` in the dtypes of their parameters; None where none is needed."""
        return [
            None if g is None or like is None or not wanted else _in(like.dtype, g)
            for g, wanted, like in zip(grads.tensors(), need, self.tensors(), strict=True)
        ]


def _in(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a dtype. To ask first is faster than to convert nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def parts(flat: torch.Tensor | None, like: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """A flat gradient as tensors in the shapes of their parameters, and their dtype where they share one."""
    if flat is None or not like:
        return [None] * len(like)
    if len({one.dtype for one in like}) == 1:
        flat = _in(like[0].dtype, flat)
    pieces = flat.split_with_sizes([one.numel() for one in like])
    return [piece.view(one.shape) for piece, one in zip(pieces, like, strict=True)]


def dweights(dy: Sequence[torch.Tensor], n: Any, need: Group) -> tuple[list[Any], list[Any]]:
    """dW and dbias of the projections whose weights and biases train."""
    dw = [one.t() @ n if wanted else None for one, wanted in zip(dy, need.w, strict=True)]
    dbias = [one.sum(0, dtype=torch.float32) if wanted else None for one, wanted in zip(dy, need.bias, strict=True)]
    return dw, dbias


class NormBackward(NamedTuple):
    """dx, dnorm_weight, and dA of the projections as one flat tensor, None where none is needed."""

    dx: torch.Tensor | None
    dnorm: torch.Tensor | None
    da: torch.Tensor | None
    n: torch.Tensor | None


def through_norm(dn, x, norm_weight, eps, rstd, dcarry, need_norm, need, ds, group, masks) -> NormBackward:
    """From dn, None if nobody needs it, back through rms_norm, with the dA and the n that its projections need."""
    ops = torch.ops.fastlora
    da = n = None
    if any(need.w) or (any(need.a) and dn is None):
        n = ops.rms_norm_fwd(x, norm_weight, eps)[0].to(ds.dtype)
    if dn is None:
        dx = dnorm = None
    elif any(need.a):
        dx, dnorm, da = ops.rms_norm_bwd_reduce(dn, x, norm_weight, rstd, dcarry, need_norm, ds, group.ranks(), masks)
    else:
        dx, dnorm, _ = ops.rms_norm_bwd(dn, x, norm_weight, rstd, dcarry, need_norm, False)
    if any(need.a) and da is None:
        da = ops.lora_reduce(ds, n, group.ranks(), masks)
    return NormBackward(dx, dnorm if need_norm else None, da, n)


def shaped(y: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """y, which nobody else holds, in another shape and no view: FSDP warns of a layer whose output is one."""
    return torch.ops.aten._unsafe_view.default(y, shape)


def product_dtype(x: torch.Tensor, projections: Sequence[Projection]) -> torch.dtype:
    """What the products are computed in: autocast's dtype, or the weights'."""
    autocast = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if autocast else projections[0].weight.dtype


def check_projections(op: str, x: torch.Tensor, projections: dict[str, Projection], K: int, of: str) -> None:
    """Raise unless the projections, by name, go with x and are of one dtype; K, their inputs, comes from ``of``."""
    base = next(iter(projections.values())).weight.dtype
    for name, (weight, bias, branches) in projections.items():
        if _fits(x, weight, bias, branches, base, K):
            continue  # by far the most often: what is wrong is found out in words below
        _check.dtype(op, f"{name}.weight", weight, _check.FLOATS)
        _check.shape(op, f"{name}.weight", weight, (None, K), f"as (N, K) with K {of}")
        _check.dtype(op, f"{name}.weight", weight, (base,), "to match the other projections")
        if bias is not None:
            _check.shape(op, f"{name}.bias", bias, (weight.shape[0],), "to match the rows of weight")
        for a, b, _, rate in branches:
            check_adapter(op, name, base, weight, a, b)
            if not 0 <= rate <= 1:
                raise ValueError(f"{op}: {name}.dropout is {rate}, needs a probability from 0 to 1")
            _check.same_device(op, "x", x, **{f"{name}.a": a, f"{name}.b": b})
        _check.same_device(op, "x", x, **{f"{name}.weight": weight, f"{name}.bias": bias})


def _fits(x, weight, bias, branches, base, K) -> bool:
    """Whether all that `check_projections` asks of a projection holds."""
    N, device = weight.shape[:1], x.device
    if weight.dtype != base or base not in _check.FLOATS or weight.shape != (*N, K) or weight.device != device:
        return False
    if device.type not in ("cpu", "cuda") or (bias is not None and (bias.shape != N or bias.device != device)):
        return False
    for a, b, _, rate in branches:
        rank = a.shape[:1]
        if a.shape != (*rank, K) or b.shape != (*N, *rank) or not 1 <= rank[0] <= 512 or not 0 <= rate <= 1:
            return False
        if a.dtype != b.dtype or a.dtype not in (base, torch.float32) or a.device != device or b.device != device:
            return False
    return True


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
