"""Makes Triton's interpreter right in bfloat16, for tests, and multiply as torch does.

The interpreter keeps bf16 as uint16 bit patterns: it loads, stores and selects them rightly, but adds, compares,
multiplies and reduces the patterns themselves, and its cast from fp32 truncates. Here every such step goes through
fp32 and is rounded to nearest even, as a GPU (and torch) does it. Products of fp32 are torch's: eager is the yardstick
of the tests, and on some processors its BLAS sums in half the error of numpy's.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

_UNARY = ("unary_op", "create_rsqrt", "create_erf")
_BINARY = ("binary_op",)
_TERNARY = ("create_clampf", "create_fma")
_REDUCTIONS = ((ReduceOps, "sum"), (ReduceOps, "min_max"), (ScanOps, "cumsum"), (ScanOps, "cumprod"))


def _to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_bits(values: np.ndarray) -> np.ndarray:
    """fp32 to bf16 patterns, to nearest, ties to even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    word = values.view(np.uint32)
    rounded = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _is_bf16(handle) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widen(handle):
    return TensorHandle(_to_fp32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrow(handle: TensorHandle) -> TensorHandle:
    # A comparison carries the dtype of its operands around booleans: only the name changes back.
    data = handle.data if handle.data.dtype == np.bool_ else _to_bits(handle.data)
    return TensorHandle(data, tl.bfloat16)


def _through_fp32(method):
    """A builder method whose bf16 operands are widened and whose result is rounded back."""

    @functools.wraps(method)
    def wrapped(self, *operands, **options):
        if not any(map(_is_bf16, operands)):
            return method(self, *operands, **options)
        return _narrow(method(self, *map(_widen, operands), **options))

    return wrapped


def _dot(method):
    @functools.wraps(method)
    def wrapped(self, a, b, acc, *rest, **options):
        a, b = _widen(a), _widen(b)
        if a.data.dtype != np.float32 or b.data.dtype != np.float32:
            return method(self, a, b, acc, *rest, **options)
        product = torch.from_numpy(a.data) @ torch.from_numpy(b.data)
        return TensorHandle(product.numpy() + acc.data, acc.dtype.scalar)

    return wrapped


def _cast(method):
    @functools.wraps(method)
    def wrapped(self, src, dst_type, *rest):
        to_bf16 = dst_type.scalar == tl.bfloat16
        if _is_bf16(src) == to_bf16:
            return src if to_bf16 else method(self, src, dst_type, *rest)
        if to_bf16:
            return TensorHandle(_to_bits(src.data), tl.bfloat16)
        return InterpreterBuilder.cast_impl(self, _widen(src), dst_type)

    return wrapped


def _reduction(method):
    @functools.wraps(method)
    def wrapped(self, argument, *rest, **options):
        argument = argument[0] if isinstance(argument, tuple) else argument
        if argument.dtype.scalar != tl.bfloat16:
            return method(self, argument, *rest, **options)

        def convert(tensor, change, dtype):
            kind = tl.block_type(dtype, list(tensor.shape)) if len(tensor.shape) else dtype
            return tl.core.tensor(change(tensor.handle), kind)

        def back(tensor):  # an index that comes along stays as it is
            return convert(tensor, _narrow, tl.bfloat16) if tensor.dtype.scalar == tl.float32 else tensor

        result = method(self, convert(argument, _widen, tl.float32), *rest, **options)
        return type(result)(map(back, result)) if isinstance(result, (tuple, list)) else back(result)

    return wrapped


def install() -> None:
    """Change the interpreter of this process; a second call changes nothing."""
    if getattr(interpreter, "_bf16_through_fp32", False):
        return
    interpreter._bf16_through_fp32 = True
    for name in (*_UNARY, *_BINARY, *_TERNARY):
        setattr(InterpreterBuilder, name, _through_fp32(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.create_dot = _dot(InterpreterBuilder.create_dot)
    # The casts are class attributes that call self.cast_impl; the second is the one that takes a rounding mode.
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = _cast(InterpreterBuilder.create_fp_to_fp)
    if not hasattr(InterpreterBuilder, "get_bf16"):  # Triton 3.6
        InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(_to_bits(np.array([value])), tl.bfloat16)
    for kind, name in _REDUCTIONS:
        setattr(kind, name, _reduction(getattr(kind, name)))
