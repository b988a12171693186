"""fastlora train end to end, each run in a process of its own."""

import json
import shutil
import signal
import subprocess
import sys

import pytest

STEPS = 8
OPS = "flash_attention,lora_linear,rms_norm,rope,swiglu"
# Dropout, so that the random number generators matter; three steps an epoch, so that the order of the data does.
FLAGS = ["--batch-size", 4, "--grad-accum", 2, "--max-steps", STEPS, "--save-steps", 2, "--dropout", 0.1, "--rank", 4]

SIGTERM_AT_STEP_3 = """
import os, signal
from fastlora.cli.trainer import StopOnSignal
on_step_end = StopOnSignal.on_step_end
def stop(self, args, state, control, **kwargs):
    if state.global_step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    on_step_end(self, args, state, control, **kwargs)
StopOnSignal.on_step_end = stop
"""

# trainer_state.json is the last file of a checkpoint: at this point all others are written.
KILLED_WHILE_SAVING_STEP_4 = """
import os, signal
from transformers import TrainerState
save_to_json = TrainerState.save_to_json
def save(self, path):
    if self.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    save_to_json(self, path)
TrainerState.save_to_json = save
"""


@pytest.fixture(scope="module")
def flags(model_dir, rows_file):
    return ["train", "--model", model_dir, "--data", rows_file, *FLAGS]


@pytest.fixture(scope="module")
def whole_run(flags, fastlora_cli, tmp_path_factory):
    """An uninterrupted run: its directory and its process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = fastlora_cli(*flags, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def report(out):
    return json.loads((out / "report.json").read_text())


def test_the_run_leaves_adapter_tokenizer_plot_and_report(whole_run):
    out, done = whole_run
    names = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja", "report.json"}
    assert names <= {path.name for path in out.iterdir()}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert f"in {STEPS} steps" in done.stdout

    written = report(out)
    assert [point["step"] for point in written["loss"]] == list(range(1, STEPS + 1))
    assert written["tokens_per_second"] > 0
    assert written["peak_memory"]["bytes"] > 0
    assert written["saved_for_backward"]["bytes_per_token"] > 0
    assert written["settings"]["rank"] == 4
    assert written["versions"]["peft"] and written["versions"]["fastlora"]
    assert written["plan"]["rows"]
    assert written["energy"]["kwh"] is None and written["energy"]["why"] == "no GPU"
    assert written["energy"]["estimate"]["kwh"] is None and "no GPU" in written["energy"]["estimate"]["why"]


# What a machine with a GPU would have: its name, its memory, and a counter that goes up by 3.6 kJ each time it is read.
STAND_IN_FOR_NVML = """
import sys, types
import fastlora.cli.energy, fastlora.planning.gpus
fastlora.cli.energy.gpu_uuid = lambda: "GPU-1"
of = fastlora.planning.gpus.gpu_of
fastlora.planning.training_plan.gpu_of = lambda name: of("a100-80gb" if name == "auto" else name)
nvml = types.ModuleType("pynvml")
nvml.NVMLError = type("NVMLError", (Exception,), {})
nvml.nvmlInit = lambda: None
nvml.nvmlDeviceGetHandleByUUID = {"GPU-1": "handle"}.__getitem__
counter = iter(range(0, 10**9, 3_600_000))
nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: {"handle": next(counter)}[handle]
sys.modules["pynvml"] = nvml
"""


def test_a_run_that_recomputes_has_the_curve_of_one_that_does_not_and_measures_its_energy(
    flags, fastlora_cli, whole_run, tmp_path
):
    out = tmp_path / "run"
    done = fastlora_cli(*flags, "--out", out, "--memory", "lean", "--strict", "--ops", OPS, before=STAND_IN_FOR_NVML)
    assert done.returncode == 0, done.stderr
    written = report(out)
    assert written["loss"] == report(whole_run[0])["loss"]
    kept = [report(run)["saved_for_backward"]["bytes_per_token"] for run in (whole_run[0], out)]
    assert kept[1] < kept[0] / 2
    memory = [row for row in written["plan"]["rows"] if row["path"].endswith(".memory")]
    assert memory and all(row["fused"] == 2 * STEPS for row in memory)
    energy = written["energy"]
    assert energy["kwh"] == pytest.approx(0.001) and energy["kg_co2eq"] == pytest.approx(0.001 * 0.4234)
    assert energy["why"] is None and energy["estimate"]["why"] is None
    assert 0 < energy["estimate"]["kwh"] < energy["kwh"] and energy["estimate"]["rates"] == "modelled"


def test_the_adapter_is_plain_peft(whole_run, model_dir):
    out, _ = whole_run
    script = f"""
import sys
sys.modules["fastlora"] = None
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(model_dir)!r}), {str(out)!r})
assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
"""
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert "fastlora" not in (out / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    "fault, status, resumes_from",
    [(SIGTERM_AT_STEP_3, 128 + signal.SIGTERM, 3), (KILLED_WHILE_SAVING_STEP_4, -signal.SIGKILL, 2)],
    ids=["SIGTERM", "kill -9 while a checkpoint is written"],
)
def test_a_resumed_run_has_the_curve_of_an_uninterrupted_one(
    flags, fastlora_cli, tmp_path, whole_run, fault, status, resumes_from
):
    out = tmp_path / "run"
    stopped = fastlora_cli(*flags, "--out", out, before=fault)
    assert stopped.returncode == status, stopped.stderr
    if status > 0:
        assert "Stopped at step 3 of 8; a checkpoint is saved. Go on with:\n  fastlora train" in stopped.stdout
        assert stopped.stdout.rstrip().endswith("--resume")
    assert not (out / "checkpoint-4").exists()

    resumed = fastlora_cli(*flags, "--out", out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"Resuming from {out}/checkpoint-{resumes_from}" in resumed.stdout
    assert report(out)["resumed_from_step"] == resumes_from
    assert report(out)["loss"] == report(whole_run[0])["loss"]
    adapter = "adapter_model.safetensors"
    assert (out / adapter).read_bytes() == (whole_run[0] / adapter).read_bytes()


def test_resuming_a_complete_run_changes_nothing(flags, fastlora_cli, whole_run):
    out, _ = whole_run
    before = (out / "report.json").read_bytes()
    again = fastlora_cli(*flags, "--out", out, "--resume")
    assert again.returncode == 0, again.stderr
    assert f"already complete: step {STEPS}" in again.stdout
    assert (out / "report.json").read_bytes() == before


def test_a_run_killed_before_its_report_gets_it_on_resume(flags, fastlora_cli, whole_run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole_run[0], out)
    (out / "report.json").unlink()
    (out / "adapter_model.safetensors").unlink()
    again = fastlora_cli(*flags, "--out", out, "--resume")
    assert again.returncode == 0, again.stderr
    assert report(out)["loss"] == report(whole_run[0])["loss"]
    assert (out / "adapter_model.safetensors").read_bytes() == (whole_run[0] / "adapter_model.safetensors").read_bytes()
