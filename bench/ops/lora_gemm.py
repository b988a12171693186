"""The products that decide the design, with the rank-R operand already made, by every candidate.

lora_gemm    y = x Wᵀ + s Bᵀ, forward; s = scaling · x Aᵀ. FLOPs 2·M·N·(K + R).
lora_gemm_t  dx = dy W + ds A, backward; ds = scaling · dy B. As many.

Candidates: the base product alone (the floor), base product then addmm, one augmented product [x | s] [W | B]ᵀ over
rows of pitch K + 64 and of tight pitch K + R, and fastlora's operator in each of its methods.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

import fastlora.ops  # noqa: F401  registers the operators

from ..case import Case, Function, Inputs, New, Work
from ..providers import Provider

_7B = [(4096, 4096), (11008, 4096), (4096, 11008), (12288, 4096)]  # (N, K): o, gate or up, down, q+k+v
SHAPES = {
    "cpu": [(2048, 1024, 1024, 16), (2048, 2752, 1024, 16)],
    "cuda": [(M, N, K, R) for R in (16, 64) for M in (4096, 8192) for N, K in _7B],
    "quick": [(64, 96, 64, 16)],
}
PAD = 64


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for M, N, K, R in SHAPES["quick" if quick else device]:
        work = Work((M * K + N * K + M * N + (M + N) * R) * dtype.itemsize, 2 * M * N * (K + R))
        yield Case(
            op="lora_gemm",
            shape={"M": M, "N": N, "K": K, "R": R},
            inputs=lambda new, shape=(M, N, K, R): _inputs(new, *shape),
            reference=lambda x, w, s, b, **_: x @ w.t() + s @ b.t(),
            forward=work,
            providers=(
                Provider("base alone (floor)", _base, witness=_base),
                Provider("base + addmm", lambda x, w, s, b, **_: (x @ w.t()).addmm_(s, b.t())),
                Provider("augmented, pitch K+64", lambda xs, wb, **_: xs @ wb.t()),
                Provider("augmented, pitch K+R", lambda xs_tight, wb_tight, **_: xs_tight @ wb_tight.t()),
                *_methods(
                    lambda x, w, s, b, **_: torch.ops.fastlora.lora_gemm(x, [w], s, [b], [None], None)[0], device
                ),
            ),
        )
        yield Case(
            op="lora_gemm_t",
            shape={"M": M, "N": N, "K": K, "R": R},
            inputs=lambda new, shape=(M, N, K, R): _inputs_t(new, *shape),
            reference=lambda dy, w, ds, a: dy @ w + ds @ a,
            forward=work,
            providers=(
                Provider("base alone (floor)", _base_t, witness=_base_t),
                Provider("base + addmm", lambda dy, w, ds, a: (dy @ w).addmm_(ds, a)),
                *_methods(lambda dy, w, ds, a: torch.ops.fastlora.lora_gemm_t([dy], [w], ds, [a], [None]), device),
            ),
        )


def _methods(run: Function, device: str) -> list[Provider]:
    """fastlora's operator; on a GPU in each of its methods, which FASTLORA_GEMM chooses."""
    if device != "cuda":
        return [Provider("fastlora", run)]

    def under(method: str) -> Function:
        def chosen(**inputs):
            before = os.environ.get("FASTLORA_GEMM")
            os.environ["FASTLORA_GEMM"] = method
            try:
                return run(**inputs)
            finally:
                if before is None:
                    del os.environ["FASTLORA_GEMM"]
                else:
                    os.environ["FASTLORA_GEMM"] = before

        return chosen

    return [Provider(f"fastlora {method}", under(method)) for method in ("triton", "addmm", "augmented")]


def _base(x, w, **_):
    return x @ w.t()


def _base_t(dy, w, **_):
    return dy @ w


def _inputs(new: New, M: int, N: int, K: int, R: int) -> Inputs:
    x, w = new(M, K), new(N, K, scale=K**-0.5)
    s, b = new(M, R), new(N, R, scale=R**-0.5)

    def beside(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """[left | right] as a view of rows whose pitch is a multiple of 128 bytes in bf16."""
        rows = left.new_empty(left.shape[0], K + -(-R // PAD) * PAD)[:, : K + R]
        return rows.copy_(torch.cat((left, right), 1))

    xs, wb = beside(x, s), beside(w, b)
    return {
        "x": x,
        "w": w,
        "s": s,
        "b": b,
        "xs": xs,
        "wb": wb,
        "xs_tight": xs.contiguous(),
        "wb_tight": wb.contiguous(),
    }


def _inputs_t(new: New, M: int, N: int, K: int, R: int) -> Inputs:
    return {"dy": new(M, N), "w": new(N, K, scale=N**-0.5), "ds": new(M, R), "a": new(R, K, scale=R**-0.5)}
