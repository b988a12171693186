"""Which attention runs, and that a model's mask reaches it without a word in the config."""

import copy
import importlib.machinery
import sys
import types

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fastlora
from fastlora.kernels import _library, _tiles
from fastlora.modules import flash_attn
from fastlora.reference import flash_attention

from .tiny import assert_same, batch, judge, llama, lora, padded_step, row, step

POSITIONS = torch.cat([torch.arange(5), torch.arange(8)])[None]


def packed_step(model, seed=0, positions=POSITIONS):
    return step(model, seed, position_ids=positions, use_cache=False)


def attention_row(model):
    return row(model, ".self_attn.attention")


def test_the_config_and_the_registries_stay():
    model = llama()
    before, registered = copy.deepcopy(vars(model.config)), list(ALL_ATTENTION_FUNCTIONS.keys())
    config = model.config
    padded_step(fastlora.patch(model))
    assert model.config is config and vars(config) == before
    assert list(ALL_ATTENTION_FUNCTIONS.keys()) == registered
    assert attention_row(model).fused == 1


def test_explain_names_it(monkeypatch):
    model = fastlora.patch(llama())
    for forced, runs in (("fastlora", "fastlora flash_attention"), ("sdpa", "torch SDPA")):
        monkeypatch.setenv("FASTLORA_ATTENTION", forced)
        assert attention_row(model).runs == f"{runs} (plain, padded, packed)"
    monkeypatch.delenv("FASTLORA_ATTENTION")
    assert attention_row(model).runs == "fastlora flash_attention (plain, padded, packed)"
    monkeypatch.setattr(_library, "csrc_state", "not loaded")
    assert attention_row(model).runs == "torch SDPA (plain), fastlora flash_attention (padded, packed)"


@pytest.mark.parametrize("forced", ["fastlora", "sdpa"])
@pytest.mark.parametrize("run", [step, padded_step, packed_step], ids=["plain", "padded", "packed"])
def test_one_is_forced(run, forced, monkeypatch):
    monkeypatch.setenv("FASTLORA_ATTENTION", forced)
    r = attention_row(judge(lambda seed: lora(llama(seed)), run))
    assert (r.fused, r.passed, r.why) == (int(forced == "fastlora"), 0, None)


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        ("flash", "is 'flash', needs 'fastlora', 'sdpa', 'flash_attention_2' or 'flash_attention_3'"),
        (flash_attn.FA3, "package flash_attn_interface, which"),
    ],
)
def test_one_that_cannot_be_forced(forced, message, monkeypatch):
    monkeypatch.setenv("FASTLORA_ATTENTION", forced)
    with pytest.raises(ValueError, match=f"FASTLORA_ATTENTION .*{message}"):
        step(fastlora.patch(llama()))


@pytest.mark.parametrize("first", [0, 3])
def test_sequences_are_told_apart_as_transformers_does(first):
    """By a position that is not the one before plus 1, whatever number a sequence begins with."""
    positions = torch.cat([first + torch.arange(5), 2 + torch.arange(8)])[None]
    model = judge(lambda seed: lora(llama(seed)), lambda model, seed: packed_step(model, seed, positions))
    assert attention_row(model).fused == 1


def test_positions_beside_padding_tell_nothing():
    def run(model, seed):
        return step(model, seed, attention_mask=torch.ones(3, 13), position_ids=POSITIONS, use_cache=False)

    judge(lambda seed: lora(llama(seed)), run)


def test_a_layer_that_is_not_ours_gets_transformers_mask():
    def build(seed):
        model = lora(llama(seed))
        attention = model.base_model.model.model.layers[1].self_attn
        attention.forward = types.MethodType(lambda self, *a, **k: type(self).forward(self, *a, **k), attention)
        return model

    model = judge(build, padded_step, seeds=1, whole=False)
    assert "not fused" in attention_row(model).why


def test_a_bare_model():
    """Without a head on it."""
    model = llama().model
    mask = torch.ones(3, 13, dtype=torch.int64)
    mask[1, :4] = 0

    def run(model):
        return model(batch()["input_ids"], attention_mask=mask, output_hidden_states=True).hidden_states

    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        expected, eager, ours = run(exact), run(model), run(fastlora.patch(model))
    assert len(ours) == len(expected) == 3
    for truth, theirs, mine in zip(expected, eager, ours):
        errors = [(x[mask.bool()].double() - truth[mask.bool()]).norm() for x in (theirs, mine)]
        assert errors[1] <= 1.5 * errors[0]
    assert row(model, "layers.0.self_attn.attention").fused == 1


@pytest.fixture(autouse=True)
def _choose_anew():
    """What is installed is asked once."""
    yield
    _tiles.forget()


def stand_in(name: str, monkeypatch) -> list[str]:
    """A package of that name, which checks what it is called with and computes with the witness."""
    called = []

    def attend(q, k, v, softmax_scale, causal, deterministic, dropout_p=None, **sequences):
        assert causal and isinstance(deterministic, bool) and softmax_scale == 32**-0.5
        assert (dropout_p is None) == (name == flash_attn.FA3), "flash-attn 3 knows no dropout"
        out = flash_attention(*(t.transpose(1, 2) for t in (q, k, v)), **sequences).transpose(1, 2)
        return (out, None) if name == flash_attn.FA3 else out

    def flash_attn_func(q, k, v, **options):
        assert q.shape == (3, 13, 4, 32) and k.shape == v.shape == (3, 13, 2, 32)
        called.append("plain")
        return attend(q, k, v, **options)

    def flash_attn_varlen_func(q, k, v, bounds_q, bounds_k, longest_q, longest_k, **options):
        assert q.shape == (39, 4, 32) and k.shape == v.shape == (39, 2, 32)
        assert bounds_q is bounds_k and bounds_q.dtype == torch.int32 and longest_q == longest_k == 8
        assert bounds_q.tolist() == [0, 5, 13, 18, 26, 31, 39]
        called.append("packed")
        out = attend(q[None], k[None], v[None], cu_seqlens=bounds_q, **options)
        return (out[0][0], None) if isinstance(out, tuple) else out[0]

    package = types.ModuleType(flash_attn.PACKAGES[name])
    package.__spec__ = importlib.machinery.ModuleSpec(package.__name__, None)
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(_tiles, "installed", lambda package: package == flash_attn.PACKAGES[name])
    monkeypatch.setattr(flash_attn, "_DEVICES", ("cpu",))
    monkeypatch.setenv("FASTLORA_ATTENTION", name)
    return called


@pytest.mark.parametrize("name", flash_attn.PACKAGES)
def test_flash_attn(name, monkeypatch):
    """Plain and packed batches go there, one call per layer and forward; padded ones stay ours, with the reason."""
    called = stand_in(name, monkeypatch)

    def build(seed):
        return lora(llama(seed, dtype=torch.bfloat16))

    model = judge(build, lambda model, seed: step(model, seed, use_cache=False))
    assert set(called) == {"plain"} and attention_row(model).passed == 0
    called.clear()
    model = judge(build, packed_step)
    assert set(called) == {"packed"} and attention_row(model).passed == 0
    called.clear()
    model = fastlora.patch(build(0))
    padded_step(model)
    assert not called and attention_row(model).why == f"{name} takes no padding: fastlora"


def test_flash_attn_needs_a_gpu(monkeypatch):
    stand_in(flash_attn.FA2, monkeypatch)
    monkeypatch.setattr(flash_attn, "_DEVICES", ("cuda",))
    model = fastlora.patch(llama())
    step(model)
    assert attention_row(model).why == "flash_attention_2 needs a GPU: fastlora"


@pytest.mark.parametrize("run", [padded_step, packed_step], ids=["padded", "packed"])
def test_dropout(run):
    """Ours where something is masked: of the seed, replayed by gradient checkpointing."""
    model = fastlora.patch(lora(llama(attention_dropout=0.5)))
    first, again, other = (run(model, seed) for seed in (1, 1, 2))
    assert_same(first, again)
    assert first["loss"] != run(fastlora.patch(lora(llama())), 1)["loss"]
    assert not torch.equal(first["loss"], other["loss"])
    assert (attention_row(model).fused, attention_row(model).why) == (3, None)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    assert_same(run(model, 1), first)
