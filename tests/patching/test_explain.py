"""explain: every module, what runs there, why not ours, and how often."""

import json

import fastlora

from .tiny import batch, llama, lora, padded_step, row, step

PROJECTIONS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
LAYERS = [f"model.layers.{i}" for i in range(2)]


def counts(model) -> dict[str, tuple[int, int]]:
    """Fused and passed calls by path; not of the attention kernel, which SDPA's may stand in for."""
    return {r.path: (r.fused, r.passed) for r in fastlora.explain(model).rows if not r.path.endswith(".attention")}


def test_rows_cover_the_model():
    rows = [r.path for r in fastlora.explain(fastlora.patch(lora(llama()))).rows]
    expected = [f"{layer}.{name}" for layer in LAYERS for name in (*PROJECTIONS, "input_layernorm", "self_attn", "mlp")]
    assert {f"base_model.model.{path}" for path in (*expected, "model.norm")} <= set(rows)
    assert "base_model.model" in rows, "the loss"
    assert len(rows) == len(set(rows))


def test_counters():
    """Two training steps and one evaluation: layers ran three times, the fused loss twice."""
    model = fastlora.patch(lora(llama()))
    assert set(counts(model).values()) == {(0, 0)}
    step(model), step(model)
    model.eval()(**batch())
    found = counts(model)
    assert found.pop("base_model.model") == (2, 0)
    assert set(found.values()) == {(3, 0)}


def test_counters_of_what_is_passed():
    """A projection that goes its own way is counted as passed; its neighbours as fused."""
    model = lora(llama())
    model.base_model.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *a: None)
    fastlora.patch(model)
    step(model), step(model)
    found = counts(model)
    up = "base_model.model.model.layers.0.mlp.up_proj"
    assert found.pop(up) == (0, 2)
    assert set(found.values()) == {(2, 0)}
    assert [r.path for r in fastlora.explain(model).unfused] == [up]
    assert row(model, "layers.0.mlp.up_proj").why == "hooks on the Linear"


def test_reasons_before_a_call():
    """A plan is there before anything ran."""
    model = lora(llama())
    for layer in model.base_model.model.model.layers:
        layer.self_attn.v_proj.register_forward_pre_hook(lambda *a: None)
    plan = fastlora.explain(fastlora.patch(model))
    assert [r.path.removeprefix("base_model.model.") for r in plan.unfused] == [f"{x}.self_attn.v_proj" for x in LAYERS]
    assert all(r.why == "hooks on the Linear" and (r.fused, r.passed) == (0, 0) for r in plan.unfused)


def test_not_patched():
    plan = fastlora.explain(llama())
    assert len(plan.rows) >= 10
    assert plan.unfused == plan.rows
    assert {r.why for r in plan.rows} == {"not patched"}
    assert all("transformers" in r.runs for r in plan.rows)


def test_json():
    model = fastlora.patch(lora(llama(), use_dora=True, lora_dropout=0.1))
    step(model)
    plan = fastlora.explain(model)
    again = json.loads(json.dumps(plan.to_dict()))
    assert again["backend"] == plan.backend
    assert [fastlora.patching.Row(**r) for r in again["rows"]] == list(plan.rows)


def test_table_groups_layers():
    """One line for what is the same in every layer, calls added up; an odd layer has its own."""
    model = lora(llama(num_hidden_layers=4))
    model.base_model.model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *a: None)
    fastlora.patch(model)
    step(model)
    lines = str(fastlora.explain(model)).splitlines()

    def line(path: str) -> list[str]:
        (found,) = [text for text in lines if text.startswith(f"base_model.model.model.{path} ")]
        return found.split()

    assert "4" in line("layers.0-3.mlp.gate_proj")
    assert "3" in line("layers.0,2-3.mlp.up_proj")
    assert line("layers.1.mlp.up_proj")[-4:] == ["hooks", "on", "the", "Linear"]
    assert lines[-1] == fastlora.explain(model).backend
    assert not any(text.startswith("base_model.model.model.layers.0.") for text in lines)


def test_attention_is_named():
    """Which attention runs is part of the picture."""
    assert "eager" in str(fastlora.explain(fastlora.patch(llama(attention="eager"))))


def test_attention_is_counted():
    model = fastlora.patch(lora(llama()))
    padded_step(model), padded_step(model)
    assert (row(model, ".self_attn.attention").fused, row(model, ".self_attn.attention").passed) == (2, 0)
