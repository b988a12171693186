"""The same results on 1 to 4 threads and in forked processes; two models in two threads: tests/patching."""

import os

import pytest
import torch
from budget import Budget
from torch.utils.data import DataLoader

from fastlora import ops, reference
from fastlora.kernels import _library

pytestmark = pytest.mark.skipif(_library.csrc_state != "loaded", reason="csrc is not loaded")

# Rows and columns enough that csrc, which gives a thread no less than 32768 elements, splits them among four.
M, H, F, R, D = 512, 320, 384, 8, 64


@pytest.fixture(autouse=True)
def _threads():
    yield
    torch.set_num_threads(1)


def rms_norm(new):
    return lambda o, x, w: o.rms_norm(x, w), [new(M, H), new(H)]


def swiglu(new):
    return lambda o, gate, up: o.swiglu(gate, up), [new(M, F), new(M, F)]


def rope(new):
    cos, sin = torch.randn(2, 1, M, D)
    return lambda o, q, k: o.rope(q, k, cos.to(q.dtype), sin.to(q.dtype)), [new(1, 4, M, D), new(1, 2, M, D)]


def dora(new):
    w, a, b = (t.detach() for t in (new(F, H), new(R, H), new(F, R)))
    return lambda o, y, m: o.dora(y, m, *(t.to(y.dtype) for t in (w, a, b)), 0.5), [new(M, F), new(F)]


def flash_attention(new):
    return lambda o, q, k, v: o.flash_attention(q, k, v), [new(2, 4, 128, D), new(2, 2, 128, D), new(2, 2, 128, D)]


def linear_cross_entropy(new):
    labels = torch.randint(F, (M,))
    labels[::7] = -100
    return lambda o, x, w: o.linear_cross_entropy(x, w, labels), [new(M, H), new(F, H) / 16]


def lora_group(new):
    def run(o, x, norm, w1, a1, b1, w2, a2, b2):
        projections = [ops.Projection(w, None, (ops.Branch(a, b),)) for w, a, b in ((w1, a1, b1), (w2, a2, b2))]
        return o.lora_group(x, projections, norm_weight=norm)

    adapted = [new(F, H) / 16, new(R, H) / 16, new(F, R) / 3]
    return run, [new(M, H), new(H), *adapted, *adapted]


def lora_mlp(new):
    def run(o, x, norm, *flat):
        three = (ops.Projection(w, None, (ops.Branch(a, b),)) for w, a, b in zip(*(iter(flat),) * 3, strict=True))
        return o.lora_mlp(x, *three, norm_weight=norm)

    up, down = [new(F, H) / 16, new(R, H) / 16, new(F, R) / 3], [new(H, F) / 16, new(R, F) / 16, new(H, R) / 3]
    return run, [new(M, H), new(H), *up, *up, *down]


def results(function, op, tensors, dtype=None):
    """Outputs and gradients."""
    leaves = [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]
    outputs = function(op, *leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(o.shape, generator=generator).to(tensors[0].dtype).to(o.dtype) for o in outputs]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, leaves, incoming))


KERNELS_ALONE = (rms_norm, swiglu, rope)
WITH_PRODUCTS = (dora, flash_attention, linear_cross_entropy, lora_group, lora_mlp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", KERNELS_ALONE + WITH_PRODUCTS, ids=lambda make: make.__name__)
def test_any_number_of_threads(make, dtype):
    """Ours give the same bits; the library's products may sum in another order, within the budget."""
    function, tensors = make(lambda *shape: torch.randn(shape).to(dtype))
    alone = results(function, ops, tensors)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        ours = results(function, ops, tensors)
        if all(map(torch.equal, ours, alone)):
            continue
        assert make in WITH_PRODUCTS, f"{threads} threads give other bits"
        torch.set_num_threads(1)
        eager, truth = (results(function, reference, tensors, t) for t in (dtype, torch.float64))
        for i, figures in enumerate(zip(ours, eager, truth, strict=True)):
            budget = Budget(f"{threads} threads, result {i}")
            budget.add(*figures)
            assert not budget.excess(), budget.excess()


def test_kernels_that_no_op_above_runs():
    """Masks, products under them, and 4-bit weights."""
    kernels = torch.ops.fastlora
    x, narrow, seed = torch.randn(M, F).bfloat16(), torch.randn(M, R), torch.tensor(7)
    packed, absmax, code = torch.randint(256, (M * F // 2,)).byte(), torch.rand(M * F // 64), torch.randn(16)

    def run():
        mask = kernels.dropout_mask(x, seed, 0.3)
        w = kernels.dequantize_4bit(packed, absmax, code, None, None, None, 64, 1, M * F, torch.bfloat16)
        return mask, kernels.apply_mask(x, mask), kernels.tall_product(narrow, x, mask), w

    alone = run()
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, run(), alone)), f"{threads} threads give other bits"


class Gradients:
    """A data set of the results of an op, computed by the process that asks for them, and its number."""

    def __init__(self, make):
        self.function, self.tensors = make(torch.randn)

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return os.getpid(), results(self.function, ops, [t + i for t in self.tensors])


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd's threads for a GPU are not there after a fork")
def test_forked_workers():
    """Of a parent that has run the same op on two threads: a worker that waited for one of them would hang."""
    data = Gradients(lora_mlp)
    alone = [data[i][1] for i in range(len(data))]
    torch.set_num_threads(2)
    data[0]
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    found = list(loader)
    assert len({worker for worker, _ in found} - {os.getpid()}) == 2
    for (_, ours), theirs in zip(found, alone, strict=True):
        assert all(map(torch.equal, ours, theirs))
