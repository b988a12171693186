"""The examples, as they stand, on a tiny model; and scripts that fastlora.run starts."""

from __future__ import annotations

import copy
import json
import os
import re
import runpy
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from patching.tiny import row
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

import fastlora
from fastlora.cli.chat import llama2_template
from fastlora.run import main as fastlora_run

from .curves import llama
from .options import OPS

ROOT = Path(__file__).parents[2]
STEPS = 3


def chats(count: int):
    return [f"{a} plus {b} is {a + b}." for a in range(count) for b in range(4)]


DATA = {
    "plain_loop": [{"text": text} for text in chats(4)],
    "hf_trainer": [{"text": text} for text in chats(4)],
    "trl_sft": [
        {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": text}]}
        for text in chats(8)
    ],
    "qlora": [
        {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": text}]}
        for text in chats(4)
    ],
    "trl_dpo": [{"prompt": "Say it.", "chosen": f" {text}", "rejected": " No."} for text in chats(4)],
}


@pytest.fixture(scope="module")
def chat_dir(tokenizer, tmp_path_factory):
    """A tiny model with heads as wide as our attention wants them, and a tokenizer with a chat template."""
    path = tmp_path_factory.mktemp("chat")
    llama(0, vocab_size=len(tokenizer)).save_pretrained(path)
    own = copy.deepcopy(tokenizer)
    own.chat_template = llama2_template()
    own.save_pretrained(path)
    return path


@pytest.fixture
def rows(tmp_path):
    def write(name: str) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in DATA[name]))
        return str(path)

    return write


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DATA)
def test_example(name, rows, chat_dir, tmp_path, monkeypatch, capsys):
    """It trains, everything fused, and saves a plain adapter."""
    out = tmp_path / "adapter"
    script = str(ROOT / "examples" / f"{name}.py")
    arguments = ["--model", str(chat_dir), "--data", rows(name), "--out", str(out), "--steps", str(STEPS)]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    ran = runpy.run_path(script, run_name="__main__")
    model = ran["trainer"].model if "trainer" in ran else ran["model"]
    others = [r for r in fastlora.explain(model).rows if r.path != "base_model.model"]
    assert [r for r in others if r.why or r.passed] == []
    assert row(model, "layers.0.mlp.up_proj").fused >= STEPS
    assert "fused calls" in capsys.readouterr().out
    assert (out / "adapter_model.safetensors").exists()
    assert "fastlora" not in (out / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    ("base", "runs"),
    [
        (["--bf16", "False"], "fastlora lora, r=16"),
        (["--bf16", "True", "--load_in_4bit"], "fastlora lora over a 4-bit weight, r=16"),
    ],
    ids=["dense", "4 bits"],
)
def test_run_on_trls_own_script(base, runs, rows, chat_dir, tmp_path, monkeypatch, capfd):
    """Nothing of it is edited: TRL builds the model from its name. The plan first, then counters that say what ran."""
    before = dict(vars(LlamaPreTrainedModel))
    out = tmp_path / "adapter"
    data = Path(rows("trl_sft")).parent
    monkeypatch.setattr(sys, "argv", sys.argv)
    fastlora_run([
        "-m", "trl.scripts.sft", "--model_name_or_path", str(chat_dir), "--dataset_name", str(data), "--output_dir", str(out),
        "--use_peft", "--lora_target_modules", "all-linear", "--max_steps", str(STEPS), "--packing", "--max_length", "64",
        "--use_cpu", "--report_to", "none", "--per_device_train_batch_size", "2",
        *base,
    ])  # fmt: skip
    assert dict(vars(LlamaPreTrainedModel)) == before
    plan, counters = tables(capfd.readouterr().err)
    assert runs in plan and runs in counters
    assert fused(plan, "mlp.up_proj") == 0
    for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.attention"):
        assert fused(counters, path) >= 2 * STEPS, path
    assert "forward was replaced on the instance (by trl" in counters
    assert (out / "adapter_model.safetensors").exists()


def tables(text: str) -> list[str]:
    """What fastlora printed: one table per time."""
    return text.split("fastlora: LlamaForCausalLM\n")[1:]


def fused(table: str, path: str) -> int:
    """The fused calls of the line whose path ends so."""
    (line,) = [line for line in table.splitlines() if line.split("  ")[0].endswith(path)]
    return int(re.search(r"  (\d+)  ", line)[1])


SCRIPT = """
import os, sys

assert not {"torch", "transformers"} & set(sys.modules), "the environment is the script's to set first"
assert __name__ == "__main__" and sys.argv[1:] == ["--flag", "value"], (__name__, sys.argv)
assert sys.path[0] == os.path.dirname(os.path.abspath(__file__)), sys.path
import beside  # a module in the script's directory
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

def main():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, hidden_size=64, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=1))
    model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    for _ in range(4):
        model(input_ids=torch.arange(10).view(2, 5), labels=torch.arange(10).view(2, 5)).loss.backward()
    raise SystemExit(beside.STATUS)

main()
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("STATUS = 0\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield str(path)
    for number, handler in handlers.items():  # torchrun leaves its own
        signal.signal(number, handler)


def test_run_under_torchrun(script, capfd):
    """What the model did is known after the script dropped it."""
    from torch.distributed.run import main

    options = ["--memory", "lean", "--strict"]
    main(["--standalone", "--nproc_per_node", "1", "-m", "fastlora.run", *options, script, "--flag", "value"])
    plan, counters = tables(capfd.readouterr().err)
    assert (fused(plan, "mlp.up_proj"), fused(counters, "mlp.up_proj")) == (0, 8), "computed again in backward"


def test_run_under_accelerate(script, capfd):
    from accelerate.commands.launch import launch_command, launch_command_parser

    options = [
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    launch_command(launch_command_parser().parse_args([*options, "-m", "fastlora.run", script, "--flag", "value"]))
    plan, counters = tables(capfd.readouterr().err)
    assert (fused(plan, "mlp.up_proj"), fused(counters, "mlp.up_proj")) == (0, 4)


def test_run_sees_models_of_every_kind_and_their_copies(tmp_path, monkeypatch, capsys):
    """A reward model, a deep copy, an unpickled copy: each runs fused, and none knows of fastlora.run afterwards."""
    path = tmp_path / "rewards.py"
    path.write_text(
        "import copy, pickle, torch\n"
        "from transformers import LlamaConfig, LlamaForSequenceClassification\n"
        "config = LlamaConfig(vocab_size=11, hidden_size=64, intermediate_size=16, num_hidden_layers=1, num_labels=1,\n"
        "                     num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)\n"
        "model = LlamaForSequenceClassification(config).train()\n"
        "models = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]\n"
        "for one in models:\n"
        "    one(input_ids=torch.arange(10).view(2, 5)).logits.sum().backward()\n"
    )
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    kept = []
    monkeypatch.setattr(
        runpy, "run_path", lambda *args, run=runpy.run_path, **kwargs: kept.append(run(*args, **kwargs))
    )
    fastlora_run([str(path)])
    for model in kept[0]["models"]:
        assert row(model, "layers.0.mlp.up_proj").fused == 1
        assert not model.base_model._forward_pre_hooks
    said = capsys.readouterr().err
    assert said.count("fastlora: LlamaForSequenceClassification") == 2
    assert said.count("fastlora: LlamaModel") == 2 * 2
    assert "LlamaForCausalLM" not in said


HOOKED = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=11, hidden_size=64, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
{obstacle}
model(input_ids=torch.arange(10).view(2, 5), labels=torch.arange(10).view(2, 5)).loss.backward()
"""
OBSTACLES = {
    "a hook": "model.get_submodule('base_model.model.model.layers.0.mlp.up_proj').register_forward_hook(print)",
    "a loss of another library": "model.base_model.model.forward = model.base_model.model.forward",
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("ops", [[], ["--ops", OPS]], ids=["all", "without the loss"])
def test_run_strict(obstacle, ops, tmp_path, monkeypatch, capsys):
    """The script ends at its first step, with the reason, unless what is not fused was not chosen."""
    path = tmp_path / "hooked.py"
    path.write_text(HOOKED.format(obstacle=OBSTACLES[obstacle]))
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    fails = obstacle == "a hook" or not ops
    reason = "up_proj: hooks on the Linear" if obstacle == "a hook" else "forward was replaced on the instance"
    with pytest.raises(fastlora.NotFused, match=reason) if fails else nullcontext():
        fastlora_run([*ops, "--strict", str(path)])
    _, counters = tables(capsys.readouterr().err)
    assert fused(counters, "mlp.gate_proj") == (not fails)
    fastlora_run([*ops, str(path)])


def test_run_strict_wants_a_llama(tmp_path, monkeypatch):
    path = tmp_path / "empty.py"
    path.write_text("")
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    fastlora_run([str(path)])
    with pytest.raises(SystemExit, match="the script built no Llama model"):
        fastlora_run(["--strict", str(path)])


@pytest.mark.parametrize(
    ("options", "message"), [(["--ops", "rmsnorm"], "ops has"), (["--memory", "quick"], "memory is 'quick'")]
)
def test_run_takes_what_patch_takes(options, message, tmp_path, monkeypatch):
    path = tmp_path / "hooked.py"
    path.write_text(HOOKED.format(obstacle=""))
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ValueError, match=message):
        fastlora_run([*options, str(path)])


def test_run_says_that_nothing_was_built(tmp_path, monkeypatch, capsys):
    """And the script's own error stays its own."""
    path = tmp_path / "empty.py"
    path.write_text("raise SystemExit(3)")
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as stop:
        fastlora_run([str(path)])
    assert stop.value.code == 3
    assert "built no Llama model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "a script or -m and a module is needed"),
        (["-m"], "a script or -m and a module is needed"),
        (["--strict"], "a script or -m and a module is needed"),
        (["no_such_script.py"], "no_such_script.py: no such file"),
        (["--memry", "lean", "script.py"], "unrecognized arguments: --memry"),
    ],
    ids=str,
)
def test_run_wants_a_script(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        fastlora_run(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "usage: python -m fastlora.run" in said and message in said
