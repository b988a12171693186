"""The examples of many GPUs, as they stand, on two processes; the configurations of 70B, read by the libraries they are for."""

import json
import os

import pytest
from accelerate.commands import launch as accelerate_launch
from accelerate.utils import FullyShardedDataParallelPlugin, prepare_multi_gpu_env
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from cli.conftest import model_dir, rows_file, tokenizer  # noqa: F401
from torch.distributed.fsdp import StateDictType

from fastlora.cli import ranks

from .conftest import ROOT

CONFIGS = ROOT / "examples" / "configs"
LEFT_ALONE = {"fsdp2": set(), "deepspeed_zero3": {"base_model.model"}}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_example(name, pair, model_dir, tmp_path):  # noqa: F811
    """It trains, fused but for what docs/trainers.md says, and saves a plain adapter."""
    data, out, plan = tmp_path / "rows.jsonl", tmp_path / "adapter", tmp_path / "plan.json"
    data.write_text(
        "".join(json.dumps({"text": f"{a} plus {b} is {a + b}."}) + "\n" for a in range(6) for b in range(4))
    )
    arguments = ["--model", model_dir, "--data", data, "--out", out, "--steps", 3]
    script = ROOT / "examples" / f"{name}.py"
    imports = ("transformers", "peft", "datasets")
    statuses = pair(
        "engines.example:main", script, plan, *arguments, log=tmp_path / "log", imports=imports, DS_ACCELERATOR="cpu"
    )
    assert statuses == [0, 0], pair.output[0][-4000:]
    assert pair.output[0].count("step 2: loss") == 1 and "step" not in pair.output[1]
    rows = [row for row in json.loads(plan.read_text())["rows"] if not row["path"].endswith(".attention")]
    assert {row["path"] for row in rows if row["why"] or row["passed"]} == LEFT_ALONE[name]
    assert all(row["fused"] == 3 for row in rows if row["path"] not in LEFT_ALONE[name])
    assert (out / "adapter_model.safetensors").stat().st_size > 10_000
    assert "fastlora" not in (out / "adapter_config.json").read_text()


@pytest.fixture
def launch(monkeypatch):
    """What accelerate launch makes of a configuration: arguments, and the environment of the processes."""
    caught = []
    monkeypatch.setattr(accelerate_launch, "multi_gpu_launcher", caught.append)
    monkeypatch.setattr(accelerate_launch, "deepspeed_launcher", caught.append)

    def run(config: str):
        parser = accelerate_launch.launch_command_parser()
        accelerate_launch.launch_command(parser.parse_args(["--config_file", str(CONFIGS / config), "script.py"]))
        (args,) = caught
        return args, prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)

    return run


def test_accelerate_reads_the_fsdp2_configuration(launch, monkeypatch):
    args, environment = launch("accelerate_fsdp2_70b.yaml")
    assert args.use_fsdp and args.num_processes == 8 and environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    monkeypatch.setattr(os, "environ", {**os.environ, **environment})
    assert ranks.engine() == "FSDP"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True and plugin.cpu_ram_efficient_loading
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT and not plugin.activation_checkpointing


def test_accelerate_reads_the_zero3_configuration(launch, monkeypatch):
    args, environment = launch("accelerate_zero3_70b.yaml")
    assert args.use_deepspeed and args.num_processes == 8
    monkeypatch.setattr(os, "environ", {**os.environ, **environment})
    assert ranks.engine() == "DEEPSPEED"
    assert (ROOT / environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).exists()
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "true"


@pytest.mark.parametrize("name", ["deepspeed_zero3.json", "deepspeed_zero3_70b.json"])
def test_deepspeed_reads_its_configuration(name, monkeypatch):
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    values = json.loads((CONFIGS / name).read_text())
    # What the Trainer fills in.
    filled = {key: 1 if value == "auto" else value for key, value in values.items()}
    zero = DeepSpeedConfig(filled).zero_config
    assert zero.stage == 3 and zero.leaf_module.classes == ["LlamaDecoderLayer"]
    assert set(values["zero_optimization"]) <= set(type(zero).model_fields) | {
        field.alias for field in type(zero).model_fields.values()
    }
