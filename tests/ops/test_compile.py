"""torch.compile takes every op in one graph, forward and backward, and changes no number."""

import pytest
import torch
from ops.cases import EVERY, K, N, R, leaves, lora_linear, outputs_of
from ops.witness import check
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from fastlora import ops
from fastlora.kernels._library import INTERPRET
from fastlora.ops._transforms import transform


def outputs_and_gradients(function, inputs):
    outputs = outputs_of(function(*inputs))
    gradients = torch.autograd.grad([(o * o.detach().cos()).sum() for o in outputs], inputs)
    return [o.detach() for o in outputs], list(gradients)


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()


@pytest.mark.parametrize(("op", "make"), EVERY)
def test_one_graph_and_the_same_bits(op, make):
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


def test_a_compiled_function_under_a_transform():
    """What was compiled outside of one is not run by it."""
    x, weight = leaves((3, 8), (8,))
    compiled = torch.compile(ops.rms_norm, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), ops.rms_norm(x, weight))
    with pytest.raises(RuntimeError, match="fastlora.ops.rms_norm does not run under torch.func's (grad|transforms)"):
        torch.func.grad(lambda *inputs: compiled(*inputs).sum())(x.detach(), weight.detach())


def test_known_inside_a_compiled_function():
    """A module may ask there: the answer is a constant of the graph."""

    def function(x):
        return x * 2 if transform() is None else x * 3

    assert torch.compile(function, backend="eager", fullgraph=True)(torch.ones(1)) == 2
    assert torch.compile(torch.func.vmap(function), backend="eager", fullgraph=True)(torch.ones(1)) == 3
