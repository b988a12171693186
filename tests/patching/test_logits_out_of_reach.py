"""Logits of a forward whose hidden states or head have changed since: read before, or refused."""

import pickle

import pytest
import torch
from torch import nn

import fastlora
from fastlora.modules.traced_logits import lazy_logits

from .logits import SHAPE, assert_equal, both, head, trained
from .tiny import VOCAB, batch, llama, lora


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
