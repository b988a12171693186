"""What fused forwards bypass is what fastlora thinks it is, or it runs, and explain says why."""

import functools
import inspect
import re
import subprocess
import sys
import types
from collections.abc import Mapping

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn.modules import module as torch_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.llama import modeling_llama as hf

import fastlora
from fastlora.modules import trust

from .tiny import assert_fused, assert_same, batch, gradients, judge, llama, lora, padded_step, row, step


def reasons(model: nn.Module) -> set[str]:
    return {str(r.why) for r in fastlora.explain(model).unfused}


def plant(entry: trust.Bypassed, monkeypatch, calls: list[str]) -> None:
    """Another function in the place of a bypassed one: it counts its calls, and says with functools.wraps that it is
    the original."""
    function = entry.read()
    if isinstance(function, AttentionInterface):  # the registry itself, in the namespace of the model's module
        planted = AttentionInterface()
        planted["sdpa"] = counting(function["sdpa"], calls)
    else:
        planted = counting(function, calls)
    if isinstance(entry.owner, Mapping):
        monkeypatch.setitem(entry.owner._local_mapping, entry.name, planted)
    else:
        static = isinstance(inspect.getattr_static(entry.owner, entry.name), staticmethod)
        monkeypatch.setattr(entry.owner, entry.name, staticmethod(planted) if static else planted)


def counting(function, calls: list[str]):
    @functools.wraps(function)
    def planted(*args, **kwargs):
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return planted


def built(entry: trust.Bypassed) -> nn.Module:
    """A model in whose training step the function is called."""
    model = lora(llama(), use_dora=True) if entry.role == "dora" else lora(llama(), lora_dropout=0.3)
    if entry.owner is nn.SiLU:
        for module in model.modules():
            if isinstance(module, hf.LlamaMLP):
                module.act_fn = nn.SiLU()
    return model


ENTRIES = pytest.mark.parametrize("entry", trust.BYPASSED, ids=str)


@ENTRIES
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_replaced_function_runs(entry, when, monkeypatch):
    """As often as in an unpatched model, and explain names it; put back, all is fused again."""
    calls: list[str] = []
    plain, model = built(entry), fastlora.patch(built(entry))
    assert reasons(model) == set()
    with monkeypatch.context() as patch:
        plant(entry, patch, calls)
        if when == "before":
            model = fastlora.patch(built(entry))
        assert any(
            re.match(f"{re.escape(str(entry))} was replaced by .*, which runs instead", w) for w in reasons(model)
        )
        with pytest.raises(fastlora.NotFused, match="was replaced by"):
            fastlora.patch(built(entry), strict=True)
        calls.clear()
        expected = padded_step(plain)
        unpatched = len(calls)
        found = padded_step(model)
        assert len(calls) - unpatched == unpatched > 0
        assert found.keys() == expected.keys()
    assert reasons(fastlora.patch(built(entry))) == set()


@ENTRIES
def test_the_table_is_that_of_this_machine(entry):
    """Every function comes from its own library here, and one of ours does not pass for it."""
    function = entry.read()
    if not isinstance(function, AttentionInterface):
        assert trust.comes_from(function, entry.library)
        assert not trust.comes_from(functools.wraps(function)(lambda *args: None), entry.library)


def test_what_was_replaced_before_the_import_is_noticed():
    """The identities are taken at import, but only of functions that come from their library."""
    script = """
import functools
from transformers.models.llama import modeling_llama as hf
original = hf.LlamaMLP.forward
hf.LlamaMLP.forward = functools.wraps(original)(lambda self, x: 0 * original(self, x))
from fastlora.modules import trust
print(trust.why_not("mlp"))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout == "LlamaMLP.forward was replaced by __main__.<lambda> (<string>:5), which runs instead\n"


def test_the_linear_of_zero_3_is_torchs(monkeypatch):
    """DeepSpeed leaves it in torch.nn.functional for good; under any other name it would count as replaced."""
    zero = types.ModuleType("deepspeed.runtime.zero.linear")
    zero.zero3_linear_wrap = lambda x, weight, bias=None: x @ weight.t()
    monkeypatch.setattr(torch.nn.functional, "linear", zero.zero3_linear_wrap)
    assert "torch.nn.functional.linear was replaced by" in trust.why_not("projection")
    monkeypatch.setitem(sys.modules, zero.__name__, zero)
    monkeypatch.setattr(trust, "_seen", ((), {}))
    assert trust.why_not("projection") is None


@pytest.mark.parametrize("role", trust.KNOWN)
def test_unknown_arguments_are_not_guessed(role, monkeypatch):
    """A forward of transformers' own that takes other arguments than we know is left alone, and says so."""
    (entry,) = (e for e in trust.BYPASSED if e.role == role and e.name == "forward" and e.library is transformers)
    assert trust.why_unknown(role, entry.read()) is None
    monkeypatch.setitem(trust.KNOWN, role, {("something", "else")})
    why = trust.why_unknown(role, entry.read())
    assert f"of transformers {transformers.__version__} takes other arguments than fastlora knows" in why
    monkeypatch.setattr(trust, "_known", tuple(map(trust._learn, trust.BYPASSED)))
    monkeypatch.setattr(trust, "_seen", ((), {}))
    model = fastlora.patch(lora(llama()))
    assert reasons(model) >= {why}
    monkeypatch.undo()
    monkeypatch.setattr(trust, "_seen", ((), {}))
    judge(lambda seed: lora(llama(seed)), seeds=1)


def test_it_is_asked_once_per_forward(monkeypatch):
    """And anew in the next one, also after one that failed."""
    asked = []
    token = trust.token
    monkeypatch.setattr(trust, "token", lambda: asked.append(1) or token())
    model = fastlora.patch(lora(llama()))
    with pytest.raises(ValueError):
        model(input_ids=None)
    asked.clear()
    for _ in range(2):
        model(**batch())
    assert len(asked) == 2


def registered(monkeypatch, function) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", function)


def test_a_function_registered_as_sdpa_is_called(monkeypatch):
    """With every argument; the rest of the layer stays fused. So Ulysses and ALST are right."""
    original, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def doubled(module, query, key, value, mask, **kwargs):
        seen.append(kwargs)
        out, weights = original(module, query, key, value, mask, **kwargs)
        return 2 * out, weights

    registered(monkeypatch, doubled)
    model = judge(lambda seed: lora(llama(seed)), padded_step, whole=False)
    assert {name for kwargs in seen for name in kwargs} >= {"dropout", "scaling", "position_ids"}
    unfused = fastlora.explain(model).unfused
    assert {r.path.rsplit(".", 1)[1] for r in unfused} == {"attention"}
    assert all("AttentionInterface['sdpa'] was replaced by" in r.why and r.passed == 1 for r in unfused)
    assert row(model, "layers.0.self_attn.q_proj").fused == row(model, "layers.0").fused == 1


def by_config(model):
    model.config.is_causal = False


def by_module(model):
    for module in model.modules():
        if isinstance(module, hf.LlamaAttention):
            module.is_causal = False


BIDIRECTIONAL = {"config": by_config, "module": by_module, "argument": lambda model: None}


@pytest.mark.parametrize("where", BIDIRECTIONAL)
def test_bidirectional_attention(where):
    def build(seed):
        model = llama(seed)
        BIDIRECTIONAL[where](model)
        return lora(model)

    def run(model, seed):
        return step(model, seed, use_cache=False, **({"is_causal": False} if where == "argument" else {}))

    model = judge(build, run, whole=False)
    assert "is_causal" in row(model, "layers.0.self_attn.attention").why
    assert row(model, "layers.0.self_attn.q_proj").fused == 1
    assert not torch.equal(run(model, 0)["logits"], step(fastlora.patch(lora(llama())))["logits"])


def test_arguments_of_attention_reach_it():
    """Those that transformers knows, those that it refuses, and those that it ignores."""
    model, plain = fastlora.patch(lora(llama())), lora(llama())
    if "position_bias" in inspect.signature(ALL_ATTENTION_FUNCTIONS["sdpa"]).parameters:
        bias = torch.ones(1, 4, 13, 13).tril(-3) * 9

        def run(model, seed):
            return step(model, seed, position_bias=bias.to(next(model.parameters()).dtype), use_cache=False)

        judge(lambda seed: lora(llama(seed)), run, whole=False)
        assert not torch.equal(run(model, 0)["logits"], step(plain)["logits"])
        with pytest.raises(ValueError, match="softcap"):
            step(model, softcap=5.0)
    step(model, something=1)
    assert "the argument " in row(model, "layers.0.self_attn.attention").why


def test_every_argument_reaches_an_attention_of_the_users(monkeypatch):
    """Over a cache too, where position_ids were dropped once."""
    seen = []

    def mine(module, query, key, value, mask, **kwargs):
        seen.append(sorted(name for name, argument in kwargs.items() if argument is not None))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "mine", mine)
    ids = batch()["input_ids"]
    for model in (lora(llama(attention="mine")), fastlora.patch(lora(llama(attention="mine")))):
        with torch.no_grad():
            model.eval()(ids, use_cache=True, marker=1)
    unpatched, patched = seen[:2], seen[2:]
    assert unpatched == patched and "marker" in patched[0] and "position_ids" in patched[0]


def test_a_hook_that_changes_the_arguments_of_attention():
    """As ring attention's: the mask goes, is_causal comes. Ours would read position_ids as packing."""

    def build(seed):
        model = lora(llama(seed))
        for module in model.modules():
            if isinstance(module, hf.LlamaAttention):
                module.register_forward_pre_hook(
                    lambda module, args, kwargs: (args, {**kwargs, "attention_mask": None, "is_causal": True}),
                    with_kwargs=True,
                )
        return model

    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]
    model = judge(build, lambda model, seed: step(model, seed, position_ids=positions, use_cache=False), whole=False)
    assert f"a hook of {__name__} may change its arguments" in row(model, "layers.0.self_attn.attention").why


HOOKS = {
    "forward": torch_hooks.register_module_forward_hook,
    "pre-forward": torch_hooks.register_module_forward_pre_hook,
    "backward": torch_hooks.register_module_full_backward_hook,
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_global_hooks_see_every_module(register):
    seen, expected = [], []
    model, plain = fastlora.patch(lora(llama())), lora(llama())
    for each, names in ((plain, expected), (model, seen)):
        each.enable_input_require_grads()
        handle = register(lambda module, *rest, names=names: names.append(type(module).__name__))
        try:
            step(each)
        finally:
            handle.remove()
    assert sorted(map(str, seen)) == sorted(map(str, expected)) and seen
    assert f"a global module hook has to see every module: {__name__}.<lambda>" in row(model, "layers.0.mlp").why
    assert reasons(fastlora.patch(lora(llama()))) == set()


def test_flops_of_a_fused_step_are_those_of_an_unpatched_one():
    """FlopCounterMode counts fused operators; the hooks of its ModuleTracker, which only note names, stop nothing."""
    counts = []
    for model in (lora(llama()), fastlora.patch(lora(llama()))):
        with FlopCounterMode(display=False) as counter:
            model.train()(**batch()).loss.backward()
        counts.append({str(op): n for op, n in counter.get_flop_counts()["Global"].items()})
    assert_fused(model)
    unpatched, patched = counts
    # torch has no formula for its own attention on the CPU.
    attention = [patched.pop(name) for name in list(patched) if "flash_attention" in name]
    forward = 2 * 4 * 3 * 4 * 13 * 13 * 32  # layers · (2 products of 2 FLOPs) · rows, heads, tokens², head_dim
    assert sum(attention) == 3.5 * forward
    assert sum(patched.values()) == sum(unpatched.values()) > 0


@pytest.mark.parametrize("part", ["mlp", "self_attn", "input_layernorm"])
@pytest.mark.parametrize("how", ["its class's forward", "a subclass"])
def test_the_class_of_a_patched_module(part, how, monkeypatch):
    """Its class is ours, under transformers' name: whoever changes it means the module's forward."""

    def run(model):
        module = model.get_submodule(f"base_model.model.model.layers.0.{part}")
        old = type(module).forward

        def zero(self, *args, **kwargs):
            out = old(self, *args, **kwargs)
            return (0 * out[0], out[1]) if isinstance(out, tuple) else 0 * out

        with monkeypatch.context() as patch:
            if how == "a subclass":
                module.__class__ = type(type(module).__name__, (type(module),), {"forward": zero})
            else:
                patch.setattr(type(module), "forward", zero)
            return model(**batch()).loss.item()

    model = fastlora.patch(lora(llama()))
    assert run(model) == pytest.approx(run(lora(llama())), rel=1e-5)
    assert "forward was replaced on its class" in row(model, "layers.0").why


def test_a_bias_of_lora_a():
    def build(seed):
        model = lora(llama(seed))
        lora_a = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.lora_A.default")
        lora_a.bias = nn.Parameter(torch.ones(lora_a.out_features))
        return model

    assert row(judge(build, whole=False), "layers.0.mlp.up_proj").why == "lora_A has a bias"


class Halved(torch.Tensor):
    """Whose linear layers give half."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return out / 2 if function is torch.nn.functional.linear else out


def test_a_subclass_of_tensor_decides_for_itself():
    def run(model):
        embeds = model.get_input_embeddings()(batch()["input_ids"]).detach().as_subclass(Halved)
        return float(model.train()(inputs_embeds=embeds, labels=batch()["labels"], use_cache=False).loss)

    model = fastlora.patch(lora(llama()))
    assert run(model) == pytest.approx(run(lora(llama())), rel=1e-5)
    assert row(model, "layers.0.self_attn.q_proj").why == "a tensor is a Halved"


def test_a_learned_scaling_gets_its_gradient():
    def run(model, seed):
        scaling = torch.tensor(2.0, dtype=next(model.parameters()).dtype, requires_grad=True)
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.scaling["default"] = scaling
        return step(model, seed) | {"scaling": scaling.grad}

    model = judge(lambda seed: lora(llama(seed)), run, whole=False)
    assert row(model, "layers.0.mlp.up_proj").why == "the scaling is a Tensor, not a number: PEFT's own forward runs"


def test_torch_func():
    """Fused operators have no rule for functorch's transforms: the model runs unfused in one, and says why."""
    from torch.func import functional_call, grad

    found = {}
    for name, model in (("unpatched", lora(llama())), ("patched", fastlora.patch(lora(llama())))):
        model.train()
        trained = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
        found[name] = grad(lambda p, model=model: functional_call(model, p, (), batch()).loss)(trained)
    assert_same(found["patched"], found["unpatched"])
    assert "for which fused operators have no rule" in row(model, "layers.0.mlp").why


def test_jit_trace():
    class Logits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    ids = batch()["input_ids"]

    def outcome(model):
        try:
            return torch.jit.trace(Logits(model.eval()), (ids,), check_trace=False)(ids).tolist()
        except RuntimeError as error:  # of transformers 4.57's masks, patched or not
            return str(error)

    model = fastlora.patch(lora(llama()))
    assert outcome(model) == outcome(lora(llama()))
    if transformers.__version__ > "5":
        assert outcome(model) == lora(llama()).eval()(ids).logits.tolist()
        assert "torch.jit.trace" in row(model, "layers.0.mlp").why


def test_a_hook_on_doras_magnitude():
    def build(seed):
        model = lora(llama(seed), use_dora=True)
        vector = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.default")
        vector.register_forward_hook(lambda module, args, out: 0 * out)
        return model

    model = judge(build, whole=False)
    assert row(model, "layers.0.self_attn.q_proj").why == "hooks on the DoraLinearLayer"


BUFFERS = {
    "mask": ("attention_mask", None),
    "mask, reentrant checkpointing": ("attention_mask", True),
    "mask, checkpointing": ("attention_mask", False),
    "inputs_embeds": ("inputs_embeds", None),
}


@pytest.mark.parametrize("case", BUFFERS)
def test_buffers_of_the_callers_may_be_filled_again_before_backward(case):
    argument, reentrant = BUFFERS[case]

    def run(refill):
        model = fastlora.patch(lora(llama()))
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        inputs = batch()
        buffer = torch.ones(3, 13, dtype=torch.bool)
        buffer[1, -4:] = False
        if argument == "inputs_embeds":
            buffer = model.get_input_embeddings()(inputs.pop("input_ids")).detach().clone()
        loss = model.train()(**inputs, **{argument: buffer}, use_cache=False).loss
        if refill:
            buffer.zero_()
        loss.backward()
        return gradients(model)

    assert_same(run(refill=True), run(refill=False))


@pytest.mark.parametrize("value", [-1, 0])
def test_ignore_index(value):
    def run(model, seed):
        labels = batch(seed)["labels"]
        return step(model, seed, labels=labels.masked_fill(labels < 9, value), ignore_index=value)

    judge(lambda seed: lora(llama(seed)), run)


def test_num_items_of_several_elements():
    model = judge(
        lambda seed: lora(llama(seed)),
        lambda model, seed: {
            "loss": model.train()(**batch(seed), num_items_in_batch=torch.tensor([7, 9])).loss.detach()
        },
        whole=False,
    )
    assert row(model, "base_model.model").why == "num_items_in_batch has 2 elements"


def test_a_head_of_another_size_than_the_config_says():
    model = fastlora.patch(llama())
    model.config.vocab_size += 1
    assert any("config.vocab_size is" in why for why in reasons(model))


def test_a_class_of_an_optional_package(monkeypatch):
    """Its forward counts as its own where it lies in the package's files."""
    assert trust.why_not_class(nn.Conv1d) is None
    monkeypatch.setattr(nn.Conv1d, "forward", functools.wraps(nn.Conv1d.forward)(lambda self, x: x))
    assert "Conv1d.forward was replaced by" in trust.why_not_class(nn.Conv1d)


def test_functions_that_kernels_made_modules_of():
    """The package kernels turns a function into a module; a kernel from the Hub becomes its forward."""

    def func(x):
        return x

    class Func(nn.Module):
        def forward(self, *args):
            return func(*args)

    entry = trust.Bypassed("rope", types.SimpleNamespace(function=Func()), "function", types.ModuleType("here"))
    entry.library.__file__ = __file__
    before = entry.read()
    assert trust.comes_from(before, entry.library) and not trust.comes_from(before, transformers)
    assert before == entry.read()
    entry.owner.function.forward = types.MethodType(lambda self, x: x, entry.owner.function)
    assert before != entry.read()
