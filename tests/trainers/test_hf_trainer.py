"""transformers' Trainer over a patched model."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from patching.tiny import assert_fused, row
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

import fastlora
from fastlora.integrations import FastLoraCallback

from .curves import PLACES, STEPS, judge, llama, lora, train
from .options import OPTIONS, assert_taken

VOCAB = 300


def rows(count: int = 4 * STEPS, longest: int = 14) -> list[dict[str, list[int]]]:
    """Token ids with something to learn: each row counts up from a random start. Lengths differ."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(3, 40, (count,), generator=generator).tolist()
    lengths = torch.randint(5, longest, (count,), generator=generator).tolist()
    made = [list(range(start, start + length)) for start, length in zip(starts, lengths)]
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in made]


def pad(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(one["input_ids"]) for one in features)

    def padded(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([one[name] + [filler] * (width - len(one[name])) for one in features])

    ids = padded("input_ids", 0)
    return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": (ids != 0).long()}


def recording(cls: type) -> type:
    """The trainer class, keeping the loss of every optimizer step, unrounded."""

    class Recorder(cls):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.micro = [*getattr(self, "micro", []), loss.detach()]
            return loss

        def losses(self):
            steps = self.args.gradient_accumulation_steps
            return [torch.stack(self.micro[i : i + steps]).sum() for i in range(0, len(self.micro), steps)]

    return Recorder


def trainer(model, path, *, collate=pad, callbacks=None, **options):
    options = {"per_device_train_batch_size": 4, "save_strategy": "no", "max_steps": STEPS, **options}
    arguments = TrainingArguments(
        output_dir=str(path), optim="sgd", learning_rate=0.05, lr_scheduler_type="constant", report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return recording(Trainer)(model, arguments, train_dataset=rows(), data_collator=collate, callbacks=callbacks)


def case(path, **options):
    def run(model, exact, made):
        own = {**options, "bf16": False} if exact else options
        found = trainer(model, path, **own)
        made(found.model)
        found.train()
        return found.losses()

    return run


GROUPED = (
    {"group_by_length": True}
    if transformers.__version__.startswith("4.")
    else {"train_sampling_strategy": "group_by_length"}
)
CASES = {
    "plain": {},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "group by length": GROUPED,
    "bf16": {"bf16": True},
}
HALVES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Padded batches of four: in float64 the truth of every form of it."""
    return case(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", CASES)
def test_training(name, plain, tmp_path, record_property):
    exact = plain if name in ("plain", "bf16") else None
    model, figures = judge(case(tmp_path, **CASES[name]), exact=exact)
    record_property("figures", figures)
    assert_fused(model, head=name != "label smoothing")


def test_accumulated_micro_batches_equal_one_batch(plain, tmp_path, record_property):
    """Float64 trains on the whole batch at once."""
    model, figures = judge(case(tmp_path, **HALVES), exact=plain)
    record_property("figures", figures)
    assert_fused(model, calls=2 * STEPS)


def test_packed_equals_padded(plain, tmp_path, record_property):
    """Float64 trains on padded rows; DataCollatorWithFlattening makes one row of several, told apart by position_ids."""
    model, figures = judge(case(tmp_path, collate=DataCollatorWithFlattening()), exact=plain)
    record_property("figures", figures)
    assert_fused(model)
    assert row(model, ".self_attn.attention").fused == STEPS


def test_gradient_checkpointing(plain, tmp_path, record_property):
    """Float64 stores: what computes for it in float64 does not see the second pass."""
    model, figures = judge(case(tmp_path, gradient_checkpointing=True), exact=plain)
    record_property("figures", figures)
    assert_fused(model, head=True)
    assert row(model, "layers.0.mlp").fused == 2 * STEPS


def test_bf16_base(plain, tmp_path, record_property):
    """bf16 weights, fp32 adapters, autocast: what most people train."""
    model, figures = judge(case(tmp_path, bf16=True), exact=plain, dtype=torch.bfloat16)
    record_property("figures", figures)
    assert_fused(model)


def test_predictions_are_those_of_a_model_patched_elsewhere(tmp_path):
    """To the bit; how exact they are is tests/patching's to say."""
    found = []
    for place in PLACES:
        base = llama(0)
        model = lora(fastlora.patch(base) if place == "base" else base)
        if place == "adapters":
            fastlora.patch(model)
        run = trainer(model, tmp_path)
        if place == "trainer":
            fastlora.patch(run.model)
        found.append(run.predict(rows(8)))
        assert_fused(run.model, head=False)
    assert found[0].predictions.shape[0] == 8
    for other in found[1:]:
        assert (other.predictions == found[0].predictions).all()
        assert other.metrics["test_loss"] == found[0].metrics["test_loss"]


@pytest.mark.parametrize("place", PLACES)
def test_resumed_equals_uninterrupted(place, tmp_path):
    """To the bit: losses and adapters of the steps after the checkpoint, dropout and all."""
    runs = []

    def run(model, exact, made):
        found = trainer(model, tmp_path, save_strategy="steps", save_steps=6)
        made(found.model)
        found.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6") if runs else None)
        runs.append(found)
        return runs[0].losses()

    def start():
        return train(run, 0, place, attach=functools.partial(lora, lora_dropout=0.1))

    whole, resumed = start(), start()
    assert len(runs[1].micro) == STEPS - 6
    assert runs[1].micro == runs[0].micro[6:]
    assert all(torch.equal(resumed.adapters[name], weight) for name, weight in whole.adapters.items())
    assert_fused(resumed.model, calls=STEPS - 6)


@pytest.mark.parametrize("when", ["given", "added", "model_init"])
def test_callback(when, tmp_path, capsys):
    """Patches a trainer's model, and prints what is fused."""
    callback = FastLoraCallback(strict=True)
    model = lora(llama(0))
    run = trainer(model, tmp_path, callbacks=[callback] if when == "given" else None)
    assert any(r.why != "not patched" for r in fastlora.explain(model).rows) == (when == "given")
    if when != "given":
        run.add_callback(callback)
    if when == "model_init":
        run.model_init = lambda: lora(llama(0))
    run.train()
    assert (run.model is model) == (when != "model_init")
    assert_fused(run.model, calls=STEPS)
    assert "fastlora: 28 of 28 modules are fused" in capsys.readouterr().out


def test_callback_takes_what_patch_takes(tmp_path):
    model = lora(llama(0))
    trainer(model, tmp_path, callbacks=[FastLoraCallback(**OPTIONS)])
    assert_taken(model)
    with pytest.raises(ValueError, match="ops has"):
        FastLoraCallback(ops=["rmsnorm"])
    with pytest.raises(ValueError, match="memory is 'quick'"):
        trainer(model, tmp_path, callbacks=[FastLoraCallback(memory="quick")])


def test_callback_is_strict(tmp_path):
    model = lora(llama(0, hidden_act="gelu"))
    with pytest.raises(fastlora.NotFused, match="gelu"):
        trainer(model, tmp_path, callbacks=[FastLoraCallback(strict=True)])
