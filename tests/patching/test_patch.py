"""patch, unpatch, patched: what they change, and that they change nothing else."""

import logging
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM
from transformers.models.llama import modeling_llama as hf

import fastlora

from .tiny import assert_fused, assert_same, llama, lora, row, step


def traces(model: nn.Module) -> dict[str, object]:
    """Every module's class and all that is in its __dict__, one level into dicts."""
    found: dict[str, object] = {}
    for path, module in model.named_modules():
        found[path] = type(module)
        for key, value in vars(module).items():
            found[f"{path}|{key}"] = value
            if isinstance(value, dict):
                found |= {f"{path}|{key}|{k}": v for k, v in value.items()}
    for name, config in (("config", model.config), ("generation_config", model.generation_config)):
        found |= {f"{name}|{k}": v for k, v in vars(config).items()}
    return found


def assert_untouched(model: nn.Module, before: dict[str, object]) -> None:
    after = traces(model)
    assert after.keys() == before.keys()
    assert [key for key, value in before.items() if after[key] is not value] == []


@pytest.mark.parametrize("build", [llama, lambda: lora(llama())], ids=["full", "lora"])
def test_unpatch_leaves_no_trace(build):
    model = build()
    step(model)
    model.zero_grad()
    before = traces(model)
    assert fastlora.patch(model) is model
    assert traces(model) != before, "patch did nothing"
    step(model)
    model.zero_grad()
    assert fastlora.unpatch(model) is model
    assert_untouched(model, before)


def test_unpatched_model_runs_as_before():
    model = lora(llama())
    before = step(model)
    step(fastlora.patch(model))
    assert_same(step(fastlora.unpatch(model)), before)


def test_unpatch_after_output_capture():
    """To capture hidden states, transformers leaves hooks, or (4.x) bound forwards, on the modules that ran."""
    model = lora(llama(attention="eager"))
    before = step(model, output_hidden_states=True, output_attentions=True)
    fastlora.patch(model)
    step(model, output_hidden_states=True, output_attentions=True)
    fastlora.unpatch(model)
    for key, value in traces(model).items():
        owner = getattr(value, "__func__", value)
        assert "fastlora" not in f"{getattr(owner, '__module__', '')} {type(owner).__module__}", key
    assert_same(step(model), before)


def test_attention_that_is_chosen_later():
    """The user's choice stands, patched or not."""
    model = fastlora.patch(lora(llama()))
    model.set_attn_implementation("eager")
    expected = step(fastlora.patch(lora(llama(attention="eager"))))
    assert_same(step(model), expected)
    assert fastlora.unpatch(model).config._attn_implementation == "eager"


def test_patching_makes_no_parameters():
    model = lora(llama())
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    fastlora.patch(model)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert after.keys() == before.keys() and all(after[name] is tensor for name, tensor in before.items())
    assert_state_dicts_equal(model.state_dict(), fastlora.unpatch(model).state_dict())


def assert_state_dicts_equal(one: dict, other: dict) -> None:
    assert list(one) == list(other)
    assert all(one[key].data_ptr() == other[key].data_ptr() for key in one)


def test_another_model_is_unaffected():
    other = llama()
    before, result = traces(other), step(llama())
    step(fastlora.patch(llama(1)))
    assert_untouched(other, before)
    assert_same(step(other), result)
    assert all(r.why == "not patched" for r in fastlora.explain(other).rows)


def test_another_model_of_the_same_config_is_unaffected():
    model = llama()
    other = type(model)(model.config)
    result = step(other)
    before = traces(other)
    step(fastlora.patch(model))
    other.zero_grad()
    assert_untouched(other, before)
    assert_same(step(other), result)


def test_a_second_patch_changes_nothing():
    model = fastlora.patch(lora(llama()))
    first = step(model)
    plan = fastlora.explain(model)
    fastlora.patch(model)
    assert fastlora.explain(model) == plan, "counters go on"
    assert_same(step(model), first)
    fastlora.unpatch(fastlora.unpatch(model))
    assert [type(m) for m in model.modules()] == [type(m) for m in lora(llama()).modules()]


def test_a_second_patch_chooses_anew():
    model = fastlora.patch(lora(llama()), ops={"rms_norm"})
    fastlora.patch(model)
    step(model)
    assert_fused(model, calls=1)
    fastlora.patch(model, ops={"swiglu"})
    assert_same(step(model), step(fastlora.patch(lora(llama()), ops={"swiglu"})))


def test_unknown_op():
    model = llama()
    before = traces(model)
    with pytest.raises(ValueError, match=r"rmsnorm.*rms_norm"):
        fastlora.patch(model, ops=["swiglu", "rmsnorm"])
    with pytest.raises(ValueError, match="rmsnorm"), fastlora.patched(model, ops="rmsnorm"):
        pass
    assert_untouched(model, before)


@pytest.mark.parametrize("function", [fastlora.patch, fastlora.unpatch, fastlora.explain])
def test_not_a_model(function):
    with pytest.raises(TypeError, match=r"dict.*torch\.nn\.Module"):
        function({})


def test_strict_passes_where_all_is_fused():
    model = fastlora.patch(lora(llama()), strict=True)
    step(model)
    assert_fused(model, calls=1)


def with_a_hook() -> nn.Module:
    """A model of which not all can be fused."""
    model = lora(llama())
    model.base_model.model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda *a: None)
    return model


def test_strict_names_module_and_reason():
    model = with_a_hook()
    before = traces(model)
    with pytest.raises(fastlora.NotFused, match=r"layers\.1\.self_attn\.v_proj: hooks on the Linear"):
        fastlora.patch(model, strict=True)
    assert_untouched(model, before)


@pytest.mark.parametrize("left_out", sorted(fastlora.patching.engine.OPS))
def test_strict_asks_for_no_more_than_was_chosen(left_out):
    """Without one op, with that op alone, and where that op has something in its way."""
    others = fastlora.patching.engine.OPS - {left_out}
    fastlora.patch(lora(llama()), ops=", ".join(others), strict=True)
    fastlora.patch(lora(llama()), ops=left_out, strict=True)
    model = with_a_hook()
    with (
        pytest.raises(fastlora.NotFused, match="v_proj: hooks on the Linear")
        if left_out == "lora_linear"
        else nullcontext()
    ):
        fastlora.patch(model, ops=left_out, strict=True)


def test_strict_leaves_an_earlier_patch_as_it_was():
    model = fastlora.patch(with_a_hook(), ops={"rms_norm"})
    step(model)
    before, plan = traces(model), fastlora.explain(model)
    with pytest.raises(fastlora.NotFused):
        fastlora.patch(model, strict=True)
    assert_untouched(model, before)
    assert fastlora.explain(model) == plan


class TestPatched:
    def test_restores(self):
        model = lora(llama())
        before = traces(model)
        with fastlora.patched(model) as inside:
            assert inside is model
            step(model)
            assert_fused(model, calls=1)
            model.zero_grad()
        model.zero_grad()
        assert_untouched(model, before)

    def test_restores_after_an_error(self):
        model = llama()
        before = traces(model)
        with pytest.raises(ZeroDivisionError), fastlora.patched(model):
            _ = 1 / 0
        assert_untouched(model, before)

    def test_restores_after_a_strict_refusal(self):
        model = with_a_hook()
        before = traces(model)
        with pytest.raises(fastlora.NotFused), fastlora.patched(model, strict=True):
            pass
        assert_untouched(model, before)

    def test_nests(self):
        model = lora(llama())
        before = traces(model)
        with fastlora.patched(model, ops={"swiglu"}):
            step(model)
            outer, plan = step(model), fastlora.explain(model)
            with fastlora.patched(model):
                step(model)
                assert fastlora.explain(model) != plan
            assert fastlora.explain(model) == plan
            assert_same(step(model), outer)
        model.zero_grad()
        assert_untouched(model, before)

    def test_on_a_patched_model(self):
        model = fastlora.patch(lora(llama()), ops={"rope", "rms_norm"})
        step(model)
        model.zero_grad()
        before, plan = traces(model), fastlora.explain(model)
        with fastlora.patched(model, ops=()):
            assert all(r.fused == 0 for r in fastlora.explain(model).rows)
        assert_untouched(model, before)
        assert fastlora.explain(model) == plan


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9)),
        MistralForCausalLM(
            MistralConfig(
                vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=1,
            )
        ),
    ],
    ids=["gpt2", "mistral"],
)  # fmt: skip
def test_a_model_that_is_no_llama(model, caplog):
    """Nothing is fused, and that is said."""
    before = traces(model)
    with caplog.at_level(logging.WARNING, logger="fastlora"):
        assert fastlora.patch(model) is model
    assert type(model).__name__ in caplog.text
    with pytest.raises(fastlora.NotFused, match="no Llama module"):
        fastlora.patch(model, strict=True)
    assert_untouched(model, before)
    assert fastlora.explain(model).rows == ()


def test_a_llama_inside_something_else():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.policy = lora(llama())

    wrapper = fastlora.patch(Wrapper())
    step(wrapper.policy)
    assert_fused(wrapper, calls=1)


def test_forward_replaced_on_the_class(monkeypatch):
    """By another library: its forward runs, for every module of that class, and the reason names it."""
    called = []

    def forward(self, x):
        called.append(self)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    monkeypatch.setattr(hf.LlamaMLP, "forward", forward)
    model = fastlora.patch(llama())
    step(model)
    assert len(called) == 2
    assert __name__ in row(model, "layers.0.mlp").why
    assert row(model, "layers.0.input_layernorm").fused == 1


def test_meta_model():
    """Patching needs no weights."""
    with torch.device("meta"):
        model = llama()
    fastlora.patch(model)
    fastlora.explain(model)
