"""The two calls on a GPU: what a stage loses, and what it cannot."""

import json
import os
import sys
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench import gpu, record, stages
from bench.stages import Stage

# A training step of two providers, of which the second never comes back from being patched; it starts a process that
# sleeps as long, as torch.compile starts some.
_HANGS = """
import subprocess, sys, time
from bench import __main__ as bench, steps
from bench.step_providers import BY_NAME

def hang(model):
    print("sleeper", subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
    time.sleep(600)

steps.PROVIDERS = (BY_NAME["peft"], BY_NAME["fastlora"]._replace(after=hang))
bench.main(sys.argv[1:])
"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(*found):
        out = tmp_path / "out"
        results = out / "gpu.jsonl"
        monkeypatch.setattr(stages, "of_call", lambda call, path, rehearse, only: [made(results) for made in found])
        monkeypatch.setenv("OUT", str(out))
        before = dict(os.environ)
        status = bench.main(["gpu", "--rehearse"])
        assert dict(os.environ) == before  # what it sets is for its stages: TORCHDYNAMO_DISABLE would stay for good
        return status, record.load(results)[1], (out / "gpu.log").read_text()

    return run


def step(results, *providers):
    return (
        "train_step", "--append", str(results), "--device", "cpu", "--model", "tiny", "--layers", "1", "--tokens", "1x16",
        "--memory", "off", "--seconds", "0.1", "--providers", ",".join(providers),
    )  # fmt: skip


def test_a_hang_loses_only_what_was_not_yet_written(run, capsys):
    def hanging(results):
        command = (sys.executable, "-c", _HANGS, *step(results, "peft", "fastlora"))
        return (Stage("hangs", 40, command, shell=True),)

    status, records, log = run(
        lambda results: (Stage("absent", 120, ("train_step", "--no-such-option")),),
        hanging,
        lambda results: (
            Stage("works", 120, step(results, "peft-bf16"), {"FASTLORA_GEMM": "addmm"}),
            Stage("beside it", 120, ("compare", "--help")),
            Stage("left", 60, (), why="there is none here"),
        ),
    )
    assert status == 1
    verdicts = {r["op"]: r["verdict"] for r in records if r["bench"] == "stage"}
    assert verdicts == {
        "absent": "exit status 2", "hangs": "stopped after its 40 s", "works": "done", "beside it": "done",
        "left": "left out: there is none here",
    }  # fmt: skip
    steps = [(r["provider"], bool(r.get("provisional"))) for r in records if r["bench"] == "train_step"]
    assert steps == [("peft", True), ("peft-bf16", False)]
    assert all(r["ms"]["median"] > 0 for r in records if r["bench"] == "train_step")
    assert "unrecognized arguments: --no-such-option" in log and "usage: python -m bench compare" in log
    assert "works: done" in capsys.readouterr().out
    # Nothing that a stage started outlives it.
    pid = log.split("sleeper ")[1].split()[0]
    with pytest.raises(OSError, match="No such"):
        Path(f"/proc/{pid}/cmdline").read_bytes()


def test_an_earlier_call_is_kept(run):
    late = lambda results: (Stage("left", 60, (), why="there is none here"),)  # noqa: E731
    run(late)
    _, records, _ = run(late)
    assert len(records) == 1
    kept = Path(os.environ["OUT"], "gpu.jsonl.before").read_text()
    assert kept.count("left out") == 1 and Path(os.environ["OUT"], "gpu.log.before").exists()


def test_when_the_time_is_up_the_rest_is_left(run, monkeypatch):
    monkeypatch.setitem(stages.LIMITS, "gpu", 9.0)
    status, records, _ = run(lambda results: (Stage("late", 60, step(results, "peft")),))
    assert status == 1 and [r["verdict"] for r in records] == ["no time left"]


def test_without_a_gpu_the_gpu_pass_says_so(capsys, monkeypatch):
    monkeypatch.setattr(gpu.machine, "default_device", lambda: "cpu")
    assert bench.main(["gpu"]) == 1
    assert "No GPU is visible" in capsys.readouterr().out


@pytest.mark.parametrize("rehearse", [True, False])
def test_both_calls_fit_their_limits(tmp_path, rehearse):
    assert stages.LIMITS == {"gpu": 420, "gpu_more": 300}
    for call in stages.LIMITS:
        found = [stage for group in stages.of_call(call, tmp_path / "results.jsonl", rehearse) for stage in group]
        # The headline is the first on a GPU, and no stage takes what two others need.
        assert all(stage.seconds <= 150 for stage in found) and len({stage.name for stage in found}) == len(found)
        assert all(stage.shell or bench._COMMANDS.keys() | set(bench.NAMES) >= {stage.command[0]} for stage in found)
    assert stages.of_call("gpu", tmp_path / "r", False)[0][0].command[0] == "train_step"


def test_only_some_stages(tmp_path, capsys):
    file = tmp_path / "r"
    alone = stages.of_call("gpu_more", file, False, ["parity of operators", "4-bit*"])
    assert [[stage.name for stage in group] for group in alone] == [["parity of operators"], ["4-bit base"]]
    with pytest.raises(SystemExit):
        bench.main(["gpu", "--rehearse", "--only", "parity of operators"])
    assert "only is parity of operators, needs the names of stages of this call" in capsys.readouterr().err


def test_a_worker_runs_what_it_is_told(tmp_path):
    runner = gpu.Runner(tmp_path / "results.jsonl", tmp_path / "log", rehearse=True)
    stage = Stage("help", 60, ("compare", "--help"), {"COLUMNS": "80"})
    try:
        assert runner.run((stage,), 60, follows=True)[0].startswith("help: done")
        assert runner._spare is not None
        spare = runner._spare
        assert runner.run((stage,), 60, follows=False)[0].startswith("help: done")
        assert runner._spare is None and spare.poll() is not None
    finally:
        runner.close()
    assert (tmp_path / "log").read_text().count("usage: python -m bench compare") == 2
    assert [r["verdict"] for r in record.load(tmp_path / "results.jsonl")[1]] == ["done"] * 2


@pytest.mark.parametrize(
    ("lines", "runs"),
    [
        ([], False), ([{"provider": "peft", "ms": {"median": 1.0}}], False),
        ([{"provider": "fastlora", "parity": None, "why": "no"}], False),
        ([{"provider": "fastlora", "ms": {"median": 1.0}, "given_up": ["lora_gemm"]}], False),
        ([{"provider": "fastlora", "ms": {"median": 1.0}, "unfused": ["peft Linear: no"]}], False),
        ([{"provider": "fastlora", "ms": {"median": 1.0}}], True),
    ],
)  # fmt: skip
def test_the_call_ends_early_where_nothing_of_ours_runs(tmp_path, lines, runs):
    """The time that is left goes to mending it."""
    common = {"bench": "train_step", "op": "7b", "shape": {}, "dtype": "bfloat16"}
    file = tmp_path / "gpu.jsonl"
    file.write_text("".join(json.dumps(common | line) + "\n" for line in lines))
    assert gpu._fastlora_runs(file) is runs
