from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..kernels import dequantize_4bit as _dequantize  # noqa: F401  registers the operator
from . import _check

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, eq=False)
class Quantised:
    """A 4-bit weight where an op takes a dense one: made dense for the length of one product, and never kept.

    Attributes:
        packed: uint8 (⌈N · K / 2⌉,), two elements a byte, the high half first.
        absmax: scales of blocks of ``blocksize`` elements, fp32; with double quantisation uint8, and the scales are
            ``code2[absmax] · absmax2 + offset``, absmax2 having one number per ``blocksize2`` blocks.
        code: fp32 (16,), what a half byte stands for.
        shape: (N, K).
        dtype: the dtype it is made dense in, bitsandbytes' compute dtype.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    absmax2: torch.Tensor | None
    code2: torch.Tensor | None
    offset: torch.Tensor | None
    blocksize: int
    blocksize2: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight in ``shape``, each element rounded once to dtype."""
        flat = torch.ops.fastlora.dequantize_4bit(
            *(self.packed, self.absmax, self.code, self.absmax2, self.code2, self.offset),
            *(self.blocksize, self.blocksize2, self.shape.numel(), dtype or self.dtype),
        )
        return flat.view(self.shape)


def why_not_4bit(quant_state: Any) -> str | None:
    """Why weights with this bitsandbytes QuantState cannot be read; None where they can."""
    if getattr(quant_state, "packing_format_for_cpu", False):
        return "repacked by bitsandbytes for inference on this CPU, its scales rounded to bfloat16"
    if quant_state.quant_type not in ("nf4", "fp4"):
        return f"quant_type {quant_state.quant_type}, neither nf4 nor fp4"
    if quant_state.blocksize not in BLOCKSIZES:
        return f"blocksize {quant_state.blocksize}, not among {BLOCKSIZES}"
    if quant_state.state2 is not None and quant_state.state2.state2 is not None:
        return "scales quantised more than twice"
    return None


def quantised(packed: torch.Tensor, quant_state: Any, dtype: torch.dtype | None = None) -> Quantised:
    """A bitsandbytes weight and its QuantState as a ``Quantised``, by reference; dtype: quant_state's by default."""
    op = "dequantize_4bit"
    if why := why_not_4bit(quant_state):
        raise ValueError(f"{op}: quant_state: {why}")
    dtype = quant_state.dtype if dtype is None else dtype
    if dtype not in _check.FLOATS:
        raise TypeError(f"{op}: dtype is {dtype}, needs torch.float32, torch.bfloat16 or torch.float16")
    absmax, second = quant_state.absmax, quant_state.state2
    # Whatever the bytes are stored as, and without what a Parameter's subclass adds.
    plain = packed.detach().contiguous().view(torch.uint8).reshape(-1)
    shape = torch.Size(quant_state.shape)
    if plain.numel() != (needed := (shape.numel() + 1) // 2):
        raise ValueError(f"{op}: packed has {plain.numel()} bytes, needs {needed} for the shape {tuple(shape)}")
    found = Quantised(
        plain,
        absmax.reshape(-1).contiguous() if second is not None else absmax.reshape(-1).float(),
        quant_state.code,
        None if second is None else second.absmax.float(),
        None if second is None else second.code,
        None if second is None else quant_state.offset,
        quant_state.blocksize,
        1 if second is None else second.blocksize,
        shape,
        dtype,
    )
    rest = {"absmax": found.absmax, "code": found.code, "offset": found.offset, "state2.absmax": found.absmax2}
    _check.same_device(op, "packed", found.packed, **{f"quant_state.{name}": t for name, t in rest.items()})
    return found


def dequantize_4bit(packed: torch.Tensor, quant_state: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weight that bitsandbytes quantised to 4 bits: ``w_i = code[half byte i] · scale[i // blocksize]``.

    scale is absmax or, with double quantisation, ``code2[absmax] · absmax2 + offset``. The products are fp32 and the
    result is rounded once: bit by bit what ``bitsandbytes.functional.dequantize_4bit`` defines, for nf4 and fp4, every
    blocksize and every storage dtype. No gradient flows.

    Args:
        packed: (⌈n / 2⌉, 1) in uint8, or the same bytes in another dtype; transposed, the result is too.
        quant_state: a bitsandbytes QuantState, or anything with its attributes.
        dtype: of the result; quant_state.dtype by default.

    Returns:
        quant_state.shape.

    Raises:
        ValueError, TypeError: a quant_state or dtype that has no such form, bytes that are not as many as the shape
        needs, or tensors on different devices. The layout that bitsandbytes makes for inference on some CPUs
        (``packing_format_for_cpu``) is refused: its scales are not those the weight was quantised with.

    Source: Dettmers et al., QLoRA, arXiv:2305.14314.
    """
    dense = quantised(packed, quant_state, dtype).dense()
    return dense.t() if packed.dim() == 2 and packed.shape[0] == 1 < packed.shape[1] else dense
