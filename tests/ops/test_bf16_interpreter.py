"""The interpreter's bf16, as bf16_interpreter.py mends it, gives torch's own bits."""

import pytest
import torch

from fastlora.kernels._library import INTERPRET

if not INTERPRET:
    pytest.skip("TRITON_INTERPRET=1 only", allow_module_level=True)

from fastlora.kernels._tl import tl, triton

N = 1024


@triton.jit
def _elementwise_kernel(p_x, p_y, p_out, OP: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    x = tl.load(p_x + o)
    y = tl.load(p_y + o)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "div":
        out = (x.to(tl.float32) / y.to(tl.float32)).to(x.dtype)
    elif OP == "neg":
        out = -x
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "max":
        out = tl.maximum(x, y)
    elif OP == "greater":
        out = tl.where(x > y, x, y)
    elif OP == "constant":
        out = x * 0.3
    elif OP == "fp32":
        out = (x.to(tl.float32) * 1.001).to(x.dtype)
    elif OP == "fp16":
        out = x.to(tl.float16).to(x.dtype)
    tl.store(p_out + o, out)


@triton.jit
def _store_kernel(p_x, p_out, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_out + o, tl.load(p_x + o))


@triton.jit
def _reduce_kernel(p_x, p_out, OP: tl.constexpr, N: tl.constexpr):
    x = tl.load(p_x + tl.arange(0, N))
    tl.store(p_out, tl.sum(x, axis=0) if OP == "sum" else tl.max(x, axis=0))


@triton.jit
def _dot_kernel(p_a, p_b, p_out, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(p_out + o, tl.dot(tl.load(p_a + o), tl.load(p_b + o)))


def values() -> torch.Tensor:
    """Magnitudes from 2^-10 to 2^10, both signs."""
    return (torch.randn(N) * 2.0 ** torch.randint(-10, 11, (N,))).bfloat16()


ELEMENTWISE = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "max": torch.maximum,
    "greater": torch.maximum,
    "constant": lambda x, y: x * torch.tensor(0.3).bfloat16(),
    "fp32": lambda x, y: (x.float() * 1.001).bfloat16(),
    "fp16": lambda x, y: x.half().bfloat16(),
}


def same_bits(ours: torch.Tensor, torchs: torch.Tensor) -> bool:
    return torch.equal(ours.view(torch.int16), torchs.view(torch.int16))


@pytest.mark.parametrize("op", ELEMENTWISE)
def test_elementwise(op):
    x, y = values(), values()
    out = torch.empty_like(x)
    _elementwise_kernel[(1,)](x, y, out, OP=op, N=N)
    assert same_bits(out, ELEMENTWISE[op](x, y))


def test_a_store_rounds_to_nearest_even():
    # Ties below and above an even number, one step either side of them, overflow to infinity, and NaN.
    patterns = [0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0x7FC00000]
    x = torch.cat([torch.tensor(patterns, dtype=torch.int32).view(torch.float32), torch.randn(N - len(patterns))])
    out = torch.empty(N, dtype=torch.bfloat16)
    _store_kernel[(1,)](x, out, N=N)
    expected = x.bfloat16()
    number = ~expected.isnan()
    assert same_bits(out[number], expected[number])
    assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("op", ["sum", "max"])
def test_reductions(op):
    x = torch.randint(-8, 9, (N,)).bfloat16()  # exact in any order
    out = torch.empty(1, dtype=torch.bfloat16)
    _reduce_kernel[(1,)](x, out, OP=op, N=N)
    assert same_bits(out, x.sum(0, keepdim=True) if op == "sum" else x.amax(0, keepdim=True))


def test_dot():
    a, b = (torch.randint(-8, 9, (32, 32)).bfloat16() for _ in range(2))  # exact in any order
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, out, N=32)
    assert torch.equal(out, a.float() @ b.float())
