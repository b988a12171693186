"""The gate of whole training steps."""

import pytest
import torch

from bench import machine, models, steps, training, truth
from bench.gate import Red
from bench.setting import Setting, batch, work
from bench.step_providers import BY_NAME

BF16 = torch.bfloat16


def setting(dtype=BF16, **changes):
    plain = {"model": "tiny", "device": "cpu", "rows": 2, "sequence": 24, "layers": 2}
    return Setting(**plain | {"dtype": dtype} | changes)


def gate_and(name, s):
    base = models.base_model(s.shape, s.dtype, s.device)
    return training.Gate(s, base), training.Trainee(BY_NAME[name], base, s)


@pytest.mark.parametrize("batch", ["dense", "padded", "packed"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_fastlora_is_green(dtype, batch):
    gate, trainee = gate_and("fastlora", setting(dtype, batch=batch))
    assert set(gate.check(trainee)) == {"dA", "dB"}


@pytest.mark.parametrize("batch", ["dense", "padded", "packed"])
def test_the_truth_is_what_eager_rounds(batch):
    """In fp32 PEFT is far nearer to the truth than to that of a batch with one other token."""
    s = setting(torch.float32, batch=batch)
    gate, trainee = gate_and("peft", s)
    gate.check(trainee)
    errors = gate._yardsticks["peft"][1]
    other = {k: v.clone() for k, v in gate.made.items()}
    other["input_ids"][0, 1] += 1
    *_, moved = truth.step(trainee.model, s.shape, other)
    *_, right = gate._truth
    for figure, letter in (("dA", "lora_A"), ("dB", "lora_B")):
        nearest = min(((moved[n] - right[n]).norm() / right[n].norm()).item() for n in right if letter in n)
        assert errors[figure] < 1e-3 * nearest


@pytest.mark.parametrize("adapter", ["lora_A", "lora_B"])
def test_a_perturbed_adapter_is_red(adapter):
    gate, trainee = gate_and("fastlora", setting())
    gate.check(trainee)
    with torch.no_grad():
        for name, parameter in models.adapters(trainee.model).items():
            if adapter in name:
                parameter.mul_(1.05)
    with pytest.raises(Red, match=r"d[AB]: relative error|loss: over budget"):
        gate.check(trainee)


def test_a_red_provider_gets_no_time(monkeypatch):
    broken = BY_NAME["fastlora"]._replace(after=_wrong)
    monkeypatch.setattr(steps, "PROVIDERS", (BY_NAME["peft"], broken))
    ceilings = machine.Ceilings(1e9, 1e10)
    found = {r["provider"]: r for r in steps.measure(setting(), ("peft", "fastlora"), 0.1, ceilings)}
    assert found["fastlora"]["parity"] is False and "ms" not in found["fastlora"]
    assert found["fastlora"]["why"].startswith("parity is red")
    assert found["peft"]["ms"]["n"] >= 3 and found["peft"]["tokens_per_s"] > 0


def _wrong(model):
    model.base_model.model.model.layers[1].mlp.down_proj.scaling["default"] *= 1.1
    return model


def test_a_provider_is_recorded_before_the_next_is_gated(monkeypatch):
    """What is cut off later keeps the time that was taken alone; at the end the turns' time takes its place."""

    def never(model):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "PROVIDERS", (BY_NAME["peft"], BY_NAME["fastlora"]._replace(after=never)))
    ceilings, found = machine.Ceilings(1e9, 1e10), []
    with pytest.raises(KeyboardInterrupt):
        for line in steps.measure(setting(), ("peft", "fastlora"), 0.1, ceilings):
            found.append(line)
    (line,) = found
    assert line["provider"] == "peft" and line["provisional"] and line["ms"]["n"] >= 1 and line["tokens_per_s"] > 0
    monkeypatch.setattr(steps, "PROVIDERS", (BY_NAME["peft"],))
    first, last = steps.measure(setting(), ("peft",), 0.1, ceilings, rounds=7)
    assert first["provisional"] and "provisional" not in last and last["ms"]["n"] >= 7


def test_a_profiled_step_says_where_its_time_goes():
    *_, line = steps.measure(setting(), ("fastlora",), 0.1, machine.Ceilings(1e9, 1e10), profile=True)
    kernels = {name: n for name, n, _ in line["profile"]["kernels"]}
    assert kernels["fastlora::swiglu_project"] == 2 and kernels["fastlora::lora_gemm"] > 2  # two layers
    assert line["profile"]["busy_ms"] >= line["profile"]["host_ms"] > 0


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_the_plan_foretells_what_a_layer_keeps_for_backward(dtype):
    """To the byte: the difference of two numbers of layers, which leaves out head and loss."""
    kept = {}
    for layers in (2, 3):
        s = setting(dtype, model="mini", layers=layers, sequence=64)
        trainee = training.Trainee(BY_NAME["fastlora"], models.base_model(s.shape, s.dtype, s.device), s)
        line = steps._beside(trainee, batch(s))
        kept[layers] = line["saved_bytes"], line["plan"]["saved_bytes"]
    measured, planned = (kept[3][i] - kept[2][i] for i in range(2))
    assert measured == planned > 0


def test_frozen_weights_are_shared_and_stay():
    s = setting()
    base = models.base_model(s.shape, s.dtype, s.device)
    first, second = (training.Trainee(BY_NAME[name], base, s) for name in ("peft", "fastlora"))
    before = {name: p.clone() for name, p in base.named_parameters()}
    weights = [t.model.base_model.model.lm_head.weight for t in (first, second)]
    assert weights[0] is weights[1] is base.lm_head.weight
    for trainee in (first, second):
        trainee.step(batch(s))
    assert all(torch.equal(before[name], p) for name, p in base.named_parameters())
    assert any(p.grad is not None and p.grad.any() for p in models.adapters(second.model).values())


def test_packed_and_padded_hold_the_same_documents():
    padded, packed = (batch(setting(batch=kind, sequence=200)) for kind in ("padded", "packed"))
    lengths = padded["attention_mask"].sum(1)
    assert lengths.sum() == 400 and lengths.max() == padded["input_ids"].shape[1] <= 100 and len(lengths) > 3
    assert (padded["labels"][padded["attention_mask"] == 0] == -100).all()
    starts = packed["position_ids"] == 0
    assert packed["input_ids"].shape == (1, 400) and starts.sum() == len(lengths)
    assert (packed["labels"][starts] == -100).all()
    assert (packed["position_ids"].diff()[~starts[:, 1:]] == 1).all()
    assert torch.equal(packed["input_ids"][0], padded["input_ids"][padded["attention_mask"] == 1])
    # Σ length² / Σ length: the length of dense rows of as much attention.
    expected = 400, pytest.approx(float(lengths.double().square().sum() / 400))
    assert work(padded) == work(packed) == expected
    assert work(batch(setting(sequence=200))) == (400, 200)


def test_the_flop_formula():
    """32 layers of 7B at 4096: 30.19 GFLOP per token."""
    assert models.shape("7b").flops(1, 4096) == pytest.approx(30.19e9, rel=1e-3)


def test_a_tile_that_fails_is_told_with_the_time(monkeypatch):
    """Another tile, or the composition, has served: what was timed is not what is shipped."""
    monkeypatch.setattr(steps._tiles, "given_up", lambda: ["lora_gemm triton 128×128"])
    lines = list(steps.measure(setting(model="mini", layers=1), ("fastlora",), 0.1, machine.Ceilings(1e9, 1e10)))
    assert all(line["given_up"] == ["lora_gemm triton 128×128"] for line in lines) and len(lines) == 2
    assert not any("unfused" in line for line in lines)


def test_what_is_left_alone_is_told_with_the_time(monkeypatch):
    def another_forward(model):
        """fastlora on a model one of whose layers runs a forward of its own."""
        model = BY_NAME["fastlora"].after(model)
        norm = model.base_model.model.model.layers[1].input_layernorm
        forward = norm.forward
        norm.forward = lambda x: forward(x)
        return model

    monkeypatch.setattr(steps, "PROVIDERS", (BY_NAME["fastlora"]._replace(after=another_forward),))
    *_, line = steps.measure(setting(model="mini"), ("fastlora",), 0.1, machine.Ceilings(1e9, 1e10))
    assert line["ms"] and len(line["unfused"]) == 1 and "forward" in line["unfused"][0], line["unfused"]


def test_a_profile_that_fails_costs_no_time(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no CUPTI")

    monkeypatch.setattr(steps.profiling, "profile", fails)
    *_, line = steps.measure(setting(), ("peft",), 0.1, machine.Ceilings(1e9, 1e10), profile=True)
    assert line["ms"]["n"] >= 3 and line["no_profile"] == "RuntimeError: no CUPTI"
