"""What a compiled forward gives for logits, and compiled code that is given logits."""

import pytest
import torch
from torch import nn

import fastlora
from fastlora.modules.traced_logits import TracedLogits, lazy_logits

from .logits import READS, SHAPE, head, saved, trained
from .tiny import VOCAB, batch, gradients, judge, llama


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
