"""fastlora train in two processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from cli.conftest import model_dir, rows_file, tokenizer  # noqa: F401
from rich.console import Console

from fastlora.cli.data import read_rows
from fastlora.cli.errors import CommandError
from fastlora.cli.files import write_json
from fastlora.cli.models import device
from fastlora.cli.settings import Settings
from fastlora.cli.train import RUN_FILE, _identity, _open

from .conftest import ROOT

STEPS = 24
FLAGS = ["--batch-size", 2, "--grad-accum", 2, "--max-steps", STEPS, "--save-steps", 4, "--dropout", 0.1, "--rank", 4]
IMPORTS = ("peft", "datasets", "fastlora.cli.app", "fastlora.cli.train", "fastlora.cli.trainer")


@pytest.fixture(scope="module")
def flags(model_dir, rows_file):  # noqa: F811
    return ["train", "--model", model_dir, "--data", rows_file, *FLAGS]


@pytest.fixture(scope="module")
def command(pair, tmp_path_factory):
    def run(*args: object) -> list[int]:
        return pair("engines.command:main", *args, log=tmp_path_factory.mktemp("log"), imports=IMPORTS)

    return run


@pytest.fixture(scope="module")
def whole_run(flags, command, pair, tmp_path_factory):
    """An uninterrupted run: its directory and what its processes printed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert command(*flags, "--out", out) == [0, 0], pair.output
    return out, pair.output


def report(out):
    return json.loads((out / "report.json").read_text())


def test_one_process_prints_and_writes(whole_run):
    out, (first, second) = whole_run
    assert f"in {STEPS} steps" in first and first.count("Adapter, tokenizer, loss.png and report.json") == 1
    assert "fastlora" not in second and "loss" not in second
    assert {"adapter_model.safetensors", "tokenizer.json", "loss.png", "report.json"} <= {p.name for p in out.iterdir()}
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-20", "checkpoint-24"]
    states = {path.name for path in (out / "checkpoint-24").glob("rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}
    written = report(out)
    assert written["processes"] == 2
    assert [point["step"] for point in written["loss"]] == list(range(1, STEPS + 1))
    assert sum(row["fused"] for row in written["plan"]["rows"]) > 0


def test_sigterm_to_torchrun_saves_one_checkpoint_to_resume_from(flags, command, pair, whole_run, tmp_path):
    """torchrun passes it on to its processes, one after another. The resumed run has the uninterrupted one's curve."""
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [*torchrun, "-m", "fastlora.cli", *map(str, flags), "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    until = time.monotonic() + 300
    while not (out / "checkpoint-4").exists() and started.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    started.send_signal(signal.SIGTERM)
    printed, _ = started.communicate(timeout=60)
    assert started.returncode != 0
    assert printed.count("a checkpoint is saved. Go on with:\n  fastlora train") == 1, printed
    stopped = int(printed.split("Stopped at step ")[1].split()[0])
    assert 4 <= stopped < STEPS
    assert (out / f"checkpoint-{stopped}").exists() and not (out / ".unfinished").exists()

    assert command(*flags, "--out", out, "--resume") == [0, 0], pair.output
    assert f"Resuming from {out}/checkpoint-{stopped}" in pair.output[0]
    assert report(out)["resumed_from_step"] == stopped
    assert report(out)["loss"] == report(whole_run[0])["loss"]
    adapter = "adapter_model.safetensors"
    assert (out / adapter).read_bytes() == (whole_run[0] / adapter).read_bytes()


def test_an_error_is_said_once(flags, command, pair, whole_run):
    assert command(*flags, "--out", whole_run[0]) == [1, 1]
    assert ["is not empty" in printed for printed in pair.output] == [True, False]


def test_sharding_needs_gpus(monkeypatch):
    """Accelerate would start training, unsharded or with weights it never gathers."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(CommandError, match="needs GPUs"):
        device()


@pytest.mark.parametrize("local_rank, message", [("0", "torchrun --nproc_per_node 2"), ("2", "2 are visible")])
def test_gpus_and_processes_that_do_not_match(local_rank, message, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("WORLD_SIZE", str(int(local_rank) + 1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(CommandError, match=message):
        device()


def test_resuming_with_another_number_of_processes(rows_file, tmp_path, monkeypatch):  # noqa: F811
    settings, rows = Settings(model="m", data=str(rows_file), out=str(tmp_path)), read_rows(rows_file)
    monkeypatch.setenv("WORLD_SIZE", "2")
    write_json(tmp_path / RUN_FILE, _identity(settings, rows))
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(CommandError, match="processes was 2, is 1"):
        _open(settings, rows, True, Console())
