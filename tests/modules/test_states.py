"""What adapters are now is what runs, and explain says what ran: against the operators that were seen to run."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from patching.tiny import Errors, assert_fused, batch, in_float64, llama, lora, randomise, row, step
from peft import LoraConfig
from peft.tuners import lora as peft_lora
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora.kernels import _library

NAMES = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


class Seen(TorchDispatchMode):
    """Within it, `calls` counts the operators of torch.ops.fastlora, and `wide` how many projections each gemm did."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.wide: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastlora":
            self.calls[func._opname] += 1
            if func._opname == "lora_gemm":
                self.wide.append(len(args[1]))
        return func(*args, **(kwargs or {}))


def build(seed: int = 0, **config) -> nn.Module:
    model = lora(llama(seed, hidden_size=32, intermediate_size=48), **config)
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "up_proj"]))
    return randomise(model)


def projections(model: nn.Module) -> list[peft_lora.Linear]:
    return [module for module in model.modules() if isinstance(module, peft_lora.Linear)]


def scale(model: nn.Module) -> None:
    for module in projections(model):
        module.scale_layer(0.5)


def without_loss(*results: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Of a few runs: the error of a single number is luck."""
    return [{name: t for name, t in found.items() if name != "loss"} for found in results]


# In this order, on one model: what is done, and what explain then says of q_proj and of down_proj.
STATES = {
    "as built": (lambda m: None, "r=4", "r=4"),
    "other adapter": (lambda m: m.set_adapter("second"), "r=3", "no active adapter"),
    "both": (lambda m: m.base_model.set_adapter(["default", "second"]), "r=4+3", "r=4"),
    "scaled": (scale, "r=4+3", "r=4"),
    "disabled": (lambda m: m.base_model.disable_adapter_layers(), "adapters disabled", "adapters disabled"),
    "enabled": (lambda m: m.base_model.enable_adapter_layers(), "r=4+3", "r=4"),
    "first again": (lambda m: m.set_adapter("default"), "r=4", "r=4"),
    "merged": (lambda m: m.merge_adapter(), "adapters merged", "adapters merged"),
    "unmerged": (lambda m: m.unmerge_adapter(), "r=4", "r=4"),
    "other values": (lambda m: randomise(m, seed=1), "r=4", "r=4"),
    "adapter gone": (lambda m: m.delete_adapter("second"), "r=4", "r=4"),
}


def test_every_state_is_followed_at_once():
    models = [build(seed) for seed in range(2)]
    patched = [fastlora.patch(copy.deepcopy(model)) for model in models]
    for name, (change, q, down) in STATES.items():
        errors = Errors()
        for seed, (model, fused) in enumerate(zip(models, patched, strict=True)):
            change(model), change(fused)
            truth, eager = in_float64(model, step, seed), step(model, seed)
            # Disabled or merged, there is nothing to train: then a loss, and no gradient.
            assert eager.keys() == step(fused, seed).keys(), name
            errors.add(*without_loss(step(fused, seed), eager, truth), torch.float32)
        errors.check()
        assert row(fused, "layers.0.self_attn.q_proj").runs.endswith(q), name
        assert row(fused, "layers.1.mlp.down_proj").runs.endswith(down), name
        assert_fused(fused, head=False)


def test_disable_adapter_context():
    """Within it the base model, bit for bit what it gives with no adapter; after it the adapters again."""
    model = fastlora.patch(build()).eval()
    ids = batch()["input_ids"]
    with torch.no_grad():
        adapted = model(ids).logits
        with model.disable_adapter():
            bare = model(ids).logits
        assert torch.equal(model(ids).logits, adapted)
        assert torch.equal(fastlora.patch(build().base_model.unload()).eval()(ids).logits, bare)
    assert not torch.equal(adapted, bare)


def test_merged_and_disabled():
    """PEFT unmerges on the first call: its own forward does that, once, and explain has the reason."""
    model = fastlora.patch(build()).eval()
    ids = batch()["input_ids"]
    with torch.no_grad():
        model.merge_adapter()
        model.base_model.disable_adapter_layers()
        assert row(model, "q_proj").why == "merged adapters to be unmerged"
        model(ids)
        assert not any(module.merged for module in projections(model))
        model(ids)
    assert (row(model, "q_proj").fused, row(model, "q_proj").passed) == (1, 1)


FORWARD = {"rms_norm_project": 4, "lora_project": 2, "swiglu_project": 2, "lora_gemm": 8}
# The first layer's input asks for no gradient: its norm is made anew, for dA alone, and not differentiated.
BACKWARD = {"rms_norm_bwd_reduce": 3, "swiglu_bwd_reduce": 2, "lora_project_t": 8, "lora_gemm_t": 7}
BACKWARD |= {"lora_reduce": 3, "lora_reduce_t": 6}
REST = {"rms_norm_fwd": 2, "rms_norm_bwd": 1, "rope": 2, "linear_cross_entropy_fwd": 1}
if _library.csrc_state == "loaded":  # else, in fp32, attention is SDPA's
    REST |= {"flash_attention_fwd": 2, "flash_attention_bwd": 2}


def test_explain_says_what_ran():
    """After one step every row counts one call, and the operators of two layers, and no others, were seen."""
    model = fastlora.patch(lora(llama(hidden_size=32, intermediate_size=48)))
    with Seen() as seen:
        step(model)
    assert_fused(model, calls=1)
    assert sorted(seen.wide) == [1, 1, 1, 1, 2, 2, 3, 3]
    assert seen.calls == FORWARD | BACKWARD | REST


def hook(projection: nn.Module) -> None:
    projection.register_forward_hook(lambda *arguments: None)


def replace_dropout(projection: nn.Module) -> None:
    projection.lora_dropout["default"] = nn.AlphaDropout(0.5)


def replace_forward(projection: nn.Module) -> None:
    forward = projection.forward
    projection.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def transpose(projection: nn.Module) -> None:
    projection.fan_in_fan_out = True


def narrow(projection: nn.Module) -> None:
    projection.lora_A["default"].double(), projection.lora_B["default"].double()


BREAKS = {
    hook: "hooks on the Linear",
    replace_dropout: "lora_dropout is a AlphaDropout",
    replace_forward: "the Linear's forward was replaced on the instance",
    transpose: "fan_in_fan_out",
    narrow: "a tensor is float64",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("breaks", BREAKS, ids=lambda function: function.__name__)
def test_fusion_broken_on_purpose_is_seen(breaks, name):
    """One projection goes its own way: its row has the reason and the calls, and one gemm is narrower by one."""
    model = fastlora.patch(lora(llama(hidden_size=32, intermediate_size=48)))
    step(model)
    breaks(model.base_model.model.model.layers[1].get_submodule(name))
    with Seen() as seen:
        step(model)
    plan = fastlora.explain(model)
    assert [(r.path[-len(name) :], r.why) for r in plan.unfused] == [(name, BREAKS[breaks])]
    assert (row(model, f"layers.1.{name}").fused, row(model, f"layers.1.{name}").passed) == (1, 1)
    assert (row(model, f"layers.0.{name}").fused, row(model, f"layers.0.{name}").passed) == (2, 0)
    assert sum(seen.wide) == 13
    with pytest.raises(fastlora.patching.NotFused, match=BREAKS[breaks]):
        fastlora.patch(model, strict=True)


def alora(model: nn.Module) -> nn.Module:
    return lora(model, alora_invocation_tokens=[7, 8])


def dora_with_dropout(model: nn.Module) -> nn.Module:
    return lora(model, use_dora=True, lora_dropout=0.2)


@pytest.mark.parametrize(("adapt", "reason"), [(alora, "ALoraLinearVariant"), (dora_with_dropout, "DoRA with dropout")])
def test_variants_are_pefts_own(adapt, reason):
    """With the reason, and with PEFT's results."""
    errors = Errors()
    for seed in range(4):
        model = adapt(llama(seed, hidden_size=32, intermediate_size=48))
        truth, eager = in_float64(model, step, seed), step(model, seed)
        errors.add(*without_loss(step(fastlora.patch(model), seed), eager, truth), torch.float32)
    errors.check()
    rows = {r.path: r for r in fastlora.explain(model).rows}
    for path, found in rows.items():
        if path.endswith("_proj"):
            assert (found.why, found.fused, found.passed) == (reason, 0, 1), path
        else:
            assert found.why is None, path


def test_adapters_mixed_in_a_batch():
    """adapter_names: PEFT's own forward, which it reaches through hooks for that call alone."""
    model = build().eval()
    ids, names = batch()["input_ids"], ["default", "second", "__base__"]
    with torch.no_grad():
        expected = model(ids, adapter_names=names).logits
        fastlora.patch(model)
        found = model(ids, adapter_names=names).logits
        assert row(model, "layers.0.self_attn.q_proj").passed == 1
        exact = copy.deepcopy(fastlora.unpatch(model)).double()(ids, adapter_names=names).logits
    assert (found - exact).norm() <= 2 * (expected - exact).norm()


def test_modules_to_save():
    """Norms and the head that PEFT wraps and trains: exact gradients, and the reasons."""
    errors = Errors()
    saved = ["lm_head", "input_layernorm"]
    for seed in range(4):
        model = lora(llama(seed, hidden_size=32, intermediate_size=48), modules_to_save=saved)
        truth, eager = in_float64(model, step, seed), step(model, seed)
        errors.add(*without_loss(step(fastlora.patch(model), seed), eager, truth), torch.float32)
    errors.check()
    assert sum("modules_to_save" in name for name in truth) == 3
    assert row(model, "layers.0").why == "its ModulesToSaveWrapper is not fused"
    assert row(model, "base_model.model").why == "lm_head is a ModulesToSaveWrapper"
    assert row(model, "q_proj").why is None
