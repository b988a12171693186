"""What has no fused form goes its own way, with the same results, and explain says why."""

import re
from functools import partial

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers.models.llama import modeling_llama as hf

import fastlora

from .test_patch import assert_untouched, traces
from .tiny import assert_same, batch, gradients, judge, llama, lora, randomise, row, step

ROOT = "base_model.model."


def layer(model: nn.Module, index: int = 0) -> nn.Module:
    return model.get_submodule(f"{ROOT}model.layers.{index}")


def judge_alone(build, run=step, *, alone: dict[str, str], **options) -> nn.Module:
    """The judge; and only these paths are left alone, each with this in its reason."""
    model = judge(build, run, whole=False, **options)
    unfused = {r.path.removeprefix(ROOT): r for r in fastlora.explain(model).unfused}
    assert unfused.keys() == alone.keys()
    for path, reason in alone.items():
        assert reason in unfused[path].why
        assert unfused[path].fused == 0 and unfused[path].passed == 1, unfused[path]
    return model


def every(*names: str) -> list[str]:
    return [f"model.layers.{i}.{name}" for i in range(2) for name in names]


def test_dora_with_dropout():
    """PEFT's own forward, so the same masks from the same seed."""
    model = judge(
        lambda seed: lora(llama(seed), use_dora=True, lora_dropout=0.3, target_modules=["v_proj"]), whole=False
    )
    r = row(model, "self_attn.v_proj")
    assert (r.why, r.fused, r.passed) == ("DoRA with dropout", 0, 1)


def test_fan_in_fan_out():
    def build(seed):
        model = lora(llama(seed))
        layer(model).mlp.up_proj.fan_in_fan_out = True
        return model

    judge_alone(build, alone={"model.layers.0.mlp.up_proj": "fan_in_fan_out"})


@pytest.mark.parametrize(
    "part", ["q_proj", "q_proj.base_layer", "q_proj.lora_A.default", "q_proj.lora_dropout.default"]
)
def test_a_hook_inside_a_projection_fires(part):
    """Activation capture, ZeRO-3, individually sharded units: all of them hook."""
    seen = []

    def build(seed):
        model = lora(llama(seed))
        layer(model).self_attn.get_submodule(part).register_forward_hook(
            lambda module, args, out: seen.append(out.shape)
        )
        return model

    judge_alone(build, alone={"model.layers.0.self_attn.q_proj": "hooks"})
    assert len(seen) == 4 * 3, "in the float64, the unpatched and the patched run of every seed"


@pytest.mark.parametrize(
    "part", ["mlp", "self_attn", "input_layernorm", "post_attention_layernorm", "mlp.act_fn", "mlp.up_proj", ""]
)
def test_hooks_see_what_they_see_unpatched(part):
    """Any module may be watched: the hook gets the same values, and the results are the same."""
    captured = {}

    def hook(module, args, out):
        captured["hooked"] = (out[0] if isinstance(out, tuple) else out).detach()

    def build(seed):
        model = lora(llama(seed))
        layer(model).get_submodule(part).register_forward_hook(hook)
        return model

    def run(model, seed):
        captured.clear()
        return {**step(model, seed), **captured}

    judge(build, run, whole=False)
    assert captured


@pytest.mark.parametrize("part", ["mlp", "self_attn", "input_layernorm", "mlp.gate_proj", "mlp.act_fn"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_replaced_on_an_instance(part, when):
    called = []

    def replace(model):
        module = layer(model).get_submodule(part)
        original = module.forward

        def forward(*args, **kwargs):
            called.append(part)
            return original(*args, **kwargs)

        module.forward = forward
        return model

    model = lora(llama())
    model = fastlora.patch(replace(model)) if when == "before" else replace(fastlora.patch(model))
    step(model)
    assert called == [part]
    assert [r for r in fastlora.explain(model).unfused if "forward" in r.why]


def test_another_activation():
    """By config; by hand, in which case the config knows nothing of it."""

    def by_hand(seed):
        model = lora(llama(seed))
        layer(model).mlp.act_fn = nn.GELU()
        return model

    judge(lambda seed: lora(llama(seed, hidden_act="gelu")), whole=False)
    model = judge(by_hand, whole=False)
    assert any("GELU" in r.why for r in fastlora.explain(model).unfused)
    assert row(model, "layers.1.mlp").why is None


def test_hidden_act_gelu_is_told():
    model = fastlora.patch(llama(hidden_act="gelu"))
    assert "gelu" in row(model, "layers.0.mlp").why
    with pytest.raises(fastlora.NotFused, match="gelu"):
        fastlora.patch(model, strict=True)


class Clipped(hf.LlamaMLP):
    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


def test_a_subclass_with_its_own_forward():
    def build(seed):
        model = llama(seed)
        old = model.model.layers[0].mlp
        model.model.layers[0].mlp = Clipped(model.config)
        model.model.layers[0].mlp.load_state_dict(old.state_dict())
        return lora(model)

    model = judge(build, whole=False)
    assert "Clipped" in row(model, "layers.0.mlp").why
    assert row(model, "layers.1.mlp.up_proj").fused == 1


class Scaled(hf.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.loss = 2 * outputs.loss
        return outputs


class Doubling(hf.LlamaDecoderLayer):
    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)


def scaled(model):
    model.base_model.model.__class__ = Scaled


def doubling(model):
    layer(model).__class__ = Doubling


def clipped(model):
    layer(model).mlp.__class__ = Clipped


def hooked(part: str):
    return lambda model: layer(model).get_submodule(part).register_forward_hook(lambda module, args, out: None)


def pre_hooked(model):
    layer(model).mlp.register_forward_pre_hook(lambda module, args: None)


def dispatched(model):
    add_hook_to_module(layer(model).mlp, ModelHook())


OBSTACLES = {
    "a model with its own forward": (scaled, "Scaled .* is a subclass"),
    "a layer with its own forward": (doubling, "Doubling .* is a subclass"),
    "an MLP with its own forward": (clipped, "Clipped .* is a subclass"),
    "a hook on a projection": (hooked("self_attn.q_proj"), "q_proj: hooks on the Linear"),
    "a hook on a norm": (hooked("input_layernorm"), "hooks on the LlamaRMSNorm"),
    "a pre-hook on an MLP": (pre_hooked, "hooks on the LlamaMLP"),
    "accelerate's hooks": (dispatched, "forward was replaced on the instance"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_cannot_be_fused_is_as_it_was(name):
    """strict raises with the reason and leaves the model untouched; without it, the results are the unpatched ones."""
    obstruct, reason = OBSTACLES[name]

    def build(seed):
        model = lora(llama(seed))
        obstruct(model)
        return model

    model = build(0)
    before = traces(model)
    with pytest.raises(fastlora.NotFused, match=reason):
        fastlora.patch(model, strict=True)
    assert_untouched(model, before)
    fastlora.patch(model)
    assert any(re.search(reason, f"{r.path}: {r.why}") for r in fastlora.explain(model).unfused)
    fastlora.unpatch(model)
    assert_untouched(model, before)
    judge(build, whole=False, seeds=2)


HEADS = {
    "lora": {"target_modules": ["lm_head", "q_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved with embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS)
def test_a_head_of_pefts(config):
    """A trained head is never silently frozen: its gradients are the unpatched ones."""
    model = judge(lambda seed: lora(llama(seed), **config), whole=False)
    assert any("lm_head" in name for name in step(model))
    r = row(model, "base_model.model")
    assert "lm_head is a" in r.why and r.fused == 0 and r.passed == 2


def test_a_hook_on_the_head_fires():
    seen = []
    model = lora(llama())
    model.base_model.model.lm_head.register_forward_hook(lambda *a: seen.append(1))
    step(fastlora.patch(model))
    assert seen == [1]
    assert row(model, "base_model.model").why == "hooks on the Linear"


def test_mixed_batch():
    """Every row its own adapter: PEFT's inference option."""

    def build(seed):
        model = lora(llama(seed))
        model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
        return randomise(model, seed=1).eval()

    def run(model, seed):
        with torch.no_grad():
            outputs = model(input_ids=batch(seed)["input_ids"], adapter_names=["default", "second", "__base__"])
        return {"logits": outputs.logits}

    model = judge(build, run, whole=False)
    r = row(model, "layers.0.mlp.up_proj")
    assert (r.fused, r.passed) == (0, 1) and "hooks" in r.why
    model(input_ids=batch()["input_ids"])
    assert row(model, "layers.0.mlp.up_proj").fused == 1


OTHERS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_other_peft_methods(config):
    def build(seed):
        model = llama(seed)
        torch.manual_seed(seed)
        return get_peft_model(model, config)

    model = judge(build, whole=False)
    assert row(model, "layers.0.input_layernorm").fused == 1
    if config.peft_type == "IA3":
        r = row(model, "layers.0.mlp.down_proj")
        assert ((r.fused, r.passed) == (0, 1) and "not" in r.why) or "neither" in r.why


def test_base_layer_of_another_class():
    """A quantized linear layer, for one."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def build(seed):
        model = lora(llama(seed))
        layer(model).mlp.up_proj.base_layer.__class__ = Doubled
        return model

    judge_alone(build, alone={"model.layers.0.mlp.up_proj": "Doubled"})


def test_float64():
    """Not a dtype of ours: the unpatched results, to the bit."""
    plain = step(lora(llama(dtype=torch.float64)))
    model = fastlora.patch(lora(llama(dtype=torch.float64)))
    assert_same(step(model), plain)
    assert all(r.fused == 0 for r in fastlora.explain(model).rows)
    assert "float64" in row(model, "layers.0.mlp.up_proj").why


def test_mixed_dtypes():
    """An fp32 norm before a bf16 head fails, as it does unpatched."""
    model = lora(llama(dtype=torch.bfloat16))
    model.base_model.model.model.norm.float()
    with pytest.raises(RuntimeError):
        step(model)
    with pytest.raises((RuntimeError, TypeError), match=r"lm_head|dtype"):
        step(fastlora.patch(model))


def test_fp32_norms_inside_layers():
    def build(seed):
        model = lora(llama(seed, dtype=torch.bfloat16))
        for one in (layer(model, 0), layer(model, 1)):
            one.input_layernorm.float()
        return model

    with pytest.raises(RuntimeError):
        step(build(0))

    def run(model, seed):
        with torch.autocast("cpu", torch.bfloat16):
            return step(model, seed)

    judge(build, run, exact=step)


def test_custom_mask():
    """A 4-D mask of the caller's own goes to SDPA."""

    def run(model, seed):
        mask = torch.ones(3, 1, 13, 13, dtype=torch.bool).tril()
        mask[:, :, 8:, 2] = False
        return step(model, seed, attention_mask=mask)

    model = judge(lambda seed: lora(llama(seed)), run, whole=False)
    assert "mask" in row(model, ".self_attn.attention").why


def test_attention_dropout(monkeypatch):
    """SDPA's, from the same seed: the same."""
    monkeypatch.setenv("FASTLORA_ATTENTION", "sdpa")
    seeded = partial(step, seed=1)
    model = lora(llama(attention_dropout=0.5))
    expected = seeded(model)["loss"]
    fastlora.patch(model, ops={"flash_attention"})
    assert torch.equal(seeded(model)["loss"], expected)


def test_gradients_reach_what_is_trained():
    """Whatever is trained unpatched is trained patched."""
    for build in (llama, lambda: lora(llama()), lambda: lora(llama(), modules_to_save=["input_layernorm"])):
        unpatched = build()
        step(unpatched)
        patched = fastlora.patch(build())
        step(patched)
        assert gradients(patched).keys() == gradients(unpatched).keys()
