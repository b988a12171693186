"""Logits that nobody reads are not computed; whoever reads them gets tensors."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fastlora
from fastlora.modules.lazy_logits import LazyLogits

from .tiny import VOCAB, batch, gradients, judge, llama, lora


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
    original = LazyLogits.tensor
    monkeypatch.setattr(LazyLogits, "tensor", lambda self: calls.append(1) or original(self))
    return calls


READS = {
    "index": lambda x: x[:, -1],
    "ellipsis": lambda x: x[...],
    "mask": lambda x: x[batch()["labels"] != -100],
    "method": lambda x: x.argmax(-1),
    "size": lambda x: torch.tensor(x.size()),
    "float": lambda x: x.float().detach().cpu() + 0,
    "double": lambda x: x.double(),
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
    "transpose": lambda x: x.mT,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reads_as_a_tensor(outputs, read):
    assert isinstance(outputs.logits, LazyLogits)
    found, expected = read(outputs.logits), read(outputs.plain)
    assert type(found) is torch.Tensor
    assert torch.equal(found, expected)


def test_in_place(outputs):
    logits = outputs.logits
    logits /= 2
    assert torch.equal(logits[:], outputs.plain / 2)


def test_writing(outputs):
    logits = outputs.logits.detach()
    logits[..., 3] = -torch.inf
    assert (logits[..., 3] == -torch.inf).all()


def test_metadata_costs_nothing(outputs, computed):
    logits = outputs.logits
    assert logits.shape == (3, 13, VOCAB) and len(logits) == 3
    assert (logits.dtype, logits.device) == (torch.float32, torch.device("cpu"))
    assert "3, 13, 101" in repr(logits)
    wide = logits.float()
    assert wide.dtype == torch.float32 and wide.shape == logits.shape
    copy.copy(outputs)
    assert not computed
    assert logits[0].shape == (13, VOCAB)
    assert computed


def test_are_computed_once(outputs):
    assert outputs.logits.tensor() is outputs.logits.tensor()


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
    from accelerate.utils import convert_outputs_to_fp32

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
