"""silu(gate) · up over M rows of F numbers.

Forward reads two and writes one: 3·M·F·e bytes. Backward reads dh, gate, up and writes dgate, dup: 5·M·F·e.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastlora import reference

from ..case import Case, Work
from ..providers import attribute, compiled, foreign, ours

SHAPES = {
    "cpu": [(2048, 2752), (512, 11008)],
    "cuda": [(4096, 11008), (8192, 11008), (8192, 28672)],
    "quick": [(64, 96)],
}


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for M, F in SHAPES["quick" if quick else device]:
        e = dtype.itemsize
        yield Case(
            op="swiglu",
            shape={"M": M, "F": F},
            inputs=lambda new, M=M, F=F: {"gate": new(M, F), "up": new(M, F)},
            reference=reference.swiglu,
            wrt=("gate", "up"),
            forward=Work(3 * M * F * e, 5 * M * F),
            backward=Work(5 * M * F * e, 10 * M * F),
            providers=(
                ours("swiglu"),
                compiled(reference.swiglu),
                foreign("liger", "liger_kernel", device, _liger),
                foreign("unsloth", "unsloth", device, _unsloth),
            ),
        )


def _liger():
    return attribute("liger_kernel.ops.swiglu.LigerSiLUMulFunction").apply


def _unsloth():
    forward = attribute("unsloth.kernels.swiglu.swiglu_fg_kernel")
    backward = attribute("unsloth.kernels.swiglu.swiglu_DWf_DW_dfg_kernel")

    class SwiGLU(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, up):
            ctx.save_for_backward(gate, up)
            return forward(gate[None], up[None])[0]

        @staticmethod
        def backward(ctx, dh):
            gate, up = ctx.saved_tensors
            # Its kernel overwrites all three: dh becomes h, gate becomes dup, up becomes dgate.
            _, dup, dgate = backward(dh.clone(), gate.clone(), up.clone())
            return dgate, dup

    return SwiGLU.apply
