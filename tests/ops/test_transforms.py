"""What the ops have no rule for is refused by name: torch would do so in its own words, or, compiled, not at all."""

import pytest
import torch
from ops.cases import EVERY, outputs_of
from torch.autograd import forward_ad

from fastlora.ops._transforms import transform


def loss(function):
    return lambda *inputs: sum(y.sum() for y in outputs_of(function(*inputs)))


def dual(function, *inputs):
    with forward_ad.dual_level():
        return function(*(forward_ad.make_dual(t, torch.ones_like(t)) for t in inputs))


def twice(inputs):
    return [torch.stack((t, t)) for t in inputs]


# What transforms a function, given the inputs, by the name that the error gives it.
TRANSFORMS = {
    "torch.func's grad": lambda f, inputs: torch.func.grad(loss(f))(*inputs),
    "torch.func's vmap": lambda f, inputs: torch.func.vmap(f)(*twice(inputs)),
    "torch.func's jvp": lambda f, inputs: torch.func.jvp(f, tuple(inputs), tuple(inputs)),
    "torch.func's functionalize": lambda f, inputs: torch.func.functionalize(f)(*inputs),
    "forward-mode differentiation": lambda f, inputs: dual(f, *inputs),
    "torch.jit.trace": lambda f, inputs: torch.jit.trace(f, tuple(inputs), check_trace=False),
}


def refused(op, name):
    return pytest.raises(RuntimeError, match=f"fastlora.ops.{op} does not run under {name}: use the plain .*unpatch")


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(("op", "make"), EVERY)
def test_refused_by_name(op, make, name):
    function, inputs = make()
    state = torch.get_rng_state()
    with refused(op, name):
        TRANSFORMS[name](function, [t.detach() for t in inputs])
    assert torch.equal(torch.get_rng_state(), state)


INSIDE = {name: TRANSFORMS[name] for name in list(TRANSFORMS)[:3]} | {
    "forward-mode differentiation": TRANSFORMS["forward-mode differentiation"]
}


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize(("op", "make"), EVERY)
def test_refused_inside_a_compiled_function(op, make, name):
    """torch drops tangents there, and gradients of some ops. The compiler hands the call back, or says why it cannot."""
    torch._dynamo.reset()
    function, inputs = make()
    inputs = [t.detach() for t in inputs]
    compiled = torch.compile(lambda *tensors: INSIDE[name](function, tensors), backend="eager")
    with refused(op, "(torch.func's (grad|vmap|jvp|transforms)|forward-mode differentiation)"):
        compiled(*inputs)


def test_no_transform():
    assert transform() is None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert transform() is None
    names = []
    torch.utils.checkpoint.checkpoint(lambda t: names.append(transform()) or t, torch.ones(1), use_reentrant=False)
    assert names == [None]


def test_the_innermost_transform_is_named():
    names = []
    torch.func.vmap(torch.func.grad(lambda x: names.append(transform()) or x * x))(torch.ones(2))
    assert names == ["torch.func's grad"]


@pytest.mark.parametrize("make", [make for op, make in (case.values for case in EVERY) if op in ("rms_norm", "rope")])
def test_gradients_of_a_batch_of_gradients(make):
    """is_grads_batched=True maps the backward alone, and torch runs an operator without lists of tensors row by row."""
    function, inputs = make()
    y = outputs_of(function(*inputs))[0]
    rows = torch.randn(3, *y.shape)
    more = {"retain_graph": True, "allow_unused": True}
    together = torch.autograd.grad(y, inputs[:1], rows, is_grads_batched=True, **more)
    apart = [torch.autograd.grad(y, inputs[:1], row, **more) for row in rows]
    assert torch.equal(together[0], torch.stack([one[0] for one in apart]))
