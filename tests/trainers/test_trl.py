"""TRL's trainers over a patched model. TRL 1.15 and later compute the loss with a head of their own: the layers are ours."""

from __future__ import annotations

import copy

import pytest
from datasets import Dataset
from patching.tiny import row
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import fastlora
from fastlora.cli.chat import training_template
from fastlora.integrations import FastLoraCallback

from .curves import STEPS, judge, llama
from .test_hf_trainer import recording, rows

COMMON = {
    "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_steps": STEPS, "report_to": "none",
    "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "bf16": False,
    "gradient_checkpointing": False, "dataloader_pin_memory": False, "per_device_train_batch_size": 4,
}  # fmt: skip


def counting() -> Dataset:
    """Rows of token ids whose first two are the prompt."""
    ids = [one["input_ids"] for one in rows(64)]
    return Dataset.from_dict({"input_ids": ids, "completion_mask": [[0, 0, *[1] * (len(one) - 2)] for one in ids]})


def sft(path, tokenizer, data, **options):
    def run(model, exact, made):
        own = {**options, "bf16": False} if exact else options
        arguments = SFTConfig(output_dir=str(path), **{**COMMON, "max_length": 32, **own})
        found = recording(SFTTrainer)(model, arguments, train_dataset=data, processing_class=tokenizer)
        made(found.model)
        found.train()
        return found.losses()

    return run


SFT = {
    "completion only": {"completion_only_loss": True},
    "packing": {"packing": True},
    "padding-free, bf16": {"padding_free": True, "max_length": None, "bf16": True},
}


@pytest.fixture(scope="module")
def padded(tokenizer, tmp_path_factory):
    return sft(tmp_path_factory.mktemp("padded"), tokenizer, counting(), completion_only_loss=True)


@pytest.mark.parametrize("name", SFT)
def test_sft(name, padded, tmp_path, tokenizer, record_property):
    """Float64 trains padding-free rows padded; packing draws other batches."""
    exact = None if name == "packing" else padded
    model, figures = judge(sft(tmp_path, tokenizer, counting(), **SFT[name]), exact=exact)
    record_property("figures", figures)
    assert_layers_fused(model)
    assert row(model, ".self_attn.attention").fused == STEPS, "padded or packed"


def test_sft_on_the_answers_of_a_chat(tmp_path, tokenizer, rows_file, record_property):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = training_template(chat, answers_only=True)
    data = Dataset.from_json(str(rows_file))
    model, figures = judge(sft(tmp_path, chat, data, assistant_only_loss=True, max_length=64))
    record_property("figures", figures)
    assert_layers_fused(model)


def assert_layers_fused(model):
    head, *others = fastlora.explain(model).rows
    assert "trl" in head.why
    assert [r for r in others if r.why or r.passed] == []
    assert all(r.fused for r in others if not r.path.endswith(".attention"))


def adapters_of_the_trainer(model):
    """The trainer adds them: the reference is the model without."""
    return model


def peft_config() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def dpo(path, tokenizer, **options):
    words = ["one", "two", "three", "four", "five", "six"]
    columns = {
        "prompt": [f"What comes after {word}?" for word in words[:-1]] * 8,
        "chosen": [f" {word}" for word in words[1:]] * 8,
        "rejected": [f" {word} {word}" for word in words[:-1]] * 8,
    }

    def run(model, exact, made):
        own = {**options, "bf16": False} if exact else options
        arguments = DPOConfig(output_dir=str(path), **{**COMMON, "max_length": 64, **own})
        found = recording(DPOTrainer)(
            model, args=arguments, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer,
            peft_config=None if hasattr(model, "peft_config") else peft_config(),
        )  # fmt: skip
        made(found.model)
        found.train()
        return found.losses()

    return run


@pytest.mark.parametrize("reference", ["the base without adapters", "a copy of the adapter"])
def test_dpo(reference, tmp_path, tokenizer, record_property):
    case = dpo(tmp_path, tokenizer)
    if reference == "a copy of the adapter":
        model, figures = judge(case, places=("adapters", "trainer"), runs=1)
    else:
        model, figures = judge(case, attach=adapters_of_the_trainer, places=("base", "trainer"), runs=1)
    record_property("figures", figures)
    assert_layers_fused(model)


def grpo(path, tokenizer):
    """Every run generates; all are trained on what the first, unpatched, generated: a rounding may change a token."""
    recorded: list[list[list[int]]] = []

    class Recorded(GRPOTrainer):
        turns = 0

        def _generate_single_turn(self, *args, **kwargs):
            completions, logprobs = super()._generate_single_turn(*args, **kwargs)
            if self.turns == len(recorded):
                recorded.append(completions)
            self.turns += 1
            return recorded[self.turns - 1], logprobs

    def reward(completion_ids, **kwargs):
        return [sum(token % 7 for token in ids) / len(ids) for ids in completion_ids]

    def run(model, exact, made):
        arguments = GRPOConfig(
            output_dir=str(path), num_generations=4, max_completion_length=6, beta=0.1, **COMMON,
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": ["What is one plus two?", "Count:", "Say something."] * 20})
        found = recording(Recorded)(
            model, reward_funcs=reward, args=arguments, train_dataset=data, processing_class=tokenizer,
            peft_config=peft_config(),
        )  # fmt: skip
        made(found.model)
        found.train()
        assert found.turns == STEPS
        return found.losses()

    return run


def test_grpo(tmp_path, tokenizer, record_property):
    case = grpo(tmp_path, tokenizer)
    model, figures = judge(case, attach=adapters_of_the_trainer, places=("base", "trainer"), runs=1)
    record_property("figures", figures)
    assert_layers_fused(model)
    assert row(model, "layers.0.mlp.up_proj").fused > 3 * STEPS, "generation, reference, policy"


def test_callback(tmp_path, tokenizer, capsys):
    """Patches the trainer's model before TRL replaces its forward."""
    arguments = SFTConfig(output_dir=str(tmp_path), **COMMON)
    trainer = SFTTrainer(
        llama(0), arguments, train_dataset=counting(), processing_class=tokenizer, peft_config=peft_config(),
        callbacks=[FastLoraCallback(strict=True)],
    )  # fmt: skip
    trainer.train()
    assert_layers_fused(trainer.model)
    said = capsys.readouterr().out
    assert "fastlora: 27 of 28 modules are fused" in said
    assert "forward was replaced on the instance (by trl" in said
