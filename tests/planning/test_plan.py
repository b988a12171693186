"""fastlora.plan: shapes, engines, policies, rates with their provenance, and errors that say what is needed."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

import fastlora
from fastlora import planning
from fastlora.planning import SHAPES, Shape, gpus, policies, shape_of
from fastlora.planning.activations import KEEP, LAYER, MLP, Adapters
from fastlora.planning.cluster import BITS, Cluster
from fastlora.planning.policies import StepBytes

TINY = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip


def test_models_have_the_parameters_of_their_names():
    for name, billions in {"7b": 6.738, "13b": 13.016, "34b": 33.744, "70b": 68.977}.items():
        s = SHAPES[name]
        total = s.layers * (s.layer_weights() + 2 * s.hidden) + 2 * s.vocab * s.hidden + s.hidden
        assert total / 1e9 == pytest.approx(billions, abs=1e-3)


def test_a_shape_is_read_from_a_name_a_file_a_folder_json_or_a_config(tmp_path):
    from transformers import LlamaConfig

    (tmp_path / "config.json").write_text(json.dumps(TINY))
    expected = Shape(64, 176, 2, 4, 2, 256)
    for config in (tmp_path, str(tmp_path), tmp_path / "config.json", TINY, LlamaConfig(**TINY), expected):
        assert shape_of(config) == expected
    assert shape_of({**TINY, "head_dim": 32, "tie_word_embeddings": True}).q == 128
    assert shape_of("7B") is SHAPES["7b"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"config": "8b"}, "config is '8b', needs one of 7b, 13b, 34b, 70b, or a config.json"),
        ({"config": {"hidden_size": 4}}, "config is a dict without intermediate_size, num_hidden_layers"),
        ({"gpu": "v100"}, "gpu is 'v100', needs one of a100-80gb, a100-40gb, h100-80gb, h200-141gb, or auto"),
        ({"engine": "pipeline"}, r"engine has \['pipeline'\], needs names among single, ddp"),
        ({"engine": "ddp"}, "engine is 'ddp' and gpus is 1"),
        ({"targets": ["qkv"]}, r"targets has \['qkv'\], needs names among q_proj"),
        ({"targets": []}, "targets is empty"),
        ({"quant": "int3"}, "quant is 'int3', needs 'nf4' or None"),
        ({"memory": "most"}, r"memory has \['most'\], needs names among auto, fast, lean"),
        ({"tokens": 0}, "tokens is 0, needs more than 0"),
        ({"micro_batch": -1}, "micro_batch is -1, needs more than 0"),
        ({"dropout": 1}, "dropout is 1, needs a probability"),
        ({"pue": 0.9}, "pue is 0.9, needs at least 1"),
        ({"measured": "no/such.jsonl"}, "measured: no/such.jsonl holds no measurement"),
    ],
)
def test_errors_name_the_argument_what_it_was_and_what_is_needed(change, message):
    with pytest.raises(ValueError, match=message):
        fastlora.plan(**{"config": "7b", "tokens": 10**6, **change})


def test_auto_asks_the_machine(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="gpu is 'auto' and there is no GPU in this machine"):
        planning.plan("7b", 1, "auto")
    card = type("Card", (), {"name": "NVIDIA A100-SXM4-40GB", "total_memory": 42_000_000_000})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert gpus.gpu_of("auto") == replace(gpus.GPUS["a100-40gb"], memory=42e9)
    card.name = "NVIDIA T4"
    with pytest.raises(ValueError, match="this machine's is a NVIDIA T4, which is unknown"):
        gpus.gpu_of("auto")


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_plan_fits_or_says_that_it_does_not(model, count, quant):
    made = fastlora.plan(model, 10**9, gpus=count, quant=quant)
    for one in (made, made.peft):
        parts = {kind: size for kind, size in one.memory_gb.items() if kind not in ("total", "capacity")}
        assert sum(parts.values()) == pytest.approx(one.memory_gb["total"])
        assert all(size > 0 for size in parts.values())
        assert one.fits == (one.memory_gb["total"] <= one.memory_gb["capacity"])
        assert one.fits == (one.tokens_per_s is not None) == (one.largest_micro_batch_tokens >= one.seq)
        assert sum(one.layers.values()) == SHAPES[model].layers
    assert made.fits == (not (model == "70b" and count == 1 and quant is None))
    if made.peft.fits:
        assert made.tokens_per_s > made.peft.tokens_per_s
    assert json.loads(json.dumps(made.to_dict()))["peft"]["tokens_per_s"] == made.peft.tokens_per_s


def test_more_memory_means_less_recomputation_and_more_speed():
    """At the same micro-batch: everything checkpointed on the small GPU, less on the next, nothing on the largest."""
    plans = [fastlora.plan("13b", 10**9, gpu, micro_batch=4) for gpu in ("a100-80gb", "h200-141gb")]
    assert plans[0].layers[KEEP] < plans[1].layers[KEEP] == 40
    forced = [fastlora.plan("7b", 10**9, memory=memory, micro_batch=4) for memory in ("fast", "lean")]
    assert forced[0].tokens_per_s > forced[1].tokens_per_s
    assert forced[0].memory_gb["total"] > forced[1].memory_gb["total"]
    assert forced[1].seconds["recomputation"] > 0 and "recomputation" not in forced[0].seconds
    assert [one.policy for one in forced] == ["no recomputation", "full checkpointing"]


def test_recomputation_costs_a_forward():
    """Of 3 parts forward and backward, one again: base products forward are half of forward and dx."""
    lean = fastlora.plan("7b", 10**9, memory="lean", micro_batch=4).seconds
    layers_share = 1 - SHAPES["7b"].vocab * SHAPES["7b"].hidden / (
        32 * SHAPES["7b"].layer_weights() + SHAPES["7b"].vocab * SHAPES["7b"].hidden
    )
    forward = lean["base products"] / 2 * layers_share + lean["attention"] * 0.26 + lean["elementwise"] / 3
    assert lean["recomputation"] == pytest.approx(forward, rel=0.05)


def test_engines_share_what_they_say_they_share():
    shape, adapters = SHAPES["7b"], Adapters.uniform(16)
    trained = 32 * adapters.parameters(shape)
    assert trained == 39_976_960
    single, ddp, zero2, fsdp2 = (
        Cluster(shape, adapters, n, engine, None).resident()
        for n, engine in ((1, "single"), (8, "ddp"), (8, "zero2"), (8, "fsdp2"))
    )
    assert single == {
        "weights": 6_738_415_616 * 2, "adapters": trained * 4, "gradients": trained * 4, "optimizer": trained * 8,
    }  # fmt: skip
    assert ddp["weights"] == zero2["weights"] == single["weights"]
    assert ddp["optimizer"] == 8 * zero2["optimizer"] == 8 * fsdp2["optimizer"]
    assert fsdp2["weights"] == single["weights"] / 8
    assert fsdp2["gathered weights"] == 2 * (2 * shape.layer_weights() + 2 * shape.vocab * shape.hidden)


def test_nf4_takes_4_127_bits_and_leaves_embeddings_head_and_norms_in_bf16():
    assert round(BITS["nf4"], 3) == 4.127
    shape = SHAPES["7b"]
    weights = Cluster(shape, Adapters.uniform(16), 1, "single", "nf4").resident()["weights"]
    rest = 2 * (2 * shape.vocab * shape.hidden + (2 * shape.layers + 1) * shape.hidden)
    assert weights == pytest.approx(rest + shape.layers * shape.layer_weights() * 4.127 / 8, rel=1e-4)


def test_weights_that_arrive_too_slowly_cost_time():
    """A step of few tokens ends before the weights of the next layers are there; one of many hides them."""
    few, many = (
        fastlora.plan("7b", 10**9, gpus=8, engine="fsdp2", seq=seq, micro_batch=1).seconds for seq in (64, 4096)
    )
    assert few["communication"] / sum(few.values()) > 0.5 > 0.01 > many["communication"] / sum(many.values())


def test_the_policy_is_the_best_of_all_there_are():
    """Against every assignment of a policy to each of five layers, by the definition of the peak, layer by layer."""
    import itertools
    import random

    draw = random.Random(0).uniform
    for _ in range(60):
        layer, mlp, keep = sorted(draw(1, 100) for _ in range(3))
        need = StepBytes({KEEP: keep, MLP: mlp, LAYER: layer}, draw(0, 100), draw(0, 300), draw(0, 20))
        costs = {KEEP: 0.0, MLP: draw(1, 5), LAYER: draw(5, 9)}

        def peak(chosen, need=need):
            moments = [sum(need.saved[p] for p in chosen) + need.loss]
            for i in range(len(chosen)):  # the backward of layer i, the later ones being gone
                before = sum(need.saved[p] for p in chosen[:i])
                moments.append(before + need.saved[KEEP] + need.work + need.outside)
            return max(moments)

        budget = draw(100, 600)
        fitting = [c for c in itertools.product(costs, repeat=5) if peak(c) <= budget]
        chosen = policies.least(5, need, budget, costs)
        if not fitting:
            assert chosen is None
            continue
        assert peak(chosen) <= budget
        assert sum(costs[p] for p in chosen) == pytest.approx(min(sum(costs[p] for p in c) for c in fitting))


def test_every_rate_has_a_label_and_a_source():
    for gpu in gpus.GPUS:
        for rate in fastlora.plan("7b", 10**6, gpu).provenance.values():
            assert rate.label == "modelled" and rate.source and rate.value > 0


def result(op, mode, provider, ms, flops=0.0, nbytes=0.0, parity=True):
    return {
        "bench": "op", "op": op, "shape": {"M": 8192}, "dtype": "bfloat16", "mode": mode, "provider": provider,
        "parity": parity, "ms": {"median": 2 * ms}, "graph_ms": {"median": ms}, "flops": flops, "bytes": nbytes,
    }  # fmt: skip


def test_measured_rates_replace_modelled_ones(tmp_path):
    lines = [
        {"bench": "machine", "gpu": {"name": "NVIDIA A100-SXM4-80GB"}},
        result("lora_gemm", "forward", "fastlora triton", 1.5, flops=2e11),
        result("lora_gemm", "forward", "fastlora addmm", 1.0, flops=2e11),
        result("lora_gemm", "forward, code of sm80", "fastlora triton", 0.5, flops=2e11),
        result("lora_gemm", "forward", "fastlora", 0.01, flops=2e11, parity=False),
        result("lora_gemm", "forward", "base alone (floor)", 0.5, flops=2e11),
        result("rope", "forward", "fastlora", 1.0, nbytes=1.5e9),
        result("attention", "forward", "sdpa flash", 1.0, flops=1.8e11),
        result("attention", "full", "sdpa flash", 4.0, flops=6.3e11),
        result("attention", "forward", "fastlora", 2.0, flops=1.8e11),
    ]
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"bench": "op", "cut')
    rates = fastlora.plan("7b", 10**6, measured=path).provenance
    found = {name: rate.value for name, rate in rates.items() if rate.label == "measured"}
    assert found == pytest.approx(
        {"gemm": 2e14, "elementwise": 1.5e12, "attention forward": 1.8e14, "attention backward": 1.5e14}
    )
    assert "all.jsonl" in rates["gemm"].source and rates["link"].label == "modelled"
    with pytest.raises(ValueError, match="was measured on NVIDIA A100-SXM4-80GB, needs H200"):
        fastlora.plan("7b", 10**6, "h200-141gb", measured=tmp_path)


def test_planning_needs_neither_transformers_nor_peft():
    script = "import sys, fastlora; fastlora.plan('7b', 10**9); print({'transformers', 'peft'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "set()"
