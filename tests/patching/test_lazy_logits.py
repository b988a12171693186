"""Logits that nobody reads are not computed; whoever looks at them sees a torch.Tensor."""

import copy
import io
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import (
    convert_outputs_to_fp32,
    convert_to_fp32,
    pad_input_tensors,
    recursively_apply,
    send_to_device,
    slice_tensors,
)
from safetensors.torch import load, save
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint
from transformers.trainer_pt_utils import nested_concat, nested_detach, nested_numpify

import fastlora
from fastlora.modules.lazy_logits import LazyLogits, Product, attached
from fastlora.modules.traced_logits import TracedLogits, lazy_logits

from .tiny import VOCAB, batch, gradients, judge, llama, lora

SHAPE = (3, 13, VOCAB)


@pytest.fixture
def outputs():
    """Of a training step, and the logits as a tensor under ``plain``."""
    model = fastlora.patch(lora(llama()).train())
    found = model(**batch())
    found["plain"] = model.base_model.model.lm_head(model.base_model.model.model(batch()["input_ids"])[0])
    return found


@pytest.fixture
def computed(monkeypatch):
    """How often logits were computed."""
    calls = []
    original = Product.compute
    monkeypatch.setattr(Product, "compute", lambda self: calls.append(1) or original(self))
    return calls


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copy_twice(x):
    first, second = copy.deepcopy([x, x])
    assert first is second
    return first


def compiled(function, x):
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)(x)


class Sub(torch.Tensor):
    """A subclass that keeps its results, as torch.Tensor's own __torch_function__ does."""


def plain(x):
    assert type(x) is Sub
    return x.as_subclass(torch.Tensor)


READS = {
    "index": lambda x: x[:, -1],
    "ellipsis": lambda x: x[...],
    "mask": lambda x: x[batch()["labels"] != -100],
    "method": lambda x: x.argmax(-1),
    "size": lambda x: torch.tensor(x.size()),
    "float": lambda x: x.float().detach().cpu() + 0,
    "double": lambda x: x.double() + 0,
    "softmax": lambda x: torch.softmax(x, -1),
    "cross_entropy": lambda x: F.cross_entropy(x.view(-1, VOCAB), batch()["input_ids"].view(-1)),
    "keywords": lambda x: torch.sum(input=x, dim=-1),
    "list": lambda x: torch.cat([x, x]),
    "stack with a tensor": lambda x: torch.stack((torch.zeros(3, 13, VOCAB), x)),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "einsum": lambda x: torch.einsum("btv,btv->bt", x, x),
    "add": lambda x: x + 1,
    "left": lambda x: torch.ones(()) - x,
    "number on the left": lambda x: 2.0 / x,
    "temperature": lambda x: x / 0.7,
    "power": lambda x: x**2,
    "matmul": lambda x: x @ torch.ones(VOCAB, 2),
    "negative": lambda x: -x,
    "absolute": lambda x: abs(x),
    "equal": lambda x: x == 0,
    "not equal": lambda x: x != 0,
    "at least": lambda x: x >= 0,
    "at most": lambda x: x <= 0,
    "rows": lambda x: torch.stack(list(x)),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "numpy by force": lambda x: torch.from_numpy(x.numpy(force=True)),
    "numpy of rows": lambda x: torch.tensor(nested_numpify(nested_detach([x]))[0]),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "item": lambda x: torch.tensor(x.sum().item()),
    "asarray": lambda x: torch.from_numpy(np.asarray(x.detach())),
    "transpose": lambda x: x.mT,
    "Parameter": lambda x: (x := x.detach(), x.sum(), nn.Parameter(x) + 0)[2],
    "attribute": lambda x: x.data + 0,
    "out": lambda x: torch.exp(x.detach(), out=torch.empty(0)),
    "a copy into a buffer": lambda x: torch.zeros(SHAPE).copy_(x.detach()),
    "as_tensor": lambda x: torch.as_tensor(x)[...],
    "tensor": lambda x: torch.tensor(x.detach()) + 0,
    "new": lambda x: x.new_zeros(4),
    "DLPack": lambda x: torch.from_dlpack(x.detach()),
    "storage": lambda x: torch.tensor(x.untyped_storage().tolist()[:64]),
    "typed storage": lambda x: torch.tensor(x.storage().tolist()[:64]),
    "pointers": lambda x: torch.tensor(x.data_ptr() == x.const_data_ptr() == x[...].data_ptr() != 0),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)).detach(),
    "pickle under no_grad": torch.no_grad()(lambda x: pickle.loads(pickle.dumps(x))),
    "copy": lambda x: copy.copy(x).detach(),
    "deepcopy": lambda x: copy.deepcopy(x.detach()),
    "deepcopy of one, twice": lambda x: copy_twice(x.detach()),
    "deepcopy of a leaf": lambda x: copy.deepcopy(x.detach().requires_grad_()),
    "save": lambda x: saved(x).detach(),
    "save a dictionary": lambda x: saved({"logits": x})["logits"].detach(),
    "safetensors": lambda x: load(save({"logits": x}))["logits"],
    "iteration over a pytree": lambda x: sum(t.sum() for t in tree_leaves({"a": [x]}) if isinstance(t, torch.Tensor)),
    "accelerate: gather": lambda x: Accelerator(cpu=True).gather({"a": [x]})["a"][0] + 0,
    "accelerate: gather_for_metrics": lambda x: Accelerator(cpu=True).gather_for_metrics(x) + 0,
    "accelerate: pad_across_processes": lambda x: Accelerator(cpu=True).pad_across_processes(x, dim=1)[...],
    "accelerate: pad": lambda x: pad_input_tensors(x, 3, 2),
    "accelerate: reduce": lambda x: Accelerator(cpu=True).reduce(x)[...],
    "accelerate: recursively_apply": lambda x: recursively_apply(lambda t: t * 2, {"a": x})["a"],
    "accelerate: slice_tensors": lambda x: slice_tensors({"a": x}, slice(0, 2))["a"],
    "accelerate: send_to_device": lambda x: send_to_device({"a": x}, "cpu")["a"][...],
    "transformers: nested_concat": lambda x: nested_concat((x,), (x[:, :5],))[0],
    "vmap": lambda x: torch.func.vmap(lambda row: row.softmax(-1))(x),
    "vmap of a column": lambda x: torch.func.vmap(lambda row: row * 2, in_dims=1)(x),
    "func.grad": lambda x: torch.func.grad(lambda t: t.pow(2).sum())(x.detach()),
    "func.jvp": lambda x: torch.func.jvp(lambda t: t.pow(2), (x.detach(),), (torch.ones(SHAPE),))[1],
    "func.functional_call": lambda x: torch.func.functional_call(
        nn.Linear(VOCAB, 2, bias=False), {"weight": torch.ones(2, VOCAB)}, (x,)
    ),
    "another subclass": lambda x: plain(torch.ones(SHAPE).as_subclass(Sub) * x),
    "another subclass on the right": lambda x: plain(x * torch.ones(SHAPE).as_subclass(Sub)),
    "a subclass with operators of its own": lambda x: (x.detach() * TwoTensor(torch.ones(SHAPE), torch.ones(SHAPE))).b,
    "script": lambda x: torch.jit.script(scripted)(x),
    "compile": lambda x: compiled(lambda t: t.float().softmax(-1).log(), x),
    "compile without a graph": lambda x: compiled(lambda t: t.argmax(-1), x.detach()),
    "a region of autocast": lambda x: run_in_autocast(x),
    "two casts": lambda x: x.bfloat16().float() + 0,
    "another device": lambda x: torch.tensor(x.to("meta").is_meta),
}  # fmt: skip


def scripted(x: torch.Tensor):
    return x * 2


def run_in_autocast(x):
    with torch.autocast("cpu", torch.bfloat16):
        return torch.from_numpy(x.detach().numpy())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reads_as_a_tensor(outputs, computed, read):
    assert isinstance(outputs.logits, LazyLogits) and isinstance(outputs.logits, torch.Tensor)
    expected = read(outputs.plain)
    for _ in range(2):  # unread, and read
        found = read(outputs.logits)
        assert type(found) is torch.Tensor
        assert torch.equal(found, expected) and found.requires_grad == expected.requires_grad
        outputs.logits.sum()


def after_inference(x):
    with torch.inference_mode():
        x.sum()
    x.mul_(2)


WRITES = {
    "divide": lambda x: x.div_(2),
    "operator": lambda x: x.__itruediv__(2),
    "index": lambda x: x.detach().__setitem__((..., 3), -torch.inf),
    "index of a node": lambda x: x.__setitem__((..., 3), -9.0),
    "mask": lambda x: x.masked_fill_(x < 0, 0.0),
    "view": lambda x: x[0].mul_(3),
    "view of a view": lambda x: x.view(-1, VOCAB)[::2].zero_(),
    "view, then the whole": lambda x: (x[0].mul_(3), x.exp_()),
    "alias": lambda x: x.detach().add_(1),
    "data": lambda x: x.data.add_(1),
    "out": lambda x: torch.add(x.detach(), 1, out=x.detach()),
    "fill by numpy": lambda x: x.detach().numpy().fill(7.0),
    "apply": lambda x: x.detach().apply_(lambda v: v + 1),
    "map": lambda x: x.detach().map_(torch.ones(SHAPE), lambda v, w: v + w),
    "shape": lambda x: x.unsqueeze_(0),
    "shape of an alias": lambda x: x.detach().transpose_(0, 1).mul_(2),
    "order of dimensions": lambda x: x.transpose_(0, 2).add_(torch.arange(3)),
    "an alias of another order": lambda x: x.transpose_(0, 2).detach(),
    "a part": lambda x: (x := x.detach(), x.as_strided_((2, 5), (1, 7), 3), x.mul_(2))[2].detach(),
    "compiled, of another order": lambda x: compiled(lambda t: t * 2, x.detach().transpose_(0, 2)),
    "after a read in inference mode": after_inference,
    "other data": lambda x: setattr(x, "data", torch.ones(SHAPE)),
    "data of another shape": lambda x: (y := x.detach(), setattr(y, "data", torch.ones(7)), y.add_(1)),
    "another size": lambda x: x.detach().resize_(4000, 2).zero_(),
    "another storage": lambda x: x.detach().set_(torch.ones(4)).mul_(2),
    "a clone": lambda x: x.clone().add_(1),
    "a copy of another dtype": lambda x: x.double().add_(1),
    "leave the graph": lambda x: x.detach_().add_(1),
    "compile": lambda x: compiled(lambda t: t.mul_(2).sum(), x.detach()),
    "before a clone": lambda x: (x.add_(1), x.clone().mul_(2)),
}


def linear(head, hidden):
    return head(hidden)


def both(use, dtype=torch.float32, autocast=None):
    """What ``use(logits, hidden, weight)`` gives, and all gradients after it: of lazy logits and of the head's own."""
    results = []
    for forward in (lazy_logits, linear):
        torch.manual_seed(0)
        head, leaf = nn.Linear(48, VOCAB, bias=False, dtype=dtype), torch.randn(3, 13, 48, dtype=dtype)
        hidden = leaf.requires_grad_() * 2
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            logits = forward(head, hidden)
        found = use(logits, hidden, head.weight)
        results.append((*(found if isinstance(found, tuple) else (found,)), leaf.grad, head.weight.grad))
    return results


def assert_equal(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert type(mine) is type(other)
        if isinstance(other, torch.Tensor):
            assert torch.equal(mine, other) and mine.dtype == other.dtype
        else:
            assert mine == other


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_in_place(write):
    """Values, shape, version and gradients after a write are a tensor's."""

    def use(x, hidden, weight):
        detached, changed = x.detach(), write(x)
        changed = changed if isinstance(changed, torch.Tensor) else x
        if x.requires_grad:
            (x.reshape(-1) * torch.linspace(-1, 1, x.numel())).sum().backward()
        return (
            x[...].detach(),
            changed[...].detach(),
            detached[...],
            x.shape,
            (x.stride(), changed.stride(), changed.storage_offset()),
            detached.shape,
            x._version > 0,
            detached._version > 0,
        )

    assert_equal(*both(use))


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_a_write_gives_the_tensor_itself(context):
    def use(x, hidden, weight):
        x, other = x.detach(), x.detach().clone()
        with context():
            results = (
                (x.add_(1), x),
                (torch.relu_(x), x),
                (torch.exp(other, out=x), x),
                (torch.max(x, -1, keepdim=True, out=(other, torch.empty(0, dtype=torch.int64)))[0], other),
                (torch.ops.aten.mul_.Tensor(x, 2), x),
            )
        return tuple(mine is its for mine, its in results)

    ours, theirs = both(use)
    assert ours[:5] == theirs[:5] == (True,) * 5


def backward(x, g=None):
    x.backward(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) if g is None else g)


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


class Identity(torch.autograd.Function):
    """As engines put around outputs: their inputs, in the graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return x

    @staticmethod
    def backward(ctx, g):
        return g


FREE = {
    "shape": lambda x: (x.shape, x.size(), x.size(-1), len(x), x.ndim, x.dim(), x.numel()) and x.shape == SHAPE,
    "memory": lambda x: (x.dtype, x.device, x.layout, x.itemsize, x.nbytes, x.element_size(), x.is_cuda, x.type()),
    "strides": lambda x: x.is_contiguous() and x.stride() == (13 * VOCAB, VOCAB, 1) and x.contiguous() is x,
    "graph": lambda x: x.requires_grad and x.grad_fn and x.grad is None and not x.is_leaf and x._version == 0,
    "repr": lambda x: "LazyLogits(shape=(3, 13, 101), dtype=torch.float32)" == repr(x) == str(x) == f"{x}",
    "name of its class": lambda x: f"{type(x).__module__}.{type(x).__name__}" == "torch.Tensor",
    "float": lambda x: x.float() is x,
    "double": lambda x: x.double().dtype == torch.float64,
    "half": lambda x: x.half().float().dtype == torch.float32,
    "to": lambda x: x.to("cpu", torch.bfloat16).to(torch.float32).shape == SHAPE,
    "cpu": lambda x: x.cpu() is x,
    "detach": lambda x: not x.detach().requires_grad and x.data.shape == SHAPE,
    "clone": lambda x: x.clone().requires_grad and x.detach().clone().shape == SHAPE,
    "copy of the outputs": lambda x: copy.copy({"logits": x}),
    "hooks": lambda x: (x.register_hook(lambda g: g), x.retain_grad()),
    "pytree": lambda x: tree_unflatten(*reversed(tree_flatten({"a": [x]})))["a"][0] is x,
    "a function that passes it on": lambda x: Identity.apply(x).grad_fn,
    "accelerate: convert_to_fp32": lambda x: convert_to_fp32({"a": x.half()})["a"].dtype == torch.float32,
    "accelerate: gather": lambda x: isinstance(Accelerator(cpu=True).gather_for_metrics(x), torch.Tensor),
    "transformers: nested_detach": lambda x: nested_detach({"a": x})["a"].shape == SHAPE,
}


@pytest.mark.parametrize("look", FREE.values(), ids=FREE)
def test_costs_nothing(outputs, computed, look):
    assert isinstance(outputs.logits, torch.Tensor)
    assert look(outputs.logits) is not False
    outputs.loss.backward()
    assert not computed
    assert outputs.logits[0].shape == SHAPE[1:] and computed


class Sink(torch.autograd.Function):
    """As DDP puts around all outputs: those outside the loss get no gradient."""

    @staticmethod
    def forward(ctx, *outputs):
        ctx.set_materialize_grads(False)
        return tuple(x.clone() for x in outputs)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


class Outputs(TorchDispatchMode):
    """What operators run, and the shapes of all tensors with memory that they give."""

    def __init__(self):
        super().__init__()
        self.operators, self.shapes = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operators.append(function)
        self.shapes += [
            t.shape for t in tree_leaves(result) if isinstance(t, torch.Tensor) and type(t) is not LazyLogits
        ]
        return result


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["full", "lora"])
def test_no_memory_of_their_size(wrap):
    """In a step with a look at the logits; the operator that reads them makes the first tensor as large."""
    model = fastlora.patch(wrap(llama(vocab_size=5000)).train())
    with Outputs() as step:
        outputs = model(**batch())
        outputs.logits.bfloat16().float().detach().clone()
        Sink.apply(outputs.loss, outputs.logits)[0].backward()
        before = len(step.shapes)
        outputs.logits.detach() + 1
    size = 3 * 13 * 5000
    assert before > 50 and [i for i, shape in enumerate(step.shapes) if shape.numel() == size] == [before]


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


def test_a_step_holds_no_copy_of_the_head():
    head, hidden = nn.Linear(300, 5000, bias=False), torch.randn(2, 1000, 300, requires_grad=True)
    product = lazy_logits(head, hidden)._cell.product
    assert product.weight.tensor.data_ptr() == head.weight.data_ptr()
    assert product.hidden.tensor.data_ptr() == hidden.data_ptr()
    assert product.weight.sample.numel() <= 1024 >= product.hidden.sample.numel()


def trained(model, outputs):
    outputs.loss.backward()
    torch.optim.SGD(model.parameters(), 1.0).step()


def head(model):
    return model.get_output_embeddings()


def scaled(model, outputs):
    with torch.no_grad():
        outputs.hidden_states[-1].mul_(2)


def one_weight(model, outputs):
    with torch.no_grad():
        head(model).weight[-2, -2] += 1


CHANGES = {
    "the optimizer's step": (llama, trained, "lm_head.weight has changed"),
    "a tied head's": (lambda: llama(tie_word_embeddings=True), trained, "lm_head.weight has changed"),
    "hidden states in place": (lambda: lora(llama()), scaled, r"hidden_states\[-1\] has changed"),
    "hidden states by .data": (
        lambda: lora(llama()), lambda m, o: o.hidden_states[-1].data.mul_(2), r"hidden_states\[-1\] has changed",
    ),
    "head by .data": (lambda: lora(llama()), lambda m, o: head(m).weight.data.zero_(), "lm_head.weight has changed"),
    "head by numpy": (
        lambda: lora(llama()), lambda m, o: head(m).weight.detach().numpy().fill(0), "lm_head.weight has changed",
    ),
    "head loaded": (llama, lambda m, o: m.load_state_dict(llama(seed=1).state_dict()), "lm_head.weight has changed"),
    "one weight": (lambda: lora(llama()), one_weight, "lm_head.weight has changed"),
    "head freed": (
        lambda: lora(llama()), lambda m, o: head(m).weight.untyped_storage().resize_(0), "lm_head.weight has been sharded",
    ),
}  # fmt: skip


@pytest.mark.parametrize("build, change, why", CHANGES.values(), ids=CHANGES)
def test_logits_that_are_out_of_reach(build, change, why):
    """Whoever reads them is told; whoever has read them has them."""
    model = fastlora.patch(build().train())
    outputs, read = (model(**batch(), output_hidden_states=True, use_cache=False) for _ in range(2))
    values = read.logits.detach().clone() + 0
    shallow, wide = outputs.logits.detach(), outputs.logits.double()
    assert torch.equal(read.logits, values)
    change(model, outputs)
    for logits in (outputs.logits, shallow, wide, outputs.logits.clone()):
        for attempt in (lambda x: x + 0, lambda x: x.detach().numpy(), pickle.dumps):
            with pytest.raises(RuntimeError, match=f"^fastlora: outputs.logits cannot .*{why} .*ops=") as caught:
                attempt(logits)
            assert "\n" not in str(caught.value)
        assert "LazyLogits" in repr(logits) and logits.shape == SHAPE
    if "hidden" not in why:
        assert torch.equal(read.logits, values)


def moved(model, outputs):
    model.to(torch.float64)


def replaced(model, outputs):
    head(model).weight = nn.Parameter(torch.zeros_like(head(model).weight))


def refilled(model, outputs):
    outputs.hidden_states[-1].data = torch.zeros(3, 13, 48)


HARMLESS = {
    "nothing": lambda model, outputs: None,
    "a step that trains adapters": trained,
    "another forward": lambda model, outputs: model(**batch(1)),
    "the model in float64": moved,
    "another head": replaced,
    "other hidden states": refilled,
    "the head is frozen": lambda model, outputs: head(model).weight.requires_grad_(False),
    "the model is no more": lambda model, outputs: fastlora.unpatch(model),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_logits_that_are_still_there(change):
    model = fastlora.patch(lora(llama()).train())
    outputs, read = (model(**batch(), output_hidden_states=True, use_cache=False) for _ in range(2))
    expected = read.logits.detach() + 0
    change(model, outputs)
    assert torch.equal(outputs.logits, expected)


def test_not_a_number_is_no_change():
    head = nn.Linear(48, VOCAB, bias=False)
    hidden = torch.full((3, 13, 48), torch.nan, requires_grad=True)
    assert lazy_logits(head, hidden).isnan().all()


def test_a_gradient_needs_the_factors_of_the_forward():
    """As any node's: read before the head changed, differentiated after it."""

    def use(x, hidden, weight):
        loss = x.pow(2).sum()
        with torch.no_grad():
            weight.mul_(2)
        with pytest.raises(
            RuntimeError, match="modified by an inplace operation|fastlora: .*lm_head.weight has changed"
        ):
            loss.backward()

    assert_equal(*both(use))


def test_functional_call_gives_the_logits_of_its_own_weights():
    model, other = fastlora.patch(llama().train()), fastlora.patch(llama(1).train())
    outputs = torch.func.functional_call(model, dict(other.named_parameters()), (), batch())
    assert torch.equal(outputs.logits, other(**batch()).logits)


def test_inside_a_transform_they_are_computed():
    head, hidden = nn.Linear(48, VOCAB, bias=False), torch.randn(3, 13, 48)

    def gradient(forward):
        return torch.func.grad(lambda h: forward(head, h).pow(2).sum())(hidden)

    assert torch.equal(gradient(lazy_logits), gradient(linear))
    assert type(lazy_logits(head, hidden.as_subclass(Sub))) is Sub


@pytest.fixture
def compiled_outputs():
    torch.compiler.reset()
    model = fastlora.patch(llama(num_hidden_layers=1).train())
    return model, torch.compile(model, backend="aot_eager", fullgraph=True)(**batch(), use_cache=False)


@pytest.mark.filterwarnings("ignore")
def test_compiled_forward(compiled_outputs, computed):
    """It returns no tensor for them, because that would be computed; whatever is asked of it is asked of one."""
    model, outputs = compiled_outputs
    logits, eager = outputs.logits, model(**batch()).logits
    assert isinstance(logits, TracedLogits) and logits.shape == logits.float().shape == SHAPE
    assert "TracedLogits(shape=(3, 13, 101), dtype=torch.float32)" == repr(logits) and not computed
    for found in (
        saved(logits),
        logits + 0,
        0 + logits,
        torch.abs(logits) * logits.sign(),
        logits.float()[:],
        logits.data,
    ):
        assert isinstance(found, torch.Tensor) and torch.equal(found, eager)
    assert len(computed) == 3  # for logits, the cast and eager
    logits[..., 3] = -torch.inf
    assert (logits[..., 3] == -torch.inf).all() and len(logits) == 3 and logits.device == eager.device


@pytest.mark.filterwarnings("ignore")
def test_reads_of_a_compiled_forward(compiled_outputs):
    model, outputs = compiled_outputs
    expected = model(**batch(), use_cache=False).logits[...]
    names = list(READS)[: list(READS).index("numpy by force")]
    for name in names:
        assert torch.equal(READS[name](outputs.logits), READS[name](expected)), name


@pytest.mark.filterwarnings("ignore")
def test_compiled_forward_in_other_dtypes():
    """Of a model in bf16, read outside the graph; and inside, in a region of autocast that the model did not see."""

    def forwards(dtype, inside):
        model = fastlora.patch(llama(num_hidden_layers=1, dtype=dtype).train())

        def forward(**inputs):
            outputs = model(**inputs, use_cache=False)
            with torch.autocast("cpu", torch.bfloat16):
                return outputs.logits[...] if inside else outputs.logits.float()

        torch.compiler.reset()
        return forward(**batch()), torch.compile(forward, backend="aot_eager", fullgraph=True)(**batch())

    eager, compiled = forwards(torch.bfloat16, False)
    assert isinstance(compiled, TracedLogits) and torch.equal(compiled[:], eager) and compiled[:].dtype == torch.float32
    eager, compiled = forwards(torch.float32, True)
    assert eager.dtype == compiled.dtype == torch.float32


@pytest.mark.filterwarnings("ignore")
def test_gradient_of_a_compiled_forward():
    def run(model, seed):
        torch.compiler.reset()
        model.train().zero_grad()
        outputs = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch(seed), use_cache=False)
        (outputs.loss + outputs.logits.pow(2).mean() + torch.logsumexp(outputs.logits, -1).mean()).backward()
        return gradients(model)

    judge(lambda seed: llama(seed, num_hidden_layers=1), run, seeds=2, whole=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [trained, lambda m, o: head(m).weight.data.zero_()], ids=["step", "data"])
def test_logits_of_a_compiled_forward_that_are_out_of_reach(compiled_outputs, change):
    model, outputs = compiled_outputs
    change(model, outputs)
    with pytest.raises(RuntimeError, match="^fastlora: outputs.logits cannot .*lm_head.weight has changed .*ops="):
        outputs.logits.sum()


@pytest.mark.filterwarnings("ignore")
def test_read_in_the_compiled_region():
    """They are traced, in the dtypes of the region's autocast."""

    def run(model, seed, compiler=torch.compile):
        def loss(**inputs):
            outputs = model(**inputs, use_cache=False)
            return outputs.loss + outputs.logits.float().pow(2).mean()

        torch.compiler.reset()
        model.train().zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype != torch.float64):
            torch.compile(loss, backend="aot_eager", fullgraph=True)(**batch(seed)).backward()
        return gradients(model)

    judge(lambda seed: llama(seed, num_hidden_layers=1), run, seeds=2, whole=False)


@pytest.mark.filterwarnings("ignore")
def test_compiled_code_takes_the_logits_of_every_step():
    """It is compiled once."""
    torch.compiler.reset()

    def eager(x):
        return x.float().softmax(-1).log().mean()

    loss = torch.compile(eager, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            x = lazy_logits(nn.Linear(48, VOCAB, bias=False), torch.randn(3, 13, 48, requires_grad=True))
            assert torch.equal(loss(x), eager(x))


def test_no_null_pointer():
    """What takes the memory in C++ raises: legacy DLPack, extensions."""
    with pytest.raises(RuntimeError, match="data pointer"):
        torch.utils.dlpack.to_dlpack(lazy_logits(nn.Linear(4, 5, bias=False), torch.ones(2, 3, 4)))


def test_are_computed_once(outputs, computed):
    logits = outputs.logits
    assert torch.equal(logits + 1, logits.detach() + 1) and logits.numpy(force=True) is not None
    assert len(computed) == 1 and logits[0].data_ptr() == logits.data_ptr() == logits.detach().data_ptr()


def test_gradient_flows():
    """A loss on the logits reaches adapters and head as the unpatched one does."""

    def run(model, seed):
        model.train().zero_grad()
        outputs = model(**batch(seed))
        (outputs.loss + outputs.logits.pow(2).mean()).backward()
        return gradients(model)

    assert "lm_head.weight" in run(judge(llama, run), 0)
    judge(lambda seed: lora(llama(seed)), run)


def test_bf16():
    logits = fastlora.patch(llama(dtype=torch.bfloat16).train())(**batch()).logits
    assert logits.dtype == logits[:].dtype == torch.bfloat16
    assert logits.float().dtype == logits.float()[:].dtype == torch.float32


def test_read_outside_autocast():
    """The logits are those of the region that the model ran in."""
    model = fastlora.patch(llama().train())
    with torch.autocast("cpu", torch.bfloat16):
        inside, outside = model(**batch()).logits, model(**batch()).logits
        expected = inside[:]
    assert expected.dtype == outside.dtype == torch.bfloat16
    assert torch.equal(outside[:], expected)
    assert torch.equal(outside.float()[:], expected.float())


def test_accelerate_converts_outputs_for_nothing(computed):
    """Mixed precision asks every output for its dtype, and for float()."""
    model = fastlora.patch(lora(llama()).train())

    @convert_outputs_to_fp32
    @torch.autocast("cpu", torch.bfloat16)
    def forward(**inputs):
        return model(**inputs)

    outputs = forward(**batch())
    assert isinstance(outputs.logits, LazyLogits) and outputs.logits.dtype == torch.float32
    assert not computed
    assert outputs.logits[:].dtype == torch.float32


def test_a_replica_of_data_parallel_gives_tensors():
    """torch.nn.DataParallel gathers what its replicas return by its own types."""
    model = fastlora.patch(llama().train())
    replica = model._replicate_for_data_parallel()
    outputs = replica(**batch())
    assert type(outputs.logits) is torch.Tensor
    assert outputs.loss == fastlora.unpatch(model)(**batch()).loss
