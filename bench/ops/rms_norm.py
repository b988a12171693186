"""RMSNorm of M rows of H numbers with a frozen weight.

Forward reads x and writes y: 2·M·H·e bytes. Backward reads dy and x and writes dx: 3·M·H·e.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from fastlora import reference

from ..case import Case, Work
from ..providers import Provider, attribute, compiled, foreign, ours

SHAPES = {"cpu": [(2048, 1024), (512, 4096)], "cuda": [(4096, 4096), (8192, 4096), (8192, 8192)], "quick": [(64, 128)]}
EPS = 1e-5


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for M, H in SHAPES["quick" if quick else device]:
        e = dtype.itemsize
        yield Case(
            op="rms_norm",
            shape={"M": M, "H": H},
            inputs=lambda new, M=M, H=H: {"x": new(M, H), "weight": 1 + new(H, scale=0.1)},
            reference=_eager,
            wrt=("x",),
            weights=("weight",),
            forward=Work(2 * M * H * e, 4 * M * H),
            backward=Work(3 * M * H * e, 8 * M * H),
            providers=(
                ours("rms_norm", eps=EPS),
                Provider("torch", lambda x, weight: F.rms_norm(x, (x.shape[-1],), weight, EPS)),
                compiled(_eager),
                foreign("liger", "liger_kernel", device, _liger),
                foreign("unsloth", "unsloth", device, _unsloth),
            ),
        )


def _eager(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return reference.rms_norm(x, weight, EPS)


def _liger():
    function = attribute("liger_kernel.ops.rms_norm.LigerRMSNormFunction")
    return lambda x, weight: function.apply(x, weight, EPS, 0.0, "llama", False)


def _unsloth():
    function = attribute("unsloth.kernels.rms_layernorm.Fast_RMS_Layernorm")
    return lambda x, weight: function.apply(x, weight, EPS, False)
