"""Logits that nobody reads are not computed; whoever looks at them sees a torch.Tensor."""

import copy
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import (
    convert_outputs_to_fp32,
    convert_to_fp32,
)
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.trainer_pt_utils import nested_detach

import fastlora
from fastlora.modules.lazy_logits import LazyLogits
from fastlora.modules.traced_logits import lazy_logits

from .logits import READS, SHAPE, Outputs, assert_equal, both, compiled
from .tiny import VOCAB, batch, llama, lora


@pytest.fixture
def outputs():
    """Of a training step, and the logits as a tensor under ``plain``."""
    model = fastlora.patch(lora(llama()).train())
    found = model(**batch())
    found["plain"] = model.base_model.model.lm_head(model.base_model.model.model(batch()["input_ids"])[0])
    return found


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
    "graph": lambda x: x.requires_grad and x.grad_fn and not x.is_leaf and x._version == 0,
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


def test_a_step_holds_no_copy_of_the_head():
    head, hidden = nn.Linear(300, 5000, bias=False), torch.randn(2, 1000, 300, requires_grad=True)
    product = lazy_logits(head, hidden)._cell.product
    assert product.weight.tensor.data_ptr() == head.weight.data_ptr()
    assert product.hidden.tensor.data_ptr() == hidden.data_ptr()
    assert product.weight.sample.numel() <= 1024 >= product.hidden.sample.numel()


def test_no_null_pointer():
    """What takes the memory in C++ raises: legacy DLPack, extensions."""
    with pytest.raises(RuntimeError, match="data pointer"):
        torch.utils.dlpack.to_dlpack(lazy_logits(nn.Linear(4, 5, bias=False), torch.ones(2, 3, 4)))


def test_are_computed_once(outputs, computed):
    logits = outputs.logits
    assert torch.equal(logits + 1, logits.detach() + 1) and logits.numpy(force=True) is not None
    assert len(computed) == 1 and logits[0].data_ptr() == logits.data_ptr() == logits.detach().data_ptr()


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
