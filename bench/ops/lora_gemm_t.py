"""The wide product of P projections that share x, backward, by every candidate; ds is already made.

dx = Σ dy_i W_i + ds A with dy_i (M, N), W_i (N, K), ds (M, P·R), A (P·R, K). FLOPs 2·M·P·K·(N + R). Bytes: every dy
and W, ds, A and dx, once. Candidates:

base alone          the floor: one product of the dy side by side with the stack of the W; of P > 1 also as P products
base + addmm        P products into one output, then an accumulating product of rank P·R
pitched             one product [dy | ds] [W ; A]; rows of P·N + 64·⌈P·R/64⌉ numbers on the left, and on the right the
                    first K of rows of K + 64·⌈P·R/64⌉, where the forward keeps B beside W
tight               the same over rows of P·N + P·R and of K + P·R, where that differs
fastlora            the operator in each of its methods, and in the tile of an A100 where that is another
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastlora.kernels import _tiles

from ..case import Case, Inputs, New, Work
from ..providers import Provider
from .lora_gemm import SHAPES, Shape, beside, methods, one_product, tile_of_a100


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for shape in SHAPES["quick" if quick else device]:
        M, N, K, R, P = shape
        numbers = M * P * N + P * N * K + P * R * (M + K) + M * K
        call = _tiles.Call("lora_gemm_t", dtype, torch.device(device), m=M, n=K, k=P * N, r=P * R, p=P)
        products = Provider("base alone, P products", _products, witness=_products)
        yield Case(
            op="lora_gemm_t",
            shape=shape._asdict(),
            inputs=lambda new, shape=shape: _inputs(new, shape),
            reference=lambda dy, w, ds, a, **_: _products(dy, w) + ds @ a,
            forward=Work(numbers * dtype.itemsize, 2 * M * P * K * (N + R)),
            providers=(
                Provider("base alone (floor)", one_product("stacked"), witness=_products),
                *([products] if P > 1 else ()),
                Provider("base + addmm", lambda dy, w, ds, a, **_: _products(dy, w).addmm_(ds, a)),
                *(Provider(name, one_product(name)) for name in shape.pads()),
                *methods(_fastlora, device, ("triton", "addmm")),
                *tile_of_a100(_fastlora, device, call),
            ),
        )


def _inputs(new: New, shape: Shape) -> Inputs:
    """dy (P, M, N), w (P·N, K), ds (M, P·R), a (P·R, K); and by candidate the two factors of its one product, in a
    tuple, of which the gate makes no float64."""
    M, N, K, R, P = shape
    dy, w = new(P, M, N), new(P * N, K, scale=N**-0.5)
    ds, a = new(M, P * R), new(P * R, K, scale=R**-0.5)
    side_by_side = torch.cat(dy.unbind(), 1) if P > 1 else dy[0]
    below = torch.cat((w, a))
    factors = {
        name: (beside(side_by_side, ds, pad), beside(below, below[:, :0], pad)) for name, pad in shape.pads().items()
    }
    return {"dy": dy, "w": w, "ds": ds, "a": a, "stacked": (side_by_side, w), **factors}


def _products(dy, w, **_):
    first, *others = zip(dy, w.chunk(len(dy)), strict=True)
    dx = torch.mm(*first)
    for dyi, wi in others:
        dx.addmm_(dyi, wi)
    return dx


def _fastlora(dy, w, ds, a, **_):
    P = len(dy)
    return torch.ops.fastlora.lora_gemm_t(dy.unbind(), w.chunk(P), ds, a.chunk(P), [None] * P)
