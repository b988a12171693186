"""Gradients through lazy logits are those of the head's own product, to the bit."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlora.modules.lazy_logits import attached
from fastlora.modules.traced_logits import lazy_logits

from .logits import SHAPE, Outputs, Sub, assert_equal, both, linear
from .tiny import VOCAB, batch, gradients, judge, llama, lora


def backward(x):
    x.backward(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x))


def from_a_leaf(x):
    leaf = x.detach().requires_grad_()
    leaf.pow(2).sum().backward()
    return leaf.grad


def copy_of_a_leaf(x):
    leaf = x.detach().requires_grad_()
    leaf.pow(2).sum().backward()
    return copy.deepcopy(leaf).grad


def after_other_data(x, h, w):
    for factor in (h, w):
        factor.data = torch.zeros_like(factor)
    backward(x)


def read_first(context):
    def use(x, h, w):
        with context():
            found = x.argmax(-1) + 0, x.sum()
        torch.logsumexp(x, -1).pow(2).sum().backward()
        return found[0].clone(), found[1].clone()

    return use


def hooked(x, h, w):
    seen = []
    x.register_hook(lambda g: seen.append(g) or g * 2)
    x.grad_fn.register_hook(lambda inputs, outputs: seen.append(outputs[0]))
    backward(x)
    return tuple(seen)


def retained(x, h, w):
    x.retain_grad()
    x.pow(2).sum().backward()
    return x.grad


def checkpointed(reentrant):
    def use(x, h, w):
        checkpoint(lambda t: t.softmax(-1), x, use_reentrant=reentrant).pow(2).sum().backward()

    return use


def batched(x, h, w):
    return torch.autograd.grad(x, [h, w], torch.linspace(-1, 1, 4 * x.numel()).view(4, *SHAPE), is_grads_batched=True)


GRADIENTS = {
    "logits": lambda x, h, w: backward(x),
    "torch.autograd.backward": lambda x, h, w: torch.autograd.backward((x,), (torch.ones(SHAPE, dtype=x.dtype),)),
    "torch.autograd.grad": lambda x, h, w: torch.autograd.grad(x.pow(2).sum(), [x, h, w]),
    "of one of them": lambda x, h, w: torch.autograd.grad(x.pow(2).sum(), [h]),
    "of another": lambda x, h, w: torch.autograd.grad(x.pow(2).sum(), [w]),
    "square": lambda x, h, w: backward(x.pow(2)),
    "exponential": lambda x, h, w: backward(x.exp()),
    "float": lambda x, h, w: backward(x.float().softmax(-1)),
    "double": lambda x, h, w: backward(x.double().softmax(-1)),
    "clone": lambda x, h, w: backward(x.clone()),
    "used twice": lambda x, h, w: (x[0].sum() + x.logsumexp(-1).sum()).backward(),
    "read under no_grad first": read_first(torch.no_grad),
    "read in inference mode first": read_first(torch.inference_mode),
    "retain_grad": retained,
    "hooks": hooked,
    "a leaf of its own": lambda x, h, w: from_a_leaf(x),
    "a copy of that": lambda x, h, w: copy_of_a_leaf(x),
    "after other data": after_other_data,
    "checkpoint": checkpointed(False),
    "reentrant checkpoint": checkpointed(True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients(use, dtype, autocast):
    assert_equal(*both(use, dtype, autocast))


def test_gradients_of_a_batch():
    assert_equal(*both(batched))


def test_gradients_of_gradients():
    torch.manual_seed(0)
    factors = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 3, 4), (5, 4))]
    cube = lambda hidden, weight: attached(hidden, weight, torch.float64).pow(3)  # noqa: E731
    assert torch.autograd.gradcheck(cube, factors) and torch.autograd.gradgradcheck(cube, factors)


def test_a_graph_is_kept():
    """As of any node's: no deepcopy, no numpy, no change of requires_grad; no layout of four dimensions in three."""

    def use(x, h, w):
        found = []
        for attempt in (
            lambda t: t.clone(memory_format=torch.channels_last),
            lambda t: t.requires_grad_(False),
            copy.deepcopy,
            lambda t: t.numpy(),
            lambda t: t.apply_(abs),
        ):
            with pytest.raises((RuntimeError, TypeError)) as caught:
                attempt(x)
            found.append(str(caught.value))
        return (*found, x.is_leaf, x.requires_grad, x.output_nr, x._is_view())

    assert_equal(*both(use))


@pytest.mark.parametrize("trained", ["hidden", "head"])
def test_no_gradient_that_nobody_asks_for(trained):
    """An output layer is frozen in LoRA; its gradient is the largest there is."""
    head, hidden = nn.Linear(48, VOCAB, bias=False), torch.randn(3, 13, 48, requires_grad=trained == "hidden")
    head.weight.requires_grad_(trained == "head")
    loss = lazy_logits(head, hidden).sum()
    with Outputs() as made:
        loss.backward()
    assert made.operators.count(torch.ops.aten.mm.default) == 1


def test_hooks_on_saved_tensors_see_neither_hidden_states_nor_head():
    """Offloading would copy them to the CPU in each step."""
    seen = []
    head, hidden = nn.Linear(48, VOCAB, bias=False), torch.randn(3, 13, 48, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(seen.append, lambda t: t):
        lazy_logits(head, hidden)
    assert not seen


def test_inside_a_transform_they_are_computed():
    head, hidden = nn.Linear(48, VOCAB, bias=False), torch.randn(3, 13, 48)

    def gradient(forward):
        return torch.func.grad(lambda h: forward(head, h).pow(2).sum())(hidden)

    assert torch.equal(gradient(lazy_logits), gradient(linear))
    assert type(lazy_logits(head, hidden.as_subclass(Sub))) is Sub


def test_gradient_flows():
    """A loss on the logits reaches adapters and head as the unpatched one does."""

    def run(model, seed):
        model.train().zero_grad()
        outputs = model(**batch(seed))
        (outputs.loss + outputs.logits.pow(2).mean()).backward()
        return gradients(model)

    assert "lm_head.weight" in run(judge(llama, run), 0)
    judge(lambda seed: lora(llama(seed)), run)
