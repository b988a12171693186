"""Cross-entropy of a frozen head over M rows: logits = hidden Wᵀ (V, H), loss and its gradient for hidden.

FLOPs: 2·M·V·H for the loss and as many for dhidden. Bytes: hidden and W read for each, dhidden written. Implementations
that make the gradient in the forward do the work of both there, so that only "full" compares.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastlora import reference

from ..case import Case, Work
from ..providers import attribute, compiled, foreign, ours

SHAPES = {"cpu": [(2048, 1024, 32000)], "cuda": [(4096, 4096, 32000), (8192, 4096, 32000)], "quick": [(40, 32, 128)]}


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for M, H, V in SHAPES["quick" if quick else device]:
        work = Work((M * H + V * H) * dtype.itemsize, 2 * M * V * H)
        yield Case(
            op="linear_cross_entropy",
            shape={"M": M, "H": H, "V": V},
            inputs=lambda new, M=M, H=H, V=V: {
                "hidden": new(M, H),
                "weight": new(V, H, scale=H**-0.5),
                "labels": new.integers(V, M),
            },
            reference=reference.linear_cross_entropy,
            wrt=("hidden",),
            weights=("weight",),
            terms=_terms,
            forward=work,
            backward=Work(work.bytes + M * H * dtype.itemsize, work.flops),
            providers=(
                ours("linear_cross_entropy"),
                compiled(reference.linear_cross_entropy),
                foreign("liger", "liger_kernel", device, _liger),
                foreign("cut-cross-entropy", "cut_cross_entropy", device, _cce),
            ),
        )


def _terms(hidden, weight, labels):
    with torch.no_grad():
        return reference.linear_cross_entropy(hidden, weight, labels, reduction="none")


def _liger():
    function = attribute("liger_kernel.ops.fused_linear_cross_entropy.LigerFusedLinearCrossEntropyFunction")

    def run(hidden, weight, labels):
        out = function.apply(hidden, weight, labels)
        return out[0] if isinstance(out, tuple) else out

    return run


def _cce():
    function = attribute("cut_cross_entropy.linear_cross_entropy")
    return lambda hidden, weight, labels: function(hidden, weight, labels, impl="cce_exact")
