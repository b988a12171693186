"""Floating-point operations of the operators' matrix products, as torch.utils.flop_counter counts them.

A product of (m, k) and (k, n) is 2 m n k. Counted is what the mathematics asks for, as torch does: attention in full,
whatever its mask hides, its scores once more in the backward, and rows of every label.

A formula takes an operator's arguments, with shapes in the place of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Shape = Sequence[int]


def _product(rows: int, factors: Sequence[Shape]) -> int:
    """Of ``rows`` rows with each of these matrices, from either side."""
    return sum(2 * rows * m * n for m, n in factors)


def lora_gemm(x: Shape, w: Sequence[Shape], s: Shape, b: Sequence[Shape], *rest: Any, **more: Any) -> int:
    return _product(x[0], [*w, *b])


def lora_gemm_t(dy: Sequence[Shape], w: Sequence[Shape], ds: Shape, a: Sequence[Shape], *rest: Any, **more: Any) -> int:
    return _product(ds[0], [*w, *a])


def lora_project(x: Shape, a: Sequence[Shape], *rest: Any, **more: Any) -> int:
    return _product(x[0], a)


def lora_project_t(dy: Sequence[Shape], b: Sequence[Shape], *rest: Any, **more: Any) -> int:
    return _product(dy[0][0], b)


def rms_norm_project(x: Shape, weight: Shape, eps: float, a: Sequence[Shape], *rest: Any, **more: Any) -> int:
    return _product(x[0], a)


def swiglu_project(gate: Shape, up: Shape, a: Sequence[Shape], *rest: Any, **more: Any) -> int:
    return _product(gate[0], a)


def lora_reduce(ds: Shape, x: Shape, *rest: Any, **more: Any) -> int:
    return _product(ds[0], [(ds[1], x[1])])


def lora_reduce_t(s: Shape, dy: Sequence[Shape], ranks: Sequence[int], **more: Any) -> int:
    return _product(s[0], [(one[1], rank) for one, rank in zip(dy, ranks, strict=True)])


def rms_norm_bwd_reduce(
    dn: Shape, x: Shape, weight: Shape, rstd: Shape, dresidual: Shape, need_dw: bool, ds: Shape, *rest: Any, **more: Any
) -> int:
    return lora_reduce(ds, x)


def swiglu_bwd_reduce(
    dh: Shape, gate: Shape, up: Shape, ds: Shape, ranks: Any, masks: Any, s: Shape, b_ranks: Sequence[int], **more: Any
) -> int:
    return lora_reduce(ds, gate) + lora_reduce_t(s, [gate, up], b_ranks)


def linear_cross_entropy(
    hidden: Shape,
    weight: Shape,
    labels: Shape,
    scale: Shape,
    ignore_index: int,
    need_dh: bool,
    need_dw: bool,
    **more: Any,
) -> int:
    return (1 + need_dh + need_dw) * _product(hidden[0], [weight])


def attention(q: Shape, k: Shape, *rest: Any, **more: Any) -> int:
    """Scores, and what they weigh."""
    B, H, T, D = q
    return 2 * _product(B * H * T, [(k[2], D)])


def attention_bwd(dout: Shape, q: Shape, k: Shape, *rest: Any, **more: Any) -> int:
    """The scores again, their gradient, and dq, dk and dv."""
    return 5 * attention(q, k) // 2
