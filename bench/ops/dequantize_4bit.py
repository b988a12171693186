"""A 4-bit weight made dense: nf4 in blocks of 64, scales in fp32.

No FLOPs. Bytes: half of one per element and four per block read, the weight written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch

from fastlora import ops, reference

from ..case import Case, Inputs, New, Provider, Work
from ..providers import attribute, compiled, foreign

SHAPES = {"cpu": [(2752, 1024)], "cuda": [(4096, 4096), (11008, 4096)], "quick": [(96, 64)]}
_BLOCK = 64


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for N, K in SHAPES["quick" if quick else device]:
        yield Case(
            op="dequantize_4bit",
            shape={"N": N, "K": K},
            inputs=lambda new, shape=(N, K): _inputs(new, *shape),
            reference=_through(reference.dequantize_4bit, (N, K)),
            forward=Work(N * K * (0.5 + 4 / _BLOCK + dtype.itemsize), 0),
            providers=(
                Provider("fastlora", _through(ops.dequantize_4bit, (N, K))),
                compiled(_through(reference.dequantize_4bit, (N, K))),
                foreign("bitsandbytes", "bitsandbytes", device, lambda s=(N, K): _bitsandbytes(s), needs_gpu=False),
            ),
        )


def _inputs(new: New, N: int, K: int) -> Inputs:
    """``like`` carries the dtype of the result; nf4's sixteen numbers are the quantiles of a normal distribution."""
    return {
        "packed": new.integers(256, N * K // 2, 1).to(torch.uint8),
        "absmax": new(N * K // _BLOCK, scale=0.02, dtype=torch.float32).abs(),
        "code": _nf4().to(new.device),
        "like": new(0),
    }


def _nf4() -> torch.Tensor:
    """As the QLoRA paper makes it: quantiles on both sides of 0, scaled to [−1, 1]."""
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    code = torch.cat([negative, torch.zeros(1), positive]).sort().values
    return code / code.max()


def _through(run, shape):
    def dense(packed, absmax, code, like):
        state = SimpleNamespace(
            quant_type="nf4", blocksize=_BLOCK, absmax=absmax, code=code, state2=None, shape=torch.Size(shape),
            dtype=like.dtype,
        )  # fmt: skip
        return run(packed, state)

    return dense


def _bitsandbytes(shape):
    run, state = (attribute(f"bitsandbytes.functional.{name}") for name in ("dequantize_4bit", "QuantState"))

    def dense(packed, absmax, code, like):
        return run(packed, state(absmax, torch.Size(shape), code, _BLOCK, "nf4", like.dtype))

    return dense
