"""A patched model gives the unpatched model's loss, logits and gradients, no less exactly."""

import pytest
import torch

import fastlora

from .tiny import (
    MANY,
    Errors,
    assert_fused,
    assert_same,
    batch,
    gradients,
    in_float64,
    judge,
    llama,
    lora,
    padded_step,
    row,
    step,
)  # fmt: skip

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def heads(seed: int) -> int:
    """Multi-head, grouped and multi-query attention in turn."""
    return (4, 2, 1)[seed % 3]


@DTYPES
def test_lora(dtype):
    """bf16 bases have fp32 adapters, as PEFT makes them."""
    model = judge(lambda seed: lora(llama(seed, dtype=dtype, kv_heads=heads(seed))), seeds=MANY)
    assert_fused(model, calls=1)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora" in n)


@DTYPES
def test_full_fine_tuning(dtype):
    """Every weight trains: embeddings, norms, and the head, whether it is the embedding or not."""

    def build(seed):
        return llama(seed, dtype=dtype, kv_heads=heads(seed), tie_word_embeddings=seed % 2 == 0)

    judge(build, seeds=MANY)
    for seed in range(2):
        names = step(fastlora.patch(build(seed))).keys()
        assert {"model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"} < set(names)
        assert ("lm_head.weight" in names) is (seed == 1)


def test_bf16_adapters():
    model = judge(lambda seed: lora(llama(seed, dtype=torch.bfloat16), autocast=False), seeds=MANY)
    assert next(p for n, p in model.named_parameters() if "lora_A" in n).dtype == torch.bfloat16


def test_biases():
    """bias="all" trains the base's biases beside the adapters."""
    model = judge(lambda seed: lora(llama(seed, attention_bias=True, mlp_bias=True), bias="all"), seeds=MANY)
    assert any(name.endswith("base_layer.bias") for name in step(model))


@pytest.mark.parametrize("build", [llama, lambda seed: lora(llama(seed))], ids=["full", "lora"])
def test_autocast(build):
    """fp32 weights and adapters under bf16 autocast."""

    def run(model, seed):
        with torch.autocast("cpu", torch.bfloat16):
            return step(model, seed)

    errors = Errors()
    for seed in range(MANY):
        model = build(seed)
        truth, eager = in_float64(model, step, seed), run(model, seed)
        errors.add(run(fastlora.patch(model), seed), eager, truth, torch.bfloat16)
    errors.check()
    assert_fused(model, calls=1)


def test_rslora_and_patterns():
    """Other scalings and ranks are plain LoRA."""
    patterns = {"rank_pattern": {"q_proj": 7, "down_proj": 1}, "alpha_pattern": {"up_proj": 3}}
    model = judge(lambda seed: lora(llama(seed), use_rslora=True, **patterns))
    assert "r=7" in row(model, "q_proj").runs
    assert "r=1" in row(model, "down_proj").runs


def test_dora():
    model = judge(lambda seed: lora(llama(seed, attention_bias=True), use_dora=True), seeds=MANY)
    assert any("magnitude" in name for name in step(model))


def test_adapters_on_some_projections():
    """PEFT's default for Llama adapts q and v; the others have no adapter, and explain says so."""
    model = judge(lambda seed: lora(llama(seed), target_modules=["q_proj", "v_proj", "up_proj"]))
    assert "r=4" in row(model, "v_proj").runs
    assert "no adapter" in row(model, "k_proj").runs
    assert "no adapter" in row(model, "down_proj").runs


RUNS = {
    "flash_attention": {".attention"},
    "linear_cross_entropy": {"base_model.model"},
    "lora_linear": {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")},
    "rms_norm": {"norm", "layernorm"},
    "rope": {"self_attn"},
    "swiglu": {"mlp"},
}


@pytest.mark.parametrize(
    "chosen",
    [(), *((op,) for op in RUNS), ("rope", "swiglu"), ("rms_norm", "lora_linear"), ("swiglu", "lora_linear")],
    ids="+".join,
)
def test_subsets_of_ops(chosen):
    """Only the chosen ops run, alone or together, and the results are the same."""
    model = judge(lambda seed: lora(llama(seed)), padded_step, ops=chosen, whole=False)
    for op, places in RUNS.items():
        rows = [r for r in fastlora.explain(model).rows if r.path.endswith(tuple(places))]
        assert rows or op not in chosen
        assert all((r.fused > 0) == (op in chosen) for r in rows), op


def test_one_op_by_name():
    one, same = fastlora.patch(lora(llama()), ops="rms_norm"), fastlora.patch(lora(llama()), ops=["rms_norm"])
    assert_same(step(one), step(same))
    assert fastlora.explain(one) == fastlora.explain(same)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_patched_before_or_after_peft(task_type):
    before = lora(fastlora.patch(llama()), task_type=task_type)
    after = fastlora.patch(lora(llama(), task_type=task_type))
    assert_same(step(before), step(after))
    assert fastlora.explain(before) == fastlora.explain(after)
    assert_fused(before, calls=1)


def test_two_steps_are_the_same():
    """Nothing is kept from one step to the next, and no saved tensor is overwritten."""
    model = fastlora.patch(lora(llama()))
    assert_same(step(model), step(model))


def test_retained_graph():
    """A second backward through the same graph gives the same gradients again."""
    model = fastlora.patch(lora(llama()).train())
    outputs = model(**batch())
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(outputs.loss, parameters, retain_graph=True)
    second = torch.autograd.grad(outputs.loss, parameters)
    assert all(map(torch.equal, first, second))


def test_accumulated_gradients():
    """Backward passes add up, as they do unpatched."""

    def run(model, seed):
        model.train().zero_grad()
        for part in (seed, seed + 100):
            (model(**batch(part)).loss / 2).backward()
        return gradients(model)

    judge(lambda seed: lora(llama(seed)), run)


@pytest.mark.parametrize("part", ["q_proj.lora_A", "down_proj.lora_B", "up_proj.base_layer", "input_layernorm"])
def test_the_judge_notices(part):
    """A weight that is off by one part in ten thousand breaks the budget."""

    def run(model, seed):
        if any(r.why != "not patched" for r in fastlora.explain(model).rows):
            next(p for n, p in model.named_parameters() if part in n).data.mul_(1 + 1e-4)
        return step(model, seed)

    with pytest.raises(AssertionError, match="error"):
        judge(lambda seed: lora(llama(seed)), run)
