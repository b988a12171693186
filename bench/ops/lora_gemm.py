"""The wide products of P projections that share x, forward, by every candidate; the rank-R operand is already made.

lora_gemm           y_i = x W_iᵀ + s_i B_iᵀ                P outputs of N columns; FLOPs 2·M·P·N·(K + R)
lora_gemm_residual  y = residual + x Wᵀ + s Bᵀ             P = 1; as many

Bytes: x, every W, s and B, the residual, and every y, once. The weights of a case are the rows of one (P·N, K) tensor,
so each of them is contiguous, and so is their stack. Candidates:

base alone          the floor: x times the stack, the outputs being slices. Of P > 1 also as P products; and of x and W
                    in rows of the pitch below. With a residual: addmm, for which torch copies the residual first
base + addmm        P products, each with an accumulating product of rank R after it
stacked + addmm     P > 1: x times the stack, then the same into its slices
pitched             one product [x | s] [W | B]ᵀ over rows of K + 64·⌈P·R/64⌉ numbers; B of P > 1 is block-diagonal
tight               the same over rows of K + P·R, where that differs
fastlora            the operator in each of its methods, and in the tile of an A100 where that is another
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastlora.kernels import _tiles

from ..case import Case, Function, Inputs, New, Work
from ..providers import Provider, environment


class Shape(NamedTuple):
    M: int
    N: int
    K: int
    R: int
    P: int

    def pads(self) -> dict[str, int]:
        """What a row holds beyond its base part, by candidate."""
        ranks = self.P * self.R
        pitched = -(-ranks // 64) * 64
        return {"pitched": pitched} | ({"tight": ranks} if ranks < pitched else {})


_QKV, _GATE_UP, _O, _DOWN = (4096, 4096, 3), (11008, 4096, 2), (4096, 4096, 1), (4096, 11008, 1)  # N, K, P
_CUDA = [(4096, 16, one) for one in (_QKV, _GATE_UP, _O, _DOWN)]
_CUDA += [(4096, 64, _QKV), (4096, 64, _GATE_UP)]
_CUDA += [(16384, 16, one) for one in (_QKV, _GATE_UP, _O, _DOWN)]
SHAPES = {
    "cpu": [Shape(2048, 1024, 1024, 16, 1), Shape(2048, 2752, 1024, 16, 1), Shape(2048, 1024, 1024, 16, 3)],
    "cuda": [Shape(M, N, K, R, P) for M, R, (N, K, P) in _CUDA],
    "quick": [Shape(64, 96, 64, 16, 1), Shape(64, 96, 64, 16, 3)],
}


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for shape in SHAPES["quick" if quick else device]:
        yield _plain(shape, device, dtype)
        if shape.P == 1:
            yield _residual(shape, device, dtype)


def _plain(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    M, N, K, R, P = shape
    several = [
        Provider("base alone, P products", _products, witness=_products),
        Provider("stacked + addmm", _stacked_addmm),
    ]
    call = _tiles.Call("lora_gemm", dtype, torch.device(device), m=M, n=P * N, k=K, r=P * R, p=P)
    return Case(
        op="lora_gemm",
        shape=shape._asdict(),
        inputs=lambda new: _inputs(new, shape),
        reference=lambda x, w, s, b, **_: tuple(x @ wi.t() + si @ bi.t() for wi, si, bi in _each(w, s, b)),
        forward=_work(shape, dtype),
        providers=(
            Provider("base alone (floor)", _split(one_product("stacked"), P), witness=_products),
            Provider("base alone, pitched", _split(_base_pitched, P), witness=_products),
            *(several if P > 1 else ()),
            Provider("base + addmm", _addmm),
            *(Provider(name, _split(one_product(name), P)) for name in shape.pads()),
            *methods(_fastlora, device, ("triton", "addmm", "augmented")),
            *tile_of_a100(_fastlora, device, call),
        ),
    )


def _residual(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    M, N = shape[:2]
    return Case(
        op="lora_gemm_residual",
        shape=shape._asdict(),
        inputs=lambda new: _inputs(new, shape) | {"residual": new(M, N)},
        reference=lambda x, w, s, b, residual, **_: residual + (x @ w.t() + s @ b.t()),
        forward=_work(shape, dtype) + Work(M * N * dtype.itemsize, 0),
        providers=(
            Provider(
                "base alone (floor)",
                lambda x, w, residual, **_: torch.addmm(residual, x, w.t()),
                witness=lambda x, w, residual, **_: residual + x @ w.t(),
            ),
            Provider("base + addmm + add", lambda x, w, s, b, residual, **_: residual + (x @ w.t()).addmm_(s, b.t())),
            Provider(
                "addmm twice, C = residual",
                lambda x, w, s, b, residual, **_: torch.addmm(residual, s, b.t()).addmm_(x, w.t()),
            ),
            Provider("pitched, C = residual", lambda residual, pitched, **_: torch.addmm(residual, *pitched)),
            *methods(_fastlora, device, ("triton", "addmm")),
        ),
    )


def _work(shape: Shape, dtype: torch.dtype) -> Work:
    M, N, K, R, P = shape
    return Work((M * K + P * (N * K + M * N + R * (M + N))) * dtype.itemsize, 2 * M * P * N * (K + R))


def _inputs(new: New, shape: Shape) -> Inputs:
    """x (M, K), w (P·N, K), s (M, P·R), b (P·N, R); and by candidate the two factors of its one product, in a tuple,
    of which the gate makes no float64."""
    M, N, K, R, P = shape
    x, w = new(M, K), new(P * N, K, scale=K**-0.5)
    s, b = new(M, P * R), new(P * N, R, scale=R**-0.5)
    blocks = torch.block_diag(*b.chunk(P))
    factors = {name: (beside(x, s, pad), beside(w, blocks, pad).t()) for name, pad in shape.pads().items()}
    return {"x": x, "w": w, "s": s, "b": b, "stacked": (x, w.t()), **factors}


def beside(left: torch.Tensor, right: torch.Tensor, pad: int) -> torch.Tensor:
    """[left | right] as a view of rows with room for pad numbers beyond left's."""
    columns, used = left.shape[1], left.shape[1] + right.shape[1]
    rows = left.new_empty(left.shape[0], columns + pad)[:, :used]
    rows[:, :columns], rows[:, columns:] = left, right
    return rows


def one_product(name: str) -> Function:
    """The product of the two factors that the inputs hold under a name."""
    return lambda **inputs: torch.mm(*inputs[name])


def methods(run: Function, device: str, names: tuple[str, ...]) -> list[Provider]:
    """fastlora's operator; on a GPU in each of these methods, which FASTLORA_GEMM chooses."""
    if device != "cuda":
        return [Provider("fastlora", run)]

    def under(method: str) -> Function:
        def chosen(**inputs):
            with environment({"FASTLORA_GEMM": method}):
                return run(**inputs)

        return chosen

    return [Provider(f"fastlora {method}", under(method)) for method in names]


def tile_of_a100(run: Function, device: str, call: _tiles.Call) -> list[Provider]:
    """fastlora's kernel in the tile shipped for sm_80, on a GPU whose own is another."""
    if device != "cuda":
        return []
    with _tiles.assumed_arch(80):
        tile = _tiles.shipped(call)[0].tile
    if tile == _tiles.shipped(call)[0].tile:
        return []

    def in_tile(**inputs):
        with _tiles.forced(call.kernel, "triton", tile):
            return run(**inputs)

    return [Provider("fastlora triton, A100 tile", in_tile)]


def _each(w: torch.Tensor, s: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """(W_i, s_i, B_i) of every projection."""
    R = b.shape[1]
    P = s.shape[1] // R
    return zip(w.chunk(P), s.split(R, 1), b.chunk(P), strict=True)


def _split(run: Function, P: int) -> Function:
    return lambda **inputs: run(**inputs).chunk(P, 1)


def _products(x, w, s, b, **_):
    return tuple(x @ wi.t() for wi, _, _ in _each(w, s, b))


def _base_pitched(x, pitched, **_):
    K = x.shape[1]
    wide, weight = pitched
    return wide[:, :K] @ weight[:K]


def _addmm(x, w, s, b, **_):
    return tuple((x @ wi.t()).addmm_(si, bi.t()) for wi, si, bi in _each(w, s, b))


def _stacked_addmm(x, w, s, b, **_):
    every = list(_each(w, s, b))
    y = (x @ w.t()).chunk(len(every), 1)
    return tuple(yi.addmm_(si, bi.t()) for yi, (_, si, bi) in zip(y, every, strict=True))


def _fastlora(x, w, s, b, residual=None, **_):
    weights, _, b = zip(*_each(w, s, b), strict=True)
    y = torch.ops.fastlora.lora_gemm(x, weights, s, b, [None] * len(b), residual)
    return tuple(y)
