"""torch.compile takes every op in one graph, forward and backward, and changes no number."""

import pytest
import torch
from ops.witness import check
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from fastlora import ops
from fastlora.kernels._library import INTERPRET

M, K, N, R = 6, 24, 40, 4


def leaves(*shapes):
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def rms_norm():
    return ops.rms_norm, leaves((2, 3, K), (K,))


def swiglu():
    return ops.swiglu, leaves((M, K), (M, K))


def rope():
    cos, sin = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    return lambda q, k: ops.rope(q, k, cos, sin), leaves((2, 4, 5, 8), (2, 2, 5, 8))


def lora_linear():
    return lambda *t: ops.lora_linear(*t[:4], 0.5, t[4]), leaves((2, 3, K), (N, K), (R, K), (N, R), (N,))


def lora_group():
    """A norm, two projections of what it gives, one with two adapters, and the connection past them."""

    def function(x, norm, w1, a1, b1, w2, a2, b2, a3, b3):
        two = (ops.Branch(a2, b2, 0.5), ops.Branch(a3, b3, 2.0))
        projections = [ops.Projection(w1, None, (ops.Branch(a1, b1),)), ops.Projection(w2, None, two)]
        return ops.lora_group(x, projections, norm_weight=norm)

    adapter = (R, K), (N, R)
    return function, leaves((2, 3, K), (K,), (N, K), *adapter, (N, K), *adapter, *adapter)


def lora_qkv():
    """Queries and keys rotated."""
    tables = torch.randn(1, 3, 8), torch.randn(1, 3, 8)

    def function(x, w1, a1, b1, w2, a2, b2):
        adapters = ops.Branch(a1, b1), ops.Branch(a2, b2, 0.5)
        projections = [ops.Projection(w, None, (one,)) for w, one in zip((w1, w2), adapters)]
        return ops.lora_group(x, projections, rotary=tables)

    adapter = (R, K), (N, R)
    return function, leaves((2, 3, K), (N, K), *adapter, (N, K), *adapter)


def lora_mlp():
    def function(x, norm, w1, a1, b1, w2, a2, b2, w3, a3, b3):
        adapters = ops.Branch(a1, b1), ops.Branch(a2, b2, 0.5), ops.Branch(a3, b3, 2.0)
        three = (ops.Projection(w, None, (one,)) for w, one in zip((w1, w2, w3), adapters))
        return ops.lora_mlp(x, *three, norm_weight=norm)

    adapter = (R, K), (N, R)
    return function, leaves((M, K), (K,), (N, K), *adapter, (N, K), *adapter, (K, N), (R, N), (K, R))


def linear_cross_entropy():
    labels = torch.tensor([3, -100, 7, 0, 39, 1])
    return lambda h, w: ops.linear_cross_entropy(h, w, labels), leaves((M, K), (N, K))


def linear_cross_entropy_of_items():
    labels = torch.tensor([3, -100, 7, 0, 39, 1])
    return lambda h, w: ops.linear_cross_entropy(h, w, labels, num_items=torch.tensor(9)), leaves((M, K), (N, K))


def flash_attention():
    return lambda q, k, v: ops.flash_attention(q, k, v), leaves((2, 4, 6, 32), (2, 2, 6, 32), (2, 2, 6, 32))


def dora():
    fixed = [torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)]
    return lambda y, m: ops.dora(y, m, *fixed, 0.5), leaves((M, N), (N,))


OPS = (
    *(rms_norm, swiglu, rope, lora_linear, lora_group, lora_qkv, lora_mlp),
    *(linear_cross_entropy, linear_cross_entropy_of_items, flash_attention, dora),
)


def outputs_and_gradients(function, inputs):
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad([(o * o.detach().cos()).sum() for o in outputs], inputs)
    return [o.detach() for o in outputs], list(gradients)


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()


@pytest.mark.parametrize("make", OPS, ids=lambda make: make.__name__)
def test_one_graph_and_the_same_bits(make):
    function, inputs = make()
    expected = outputs_and_gradients(function, inputs)
    ours = outputs_and_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs)
    for kind in (0, 1):
        for got, wanted in zip(ours[kind], expected[kind], strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("make", [lora_linear], ids=lambda make: make.__name__)
def test_dynamic_shapes(make):
    function, (x, *parameters) = make()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (3, 4, 9):
        inputs = [torch.randn(2, T, K).requires_grad_(), *parameters]
        for ours, eager in zip(outputs_and_gradients(compiled, inputs), outputs_and_gradients(function, inputs)):
            assert all(map(torch.equal, ours, eager))


@pytest.mark.skipif(INTERPRET, reason="inductor compiles what is around the operators, not the operators")
def test_inductor():
    """The default backend, on the op of most parts."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:  # an installation of ours without one is meant to work
        pytest.skip(str(error))

    def make():
        shapes = {"x": (2, 3, K), "weight": (N, K), "lora_a": (R, K), "lora_b": (N, R), "bias": (N,)}
        return dict(zip(shapes, leaves(*shapes.values()), strict=True))

    check(torch.compile(ops.lora_linear, fullgraph=True), make, scaling=0.5)
