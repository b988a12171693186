"""Gradients are exact once; under create_graph=True each knows that it has no gradient of its own, and says so."""

import inspect

import pytest
import torch
from ops.cases import CASES, EVERY, NO_GRADIENT, K, M, N, R, leaves, outputs_of
from ops.witness import DEVICE
from torch.utils.checkpoint import checkpoint

from fastlora import ops

CASE = pytest.mark.parametrize(("op", "make"), EVERY)


def test_the_cases_are_of_every_op():
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert set(CASES) | NO_GRADIENT == functions


def refused(op):
    words = f"fastlora.ops.{op} has no second derivative: use the plain PyTorch expression .*unpatch"
    return pytest.raises(RuntimeError, match=words)


def curved(outputs):
    """A loss whose gradient depends on the outputs."""
    return sum((o * o).sum() for o in outputs)


def straight(outputs):
    """A loss whose gradient does not."""
    return sum((o * torch.linspace(-1, 2, o.numel()).view(o.shape)).sum() for o in outputs)


def gradients(function, inputs, loss=curved, **more):
    return torch.autograd.grad(loss(outputs_of(function(*inputs))), inputs, **more)


def penalty(found):
    return sum(g.pow(2).sum() for g in found)


@CASE
@pytest.mark.parametrize("loss", [curved, straight])
def test_the_first_gradients_are_the_same_bits(op, make, loss):
    function, inputs = make()
    plain, graphed = gradients(function, inputs, loss), gradients(function, inputs, loss, create_graph=True)
    assert all(g.requires_grad for g in graphed)
    assert all(map(torch.equal, plain, graphed))
    with refused(op):
        penalty(graphed).backward()


@CASE
def test_a_second_derivative_raises(op, make):
    """Of each input alone too, where a path beside the penalty leads to it."""
    function, inputs = make()
    for one in inputs:
        loss = curved(outputs_of(function(*inputs)))
        found = torch.autograd.grad(loss, inputs, create_graph=True)
        with refused(op):
            torch.autograd.grad(loss + penalty(found), one)


def half_precision():
    """x as autocast makes it of an fp32 one, inside of the op."""

    def function(x, w, a, b):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return ops.lora_linear(x, w, a, b)

    return function, leaves((M, K), (N, K), (R, K), (N, R))


HOOKS = {
    "saved": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "saved on the CPU": torch.autograd.graph.save_on_cpu,
}


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize(("op", "make"), [*EVERY, pytest.param("lora_linear", half_precision, id="half_precision")])
def test_no_dependence_is_missed(op, make, hooks):
    """Where the incoming gradient is constant, the node must hang on the input itself.

    A gradient depends on an input where another value of it makes another gradient: then a second derivative, even
    beside a loss that leads to the input past the node, must not come out.
    """
    function, inputs = make()
    with HOOKS[hooks]():
        loss = straight(outputs_of(function(*inputs)))
    found = torch.autograd.grad(loss, inputs, create_graph=True)
    for i, one in enumerate(inputs):
        others = [t.detach() * 1.5 if j == i else t.detach() for j, t in enumerate(inputs)]
        moved = gradients(function, [t.requires_grad_() for t in others], straight)
        changed = [g for g, other in zip(found, moved, strict=True) if not torch.equal(g, other)]
        for g in changed:
            with refused(op):
                torch.autograd.grad(loss + penalty([g]), one, retain_graph=True)


def test_most_gradients_depend_on_inputs():
    """Or the test before this would test nothing."""
    linear = {"rope"}
    for op, makes in CASES.items():
        function, inputs = makes[0]()
        found = gradients(function, inputs, straight)
        moved = gradients(function, [(t.detach() * 1.5).requires_grad_() for t in inputs], straight)
        assert all(map(torch.equal, found, moved)) == (op in linear), op


@CASE
def test_checkpointed(op, make):
    """Whose saved tensors may be asked for once."""
    function, inputs = make()

    def checkpointed(*tensors):
        return checkpoint(function, *tensors, use_reentrant=False)

    found = gradients(checkpointed, inputs, create_graph=True)
    assert all(map(torch.equal, found, gradients(function, inputs)))
    with refused(op):
        torch.autograd.grad(penalty(found), inputs)
    for reentrant in (False, True):
        assert all(map(torch.equal, found, through_checkpoint(function, inputs, reentrant)))


def through_checkpoint(function, inputs, reentrant):
    for t in inputs:
        t.grad = None
    curved(outputs_of(checkpoint(function, *inputs, use_reentrant=reentrant))).backward()
    return [t.grad for t in inputs]


def test_a_gradient_that_has_a_graph_may_be_changed_in_place():
    """As an optimizer or a clipping of norms does to what backward(create_graph=True) left in .grad."""
    function, inputs = CASES["lora_linear"][0]()
    expected = [2 * g for g in gradients(function, inputs)]
    curved(outputs_of(function(*inputs))).backward(create_graph=True)
    with torch.no_grad():
        assert all(torch.equal(t.grad.mul_(2), g) for t, g in zip(inputs, expected, strict=True))


@pytest.mark.parametrize("make", [CASES["lora_linear"][1], CASES["lora_mlp"][1], CASES["linear_cross_entropy"][0]])
def test_the_node_keeps_no_input(make):
    """What is saved of x for it is no memory."""
    function, (x, *rest) = make()
    x, kept = x * 1, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.untyped_storage().data_ptr()), lambda t: t):
        function(x, *rest)
    assert kept and x.untyped_storage().data_ptr() not in kept
