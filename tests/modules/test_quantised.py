"""4-bit bases: the fused path beside PEFT over bitsandbytes, both against the dense weights in float64."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from budget import FACTOR
from patching.tiny import Errors, InFloat64, assert_fused, batch, llama, lora, misread, row, step
from peft import prepare_model_for_kbit_training
from quantise import dense, quantise
from torch import nn

import fastlora

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def build(seed=0, *, dtype=BF16, prepared=False, checkpointing=False, adapters=None, **form) -> nn.Module:
    model = quantise(llama(seed, kv_heads=(4, 2)[seed % 2], dtype=dtype, **SIZES), **form)
    if prepared:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    return lora(model, **(adapters or {})).train()


CASES = {
    "bf16": {},
    "prepared": {"prepared": True},
    "prepared, autocast": {"prepared": True, "autocast": True},
    "fp32": {"dtype": FP32, "compute": FP32, "quant_type": "fp4", "double": False},
    "fp32 compute of a bf16 model": {"compute": FP32, "blocksize": 32},
    "no compute dtype": {"compute": None, "storage": BF16},
    "some layers dense": {
        "keep": ("lm_head", "q_proj", "down_proj"),
        "adapters": {"target_modules": ["q_proj", "v_proj"]},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_bitsandbytes(name):
    options = dict(CASES[name])
    autocast = options.pop("autocast", False)
    errors = Errors()
    for seed in range(4):
        model = build(seed, **options)
        exact = dense(model).double()
        with InFloat64():
            truth = step(exact, seed)
        with torch.autocast("cpu", BF16, enabled=autocast):
            eager = step(copy.deepcopy(model), seed)
            ours = step(fastlora.patch(model), seed)
        assert_fused(model, calls=1)
        errors.add(ours, eager, truth, BF16 if autocast or options.get("compute", BF16) == BF16 else FP32)
    errors.check()


def curve(model: nn.Module, seed: int, steps: int = 20) -> torch.Tensor:
    """Losses; the model's adapters are trained in place."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3, weight_decay=0.0)
    losses = []
    for i in range(steps):
        with torch.autocast("cpu", BF16, enabled=next(model.parameters()).dtype != torch.float64):
            loss = model(**batch(10 * seed + i % 4, 2, 12), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().double().clone() for name, p in model.named_parameters() if p.requires_grad}


def drift(losses, found, truth, trained, before) -> torch.Tensor:
    """Of the losses, and of the adapters: how far from what training in float64 did to them."""
    off = [(found[name] - w).norm() / (w - before[name]).norm() for name, w in trained.items()]
    return torch.stack([(losses.double() - truth).square().mean().sqrt(), torch.stack(off).square().mean().sqrt()])


def test_curves():
    """Twenty steps under autocast from a model prepared for k-bit training, losses and adapters: the budget of
    docs/numerics.md."""
    ours, eager = [], []
    for seed in range(4):
        model = build(seed, prepared=True)
        exact = dense(model).double()
        before = adapters(model)
        with InFloat64():
            truth = curve(exact, seed)
        trained = adapters(exact)
        assert truth[-4:].mean() < 0.98 * truth[:4].mean(), "nothing was learned"
        patched = fastlora.patch(copy.deepcopy(model))
        ours.append(drift(curve(patched, seed), adapters(patched), truth, trained, before))
        assert_fused(patched, calls=20)
        eager.append(drift(curve(model, seed), adapters(model), truth, trained, before))
    found, largest = torch.stack(ours).square().mean(0).sqrt(), torch.stack(eager).amax(0)
    print(f"drift of losses and adapters {found.tolist()}, unpatched {largest.tolist()}")
    assert (found <= FACTOR * largest).all()


def test_checkpointing_trains_the_same():
    stored = curve(fastlora.patch(build(1, prepared=True, adapters={"lora_dropout": 0.1})), 1, 4)
    model = build(1, prepared=True, checkpointing=True, adapters={"lora_dropout": 0.1})
    assert torch.equal(curve(fastlora.patch(model), 1, 4), stored)
    assert row(model, "layers.0.self_attn.q_proj").fused == 8


def peak(run) -> int:
    """The most bytes that were allocated at once while run() ran, by the allocator's own report."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    assert most > 0
    return most


def test_one_dense_weight_at_a_time():
    """In forward and in backward; and none is kept in between."""
    N, rank, tokens = 512, 4, 8
    x = torch.randn(tokens, N, requires_grad=True)
    projections = []
    for _ in range(3):
        packed, state = bnb.functional.quantize_4bit(torch.randn(N, N), quant_type="nf4")
        weight = fastlora.ops.quantised(packed, state)
        branch = fastlora.ops.Branch(torch.randn(rank, N, requires_grad=True), torch.randn(N, rank, requires_grad=True))
        projections.append(fastlora.ops.Projection(weight, None, (branch,)))
    results = []
    one = N * N * 4
    assert one <= peak(lambda: results.extend(fastlora.ops.lora_group(x, projections))) < 1.2 * one
    grads = [torch.randn_like(y) for y in results]
    assert one <= peak(lambda: torch.autograd.backward(results, grads)) < 1.2 * one


def test_no_more_memory_than_bitsandbytes():
    def measure(model):
        def run():
            with torch.autocast("cpu", BF16):
                model(**batch(0, 2, 12), use_cache=False).loss.backward()

        run()
        return peak(run)

    model = build(prepared=True)
    eager = measure(copy.deepcopy(model))
    ours = measure(fastlora.patch(model))
    print(f"peak {ours} bytes, unpatched {eager}")
    assert ours <= eager


def test_explain():
    plan = fastlora.explain(fastlora.patch(build()))
    assert {r.runs for r in plan.rows if r.path.endswith("_proj")} == {"fastlora lora over a 4-bit weight, r=4"}
    model = fastlora.patch(build(adapters={"target_modules": ["q_proj"]}))
    assert row(model, "k_proj").runs == "fastlora base linear over a 4-bit weight, no adapter"
    model.base_model.disable_adapter_layers()
    assert row(model, "q_proj").runs == "fastlora base linear over a 4-bit weight, adapters disabled"


def repack(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = module.weight
            weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
                weight.data, weight.quant_state
            )


def to_8bit(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and name != "lm_head":
                setattr(parent, name, bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, False))


LEFT_ALONE = {
    "DoRA": (lambda: build(adapters={"use_dora": True}), "DoRA over a 4-bit weight"),
    "repacked": (lambda: build(), "repacked by bitsandbytes for inference on this CPU"),
    "8 bits": (lambda: llama(**SIZES), "LLM.int8"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone_with_the_reason(name):
    make, why = LEFT_ALONE[name]
    model = make()
    {"repacked": repack, "8 bits": to_8bit}.get(name, lambda model: None)(model)
    fastlora.patch(model)
    reasons = {r.why for r in fastlora.explain(model).rows if r.path.endswith("_proj")}
    assert len(reasons) == 1 and why in reasons.pop()
    if name == "DoRA":
        assert torch.isfinite(step(model)["loss"])


def test_a_few_tokens_without_gradients_are_bitsandbytes_on_a_gpu():
    from fastlora.modules.quantised import why_not_input

    x = SimpleNamespace(is_cuda=True, shape=(1, 4, 8), numel=lambda: 32)
    with torch.no_grad():
        assert "at most 4 tokens" in why_not_input(None, x)
        assert why_not_input(None, SimpleNamespace(is_cuda=False)) is None
    assert why_not_input(None, x) is None


def test_fp32_head_over_bf16_hidden_states():
    """As transformers: an error without autocast, autocast's dtype with it."""
    model = build()
    model.base_model.model.lm_head.float()
    for one in (model, fastlora.patch(copy.deepcopy(model))):
        with pytest.raises((TypeError, RuntimeError)):
            step(copy.deepcopy(one))
        with torch.autocast("cpu", BF16):
            assert torch.isfinite(step(one)["loss"])


@pytest.mark.parametrize("prepared", [False, True])
def test_verify(prepared):
    """Against the dense weights; and the model is 4-bit again, its layers as they were."""
    model = build(prepared=prepared, compute=BF16 if prepared else None)
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    before = [(m.compute_dtype, m.compute_type_is_set, m.weight.data.clone()) for m in layers]
    with torch.autocast("cpu", BF16, enabled=prepared):
        found = fastlora.verify(model, batch())
    assert found.within, str(found)
    assert not found.passed_through
    for layer, (dtype, is_set, packed) in zip(layers, before, strict=True):
        assert (layer.compute_dtype, layer.compute_type_is_set) == (dtype, is_set)
        assert torch.equal(layer.weight.data, packed)


@pytest.mark.parametrize("seed", range(8))
def test_verify_judges_a_few_tokens(seed, monkeypatch):
    """39 tokens: no alarm where nothing is wrong; a scaling off by 3 % in one projection of one layer is found."""
    model = build(seed, prepared=True)
    with torch.autocast("cpu", BF16):
        found = fastlora.verify(model, batch(seed))
        assert found.within, str(found)
        misread(monkeypatch, model.base_model.model.model.layers[1].mlp.down_proj, 1.03)
        found = fastlora.verify(model, batch(seed))
    assert {check.module for check in found.exceeded[:2]} == {"base_model.model.model.layers.1.mlp.down_proj"}


def test_verify_finds_a_scale_of_another_block(monkeypatch):
    dense_weight = fastlora.ops.Quantised.dense

    def wrong(self, dtype=None):
        return dense_weight(self, dtype) if self.shape[0] != 128 else dense_weight(self, dtype).roll(64, 0)

    model = build()
    # The witness has its weights before the kernel goes wrong.
    from fastlora.patching import verifying

    exact = verifying.exact

    def sound(module, dtype):
        with monkeypatch.context() as patched:
            patched.setattr(fastlora.ops.Quantised, "dense", dense_weight)
            return exact(module, dtype)

    monkeypatch.setattr(verifying, "exact", sound)
    monkeypatch.setattr(fastlora.ops.Quantised, "dense", wrong)
    found = fastlora.verify(model, batch())
    assert not found.within and any("layers.0.mlp" in check.module for check in found.exceeded)


def test_verify_has_no_witness_for_8_bits():
    model = llama(**SIZES)
    to_8bit(model)
    with pytest.raises(ValueError, match="q_proj is a Linear8bitLt, whose products have no dense form"):
        fastlora.verify(model, batch())
