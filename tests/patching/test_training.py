"""Trainer, accelerate, torch.compile and threads over a patched model."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import peft
import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from transformers import Trainer, TrainingArguments

import fastlora
from fastlora.kernels import _cache, _tiles
from fastlora.modules.lazy_logits import Product

from .tiny import (
    VOCAB,
    Errors,
    InFloat64,
    assert_fused,
    assert_same,
    batch,
    in_float64,
    judge,
    llama,
    lora,
    row,
    step,
)  # fmt: skip

ROWS = [{name: t[i] for name, t in batch(seed).items()} for seed in range(4) for i in range(3)]


class Recorder(Trainer):
    """Keeps every loss as it was, unrounded."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.detach()]
        return loss


def trainer(model: nn.Module, path, **options) -> Recorder:
    arguments = TrainingArguments(
        output_dir=str(path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, optim="sgd",
        learning_rate=0.05, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    return Recorder(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:4])


@pytest.mark.parametrize("build", [llama, lambda seed: lora(llama(seed))], ids=["full", "lora"])
def test_trainer(build, tmp_path, monkeypatch):
    """Losses of every micro-batch and the trained weights, under gradient accumulation; logits are never computed."""

    def train(model):
        run = trainer(model, tmp_path)
        run.train()
        trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        return {f"loss {i}": loss for i, loss in enumerate(run.losses)} | trained

    def untouched(self):
        raise AssertionError("logits were computed in training")

    errors = Errors()
    for seed in range(2):
        eager = train(build(seed))
        exact = build(seed).double()
        with InFloat64():
            truth = train(exact)
        model = fastlora.patch(build(seed))
        with monkeypatch.context() as patch:
            patch.setattr(Product, "compute", untouched)
            ours = train(model)
        assert len([name for name in ours if name.startswith("loss")]) == 6
        errors.add(ours, eager, truth, torch.float32)
    errors.check()
    assert_fused(model, calls=6)


@pytest.mark.parametrize("build", [llama, lambda seed: lora(llama(seed))], ids=["full", "lora"])
def test_evaluate(build, tmp_path):
    """Evaluation has real logits, all its columns, and the unpatched loss."""

    def run(model, seed):
        found = trainer(model, tmp_path).predict(ROWS[:4])
        assert found.predictions.shape == (4, 13, VOCAB)
        loss = torch.tensor(found.metrics["test_loss"], dtype=model.dtype)
        return {"logits": torch.tensor(found.predictions), "loss": loss}

    judge(build, run, head=False)


@pytest.mark.parametrize("build", [llama, lambda: lora(llama())], ids=["full", "lora"])
def test_mixed_precision_trainer(build, tmp_path, monkeypatch):
    """Accelerate keeps a wrapped forward on the instance, which outlives unpatch and must go on to work."""
    monkeypatch.setattr(Product, "compute", None)
    model = fastlora.patch(build())
    run = trainer(model, tmp_path, bf16=True)
    run.train()
    assert row(model, "layers.0.mlp.up_proj").fused == 6
    assert torch.stack(run.losses).isfinite().all()
    assert "forward" in vars(model)
    fastlora.unpatch(model)
    other = build()
    other.load_state_dict(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        expected = other.train()(**batch()).loss
    assert torch.equal(model.train()(**batch()).loss, expected)


def test_trainer_checkpoints(tmp_path):
    """Gradient checkpointing, as the Trainer switches it on."""
    model = fastlora.patch(lora(llama()))
    run = trainer(model, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    run.train()
    plain = trainer(fastlora.patch(lora(llama())), tmp_path)
    plain.train()
    assert run.losses == plain.losses
    assert row(model, "layers.0.mlp").fused == 12


@pytest.mark.filterwarnings("ignore")
def test_compile(monkeypatch):
    """One graph of packed sequences, forward and backward, with our operators in it; compiled once for 8 batches.

    On a GPU, too, where a choice depends on what was measured: a compiler must not trace the reading of files.
    """
    operators, read = set(), []

    def measured(call):
        read.append(_cache.entries(_cache.environment(call.device, 80)).get(_cache.key(call)))

    monkeypatch.setattr(_tiles, "_measured", measured)

    def collect(graph, inputs):
        operators.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def run(model, seed):
        positions = torch.cat([torch.arange(5), torch.arange(8)]).repeat(3, 1)
        options = {"use_cache": False, "position_ids": positions}
        return {f"{name} {i}": t for i in range(8) for name, t in step(model, i, **options).items()}

    def compiled(model, seed):
        torch.compiler.reset()
        model.compile(backend=aot_autograd(fw_compiler=collect), fullgraph=True)
        return run(model, seed)

    model = lora(llama(num_hidden_layers=1))
    errors, truth, eager = Errors(), in_float64(model, run, 0), run(model, 0)
    errors.add(compiled(fastlora.patch(model), 0), eager, truth, torch.float32)
    errors.check()
    assert any("fastlora" in name for name in operators)
    assert read


def test_two_models_that_train_in_two_threads_at_once():
    """Each gives what it gives alone: one in bf16, one in fp32, in steps long enough that csrc splits its work in two."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 128}

    def train(model, started):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        found = []
        started.wait(60)
        for i in range(8):
            found.append(model(**batch(i, rows=4, tokens=128)).loss)
            found[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.get_num_threads() == 2
        losses = {f"loss {i}": loss.detach() for i, loss in enumerate(found)}
        return losses | peft.get_peft_model_state_dict(model), fastlora.explain(model)

    dtypes = (torch.bfloat16, torch.float32)
    models = [fastlora.patch(lora(llama(seed, dtype=dtype, **sizes))).train() for seed, dtype in enumerate(dtypes)]
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(2) as threads:
            alone = [threads.submit(train, model, Barrier(1)).result() for model in copy.deepcopy(models)]
            both = Barrier(2)
            together = [one.result() for one in [threads.submit(train, model, both) for model in models]]
    finally:
        torch.set_num_threads(1)
    for (ours, plan), (theirs, other) in zip(together, alone, strict=True):
        assert plan == other
        assert_same(ours, theirs)
