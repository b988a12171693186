"""4-bit weights, bit by bit what bitsandbytes makes of them."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from ops.witness import DEVICE

from fastlora import ops, reference

functional = pytest.importorskip("bitsandbytes.functional")
compute = pytest.importorskip("bitsandbytes.backends.default.ops")._dequantize_4bit_compute

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = ((3, 4096), (64, 96), (3, 5), (257,), (1, 2), (130, 34))


def quantise(shape, dtype=torch.float32, blocksize=64, quant_type="nf4", double=False, storage=torch.uint8):
    return functional.quantize_4bit(
        torch.randn(shape).to(dtype),
        blocksize=blocksize,
        quant_type=quant_type,
        compress_statistics=double,
        quant_storage=storage,
    )


def theirs(packed, state):
    """What bitsandbytes makes of it, on any device without a kernel of its own.

    Its AVX-512 kernel takes the scale of another block where rows do not end with a block: there this is bitsandbytes'
    result on other devices, elsewhere the same.
    """
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    with torch.compiler.set_stance("force_eager"):
        flat = packed.contiguous().view(torch.uint8).reshape(-1)
        return compute(flat, absmax, state.code, state.blocksize, state.shape, state.dtype).view(state.shape)


def assert_same_bits(ours, expected):
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    assert torch.equal(ours.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_same_bits(blocksize, quant_type, double):
    for dtype in FLOATS:
        for shape in SHAPES:
            packed, state = quantise(shape, dtype, blocksize, quant_type, double)
            ours = ops.dequantize_4bit(packed, state)
            assert_same_bits(ours, theirs(packed, state))
            assert_same_bits(ours, reference.dequantize_4bit(packed, state))
            if shape[-1] % blocksize == 0:  # bitsandbytes' own kernel for this CPU
                with torch.compiler.set_stance("force_eager"):
                    assert_same_bits(ours, functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float64])
def test_storage(storage):
    packed, state = quantise((64, 128), torch.bfloat16, double=True, storage=storage)
    assert packed.dtype == storage
    assert_same_bits(ops.dequantize_4bit(packed, state), functional.dequantize_4bit(packed, state))


def test_another_dtype_is_rounded_once():
    packed, state = quantise((64, 128), torch.float16, double=True)
    wide = copy.copy(state)
    wide.dtype = torch.float32
    exact = functional.dequantize_4bit(packed, wide)
    assert_same_bits(ops.dequantize_4bit(packed, state, torch.float32), exact)
    assert_same_bits(ops.dequantize_4bit(packed, state, torch.bfloat16), exact.bfloat16())


def test_transposed():
    packed, state = quantise((8, 64))
    assert_same_bits(ops.dequantize_4bit(packed.t(), state), functional.dequantize_4bit(packed.t(), state))


def test_every_value_and_every_scale():
    """All bytes and all 8-bit scales, in blocks of 32."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(16).view(-1, 1)
    _, state = quantise((16, 512), torch.float16, 32, double=True)
    state.absmax = torch.arange(256, dtype=torch.uint8)
    assert_same_bits(ops.dequantize_4bit(packed, state), theirs(packed, state))


@pytest.mark.parametrize("operand", ["packed", "absmax", "code", "offset", "state2.absmax", "state2.code"])
def test_every_operand_is_read(operand):
    packed, state = quantise((64, 128), double=True)
    expected = ops.dequantize_4bit(packed, state)
    holder = SimpleNamespace(packed=packed, absmax=state.absmax, code=state.code, offset=state.offset)
    name = operand.removeprefix("state2.")
    where = state.state2 if operand.startswith("state2.") else holder
    value = getattr(where, name)
    setattr(where, name, value + 1 if value.dtype == torch.uint8 else value * 1.5)
    state.absmax, state.code, state.offset = holder.absmax, holder.code, holder.offset
    assert not torch.equal(ops.dequantize_4bit(holder.packed, state), expected)


def repacked():
    packed, state = quantise((32, 64))
    return functional._convert_weight_packed_for_cpu(packed, state)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p, s: (p[:-1], s), ValueError, r"packed has 4095 bytes, needs 4096 for the shape \(64, 128\)"),
        (lambda p, s: (p, s, torch.float64), TypeError, "dtype is torch.float64, needs"),
        (lambda p, s: (p.to("meta"), s), ValueError, f"quant_state.absmax is on {DEVICE}, needs meta"),
        pytest.param(
            lambda p, s: repacked(),
            ValueError,
            "quant_state: repacked by bitsandbytes for inference",
            marks=pytest.mark.cpu_only(reason="a layout for CPUs"),
        ),
        (lambda p, s: (p, SimpleNamespace(quant_type="int8")), ValueError, "quant_state: quant_type int8"),
        (
            lambda p, s: (p, SimpleNamespace(quant_type="nf4", blocksize=48)),
            ValueError,
            "quant_state: blocksize 48, not among",
        ),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match="dequantize_4bit: " + message):
        ops.dequantize_4bit(*change(*quantise((64, 128))))


def group(weights, which=(0, 1, 2), norm=False):
    """Outputs and gradients of projections of one fp32 x: one adapter, two, and none."""
    torch.manual_seed(1)
    x = torch.randn(9, 64).requires_grad_()
    rows, ranks = (96, 32, 40), ((4,), (3, 2), ())
    adapters = [
        tuple(ops.Branch(torch.randn(r, 64).requires_grad_(), torch.randn(n, r).requires_grad_(), 0.5) for r in some)
        for n, some in zip(rows, ranks)
    ]
    dy = [torch.randn(9, n).bfloat16() for n in rows]
    projections = [ops.Projection(weights[i], None, adapters[i]) for i in which]
    y = ops.lora_group(x, projections, norm_weight=torch.rand(64) if norm else None)
    torch.autograd.backward(y[: len(which)], [dy[i] for i in which])
    grads = [t.grad for i in which for branch in adapters[i] for t in (branch.a, branch.b)]
    return [one.detach() for one in y], grads, x.grad


def bases():
    pairs = [quantise((n, 64), torch.bfloat16, double=True) for n in (96, 32, 40)]
    return [ops.quantised(*pair) for pair in pairs], [ops.dequantize_4bit(*pair) for pair in pairs]


@pytest.mark.parametrize("norm", [False, True], ids=["bare", "norm"])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_a_group_over_4_bits_is_the_group_over_its_dense_weights(which, norm):
    """Bit by bit; but dx, of several, is the sum of what each alone gives."""
    packed, dense = bases()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y, grads, dx = group(packed, which, norm)
        y_dense, grads_dense, dx_dense = group(dense, which, norm)
        for ours, expected in zip((*y, *grads), (*y_dense, *grads_dense)):
            assert_same_bits(ours, expected)
        if len(which) == 1:
            assert_same_bits(dx, dx_dense)
        elif not norm:
            first, *parts = (group(dense, (i,))[2] for i in which)
            for part in parts:
                first += part
            assert_same_bits(dx, first)


def test_x_of_another_dtype_goes_to_that_of_the_weight():
    packed, dense = bases()
    y, _, dx = group(packed, (0,))
    assert (y[0].dtype, dx.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert_same_bits(y[0], group(dense, (0,))[0][0])
    x, (a, b) = torch.randn(5, 64), (torch.randn(4, 64), torch.randn(96, 4))
    assert_same_bits(ops.lora_linear(x, packed[0], a, b), ops.lora_linear(x.bfloat16(), dense[0], a, b))
