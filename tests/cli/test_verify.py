"""`fastlora verify`, in this process: the batch that train would draw, the table, and the exit status."""

import re
import sys

import pytest
import torch
from patching import faults

from fastlora import cli
from fastlora.modules import lora as reader


@pytest.fixture
def verify(monkeypatch, capsys, model_dir, rows_file):
    monkeypatch.setenv("COLUMNS", "300")

    def run(*args: object) -> tuple[int, str]:
        arguments = ["--model", model_dir, "--data", rows_file, *args]
        monkeypatch.setattr(sys, "argv", ["fastlora", "verify", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        return stop.value.code or 0, said.out + said.err

    return run


@pytest.mark.filterwarnings("ignore")
def test_a_sound_model(verify):
    status, said = verify(
        "--max-length", 64, "--strict", "--memory", "lean", "--ops", "lora_linear,rms_norm,rope,swiglu"
    )
    assert status == 0, said
    assert "its B drawn at random" in said
    assert "base_model.model.model.layers" in said and "gradient of lora_A.default.weight" in said
    assert "Within the budget: all" in said


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_and_a_fault(verify, model_dir, tmp_path, monkeypatch):
    from patching.tiny import randomise
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_dir)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    randomise(model).save_pretrained(tmp_path)
    group = reader.ops.lora_group
    monkeypatch.setattr(reader.ops, "lora_group", lambda x, *args, **options: group(x * 1.001, *args, **options))
    status, said = verify("--adapter", tmp_path, "--dtype", "float32")
    assert status == 1
    assert "OVER BUDGET" in said and "v_proj" in said and "k_proj" not in said
    assert torch.is_grad_enabled()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("width", [80, 300])
def test_a_cache_that_is_dropped(verify, monkeypatch, width):
    """Exit status 1; and in a narrow terminal the names are whole."""
    faults.drop_cache(monkeypatch)
    faults.never_run(monkeypatch, "up_proj")
    monkeypatch.setenv("COLUMNS", str(width))
    status, said = verify("--max-length", 64)
    assert status == 1 and "OVER BUDGET" in said
    table = said[said.index("\nmodule ") : said.index("\nAllowed")]
    for line in (
        r"layers\.\d\.self_attn\.q_proj +gradient of lora_A\.default\.weight",
        "the whole model +logits over a cache",
    ):
        assert re.search(line, table), said
    assert ("original's  allowed" in table) == (width == 300)
    assert width == 300 or max(len(line) for line in table.splitlines() if ": fused calls: " not in line) <= width
    assert "layers.0.mlp.up_proj: fused calls: said to be fused, but did not run" in said or width == 300
    assert said.count("said to be fused, but did not run") == 3, "of two layers, and in the verdict"


def test_errors_are_one_line(verify, tmp_path):
    status, said = verify("--adapter", tmp_path / "none")
    assert status == 1 and "cannot load the adapter" in said
