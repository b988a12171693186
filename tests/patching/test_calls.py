"""Every way in which people call a Llama gives what it gives unpatched."""

import pytest
import torch
from torch import nn
from transformers.utils import logging

import fastlora
from fastlora.modules.lazy_logits import LazyLogits

from .tiny import CACHE, assert_fused, assert_same, batch, gradients, judge, llama, lora, padded_step, row, step


def build(seed: int = 0, **config) -> nn.Module:
    return lora(llama(seed, **config))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding(side, attention):
    model = judge(lambda seed: build(seed, attention=attention), lambda model, seed: padded_step(model, seed, side))
    assert attention == "eager" or row(model, ".self_attn.attention").fused == 1


@pytest.mark.parametrize("rows", [1, 3])
def test_packed_sequences(rows):
    """position_ids that start anew mark sequences, which do not see each other; one row of them serves every row."""
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]

    def run(model, seed):
        return step(model, seed, **batch(seed, rows), position_ids=positions, use_cache=False)

    model = judge(build, run)
    assert row(model, ".self_attn.attention").fused == 1


def test_position_ids_that_are_written_to():
    """A buffer of them may hold one sequence now, and several in the next step."""

    def run(model, seed):
        positions = torch.arange(13).repeat(3, 1)
        first = step(model, seed, position_ids=positions, use_cache=False)
        positions[:, 5:] -= 5
        return step(model, seed, position_ids=positions, use_cache=False) | {"first": first["logits"]}

    judge(build, run)


@pytest.mark.parametrize("items", [7, torch.tensor(7)], ids=["int", "tensor"])
def test_num_items_in_batch(items):
    """Under gradient accumulation the sum of losses is divided by the items of the whole batch."""
    judge(build, lambda model, seed: step(model, seed, num_items_in_batch=items))


def test_shift_labels():
    def run(model, seed):
        shifted = torch.roll(batch(seed)["labels"], -1, 1)
        return step(model, seed, shift_labels=shifted)

    judge(build, run)


def test_no_label_counts():
    """The mean over nothing is NaN, as it is unpatched."""
    nothing = torch.full((3, 13), -100)
    model = build().train()
    assert model(**batch() | {"labels": nothing}).loss.isnan()
    assert fastlora.patch(model)(**batch() | {"labels": nothing}).loss.isnan()


def test_input_embeddings():
    """inputs_embeds, and the gradient that comes back to them."""

    def run(model, seed):
        model.enable_input_require_grads()
        embedded = model.get_input_embeddings()(batch(seed)["input_ids"]).detach().requires_grad_()
        found = step(model, seed, input_ids=None, inputs_embeds=embedded)
        return found | {"embedded": embedded.grad}

    judge(build, run)


def test_hidden_states_and_attentions():
    def run(model, seed):
        model.train().zero_grad()
        outputs = model(**batch(seed), output_hidden_states=True, output_attentions=True)
        outputs.loss.backward()
        assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2
        kept = {"hidden": outputs.hidden_states, "attention": outputs.attentions}
        kept = {f"{name} {i}": t.detach() for name, ts in kept.items() for i, t in enumerate(ts)}
        return {"loss": outputs.loss.detach(), "logits": outputs.logits[:].detach(), **kept, **gradients(model)}

    model = judge(lambda seed: build(seed, attention="eager"), run, whole=False)
    assert row(model, "base_model.model").fused == row(model, "layers.0.mlp.up_proj").fused == 1


def test_tuple_outputs():
    """A tuple has plain tensors in it, and the reason for that is told."""

    def run(model, seed):
        model.train().zero_grad()
        outputs = model(**batch(seed), return_dict=False)
        loss, logits, *_ = outputs
        assert type(outputs) is tuple and type(logits) is torch.Tensor
        loss.backward()
        return {"loss": loss.detach(), "logits": logits.detach(), **gradients(model)}

    assert_fused_but_for_the_loss(judge(build, run, whole=False), "return_dict=False")


def test_logits_to_keep():
    """Logits of the last tokens only: an inference option, which goes with labels of that length."""

    def run(model, seed):
        return step(model, seed, logits_to_keep=4, labels=batch(seed)["labels"][:, -4:])

    assert_fused_but_for_the_loss(judge(build, run, whole=False), "logits_to_keep")


def test_loss_function_of_the_users():
    def squares(logits, labels, vocab_size, **kwargs):
        return logits.pow(2).mean()

    def make(seed):
        model = llama(seed)
        model.loss_function = squares
        return lora(model)

    assert_fused_but_for_the_loss(judge(make, whole=False), "the model has a loss function of its own")


def assert_fused_but_for_the_loss(model: nn.Module, reason: str) -> None:
    rows = {r.path: r for r in fastlora.explain(model).rows}
    head = rows.pop("base_model.model")
    assert (head.fused, head.passed, head.why) == (0, 1, reason)
    assert not any(r.why or r.passed for r in rows.values())


def test_labels_by_position():
    """forward's sixth argument: labels all the same."""

    def run(model, seed):
        model.train().zero_grad()
        outputs = model(batch(seed)["input_ids"], None, None, None, None, batch(seed)["labels"])
        outputs.loss.backward()
        return {"loss": outputs.loss.detach(), "logits": outputs.logits[:].detach(), **gradients(model)}

    judge(llama, run, head=False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_logits_are_there_where_no_loss_is_trained(training, labels):
    """In eval mode, without labels, and without gradients: plain logits."""

    def run(model, seed):
        model.train(training)
        inputs = batch(seed) if labels else {"input_ids": batch(seed)["input_ids"]}
        with torch.no_grad():
            outputs = model(**inputs)
        assert type(outputs.logits) is torch.Tensor
        return {"logits": outputs.logits} | ({"loss": outputs.loss} if labels else {})

    judge(build, run, head=False)


def test_gradients_through_eval_mode():
    """DPO and the like: logits, in eval mode or not, carry a gradient."""

    def run(model, seed):
        model.eval().zero_grad()
        logits = model(input_ids=batch(seed)["input_ids"]).logits
        torch.log_softmax(logits, -1)[..., 3].sum().backward()
        return {"logits": logits.detach(), **gradients(model)}

    judge(build, run, head=False)


def test_signature():
    """Trainer drops the columns that forward does not name, and generate asks it for position_ids."""
    import inspect

    model = llama()
    before = [inspect.signature(m.forward) for m in model.modules()]
    assert [inspect.signature(m.forward) for m in fastlora.patch(model).modules()] == before


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing(reentrant):
    """Layers run twice, with the same results as if their activations had been stored."""

    def checkpointed(seed):
        model = build(seed)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    def stored(model, seed):  # InFloat64 does not see the second pass
        model.gradient_checkpointing_disable()
        return run(model, seed)

    def run(model, seed):
        return step(model, seed, use_cache=False)

    model = judge(checkpointed, run, exact=stored)
    assert row(model, "layers.0.input_layernorm").fused == row(model, "layers.1.mlp.down_proj").fused == 2
    assert row(model, "base_model.model").fused == row(model, "model.norm").fused == 1
    assert_same(run(model, 3), run(fastlora.patch(build(3)), 3))


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_generate(options, padded):
    """Greedy and beam search, over caches that grow and one that does not: the same tokens."""
    model = build().eval()
    prompts = batch(1, rows=3, tokens=9)["input_ids"]
    mask = torch.ones_like(prompts)
    if padded:
        mask[1, :4] = mask[2, :6] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    expected = model.generate(input_ids=prompts, disable_compile=True, **options)
    assert expected.shape == (3, 17)
    fastlora.patch(model)
    assert torch.equal(model.generate(input_ids=prompts, disable_compile=True, **options), expected)
    assert_fused(model, calls=8, head=False)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("first", [0, 3], ids=["full", "padded"])
def test_cached_decoding(tokens, first):
    """One token, or several, at a time through a cache: the logits of the whole sequence at once."""

    def whole(model, seed):
        mask = torch.ones(3, 13, dtype=torch.int64)
        mask[0, :first] = 0
        with torch.no_grad():
            return {"logits": model.eval()(batch(seed)["input_ids"], attention_mask=mask).logits[:, first:]}

    def run(model, seed):
        ids, mask = batch(seed)["input_ids"], torch.ones(3, 13, dtype=torch.int64)
        mask[0, :first] = 0
        cache, pieces = None, []
        for i in range(0, 13, tokens):
            options = {"attention_mask": mask[:, : i + tokens], CACHE: cache, "use_cache": True}
            outputs = model.eval()(ids[:, i : i + tokens], **options)
            cache = outputs[CACHE]
            pieces.append(outputs.logits.detach())
        return {"logits": torch.cat(pieces, 1)[:, first:]}

    judge(build, run, exact=whole, head=False)


def test_the_model_may_return_a_cache_in_training():
    outputs = fastlora.patch(build().train())(**batch(), use_cache=True)
    assert outputs[CACHE].get_seq_length() == 13
    assert isinstance(outputs.logits, LazyLogits)


def test_transformers_warns_of_nothing_more_than_unpatched(caplog):
    """A name that it calls deprecated is gone one day."""

    def warnings(model):
        logging.warning_once.cache_clear()
        caplog.clear()
        step(model, use_cache=True)
        model.eval().generate(batch()["input_ids"], max_new_tokens=2, do_sample=False)
        return {record.getMessage() for record in caplog.records if record.name.startswith("transformers")}

    model = build()
    assert warnings(model) >= warnings(fastlora.patch(model))
