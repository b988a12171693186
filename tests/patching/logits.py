"""What tests of outputs.logits share: ways to read them, and the head's own product to compare with."""

import copy
import io
import pickle

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import (
    pad_input_tensors,
    recursively_apply,
    send_to_device,
    slice_tensors,
)
from safetensors.torch import load, save
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.trainer_pt_utils import nested_concat, nested_detach, nested_numpify

from fastlora.modules.lazy_logits import LazyLogits
from fastlora.modules.traced_logits import lazy_logits

from .tiny import VOCAB, batch

SHAPE = (3, 13, VOCAB)


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


def scripted(x: torch.Tensor):
    return x * 2


def run_in_autocast(x):
    with torch.autocast("cpu", torch.bfloat16):
        return torch.from_numpy(x.detach().numpy())


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


def head(model):
    return model.get_output_embeddings()


def trained(model, outputs):
    outputs.loss.backward()
    torch.optim.SGD(model.parameters(), 1.0).step()
