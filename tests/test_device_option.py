"""`pytest tests/ops --device cuda` where there is no GPU, and how it tells of a failure where there is one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from on_gpu import OnGPU, first_line

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda", "ERROR: --device cuda: PyTorch sees no GPU here (torch "), ("tpu", "--device: invalid choice: 'tpu'")],
)
def test_a_device_that_is_not_there_is_refused(device, message):
    command = [sys.executable, "-m", "pytest", "tests/ops/test_swiglu.py", "--device", device, "-p", "no:cacheprovider"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and message in done.stderr
    assert "passed" not in done.stdout


def failed(message: str, longrepr=None) -> pytest.TestReport:
    longrepr = longrepr or SimpleNamespace(reprcrash=SimpleNamespace(message=message))
    return pytest.TestReport("a.py::test", ("a.py", 1, "test"), {}, "failed", longrepr, "call")


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (failed("AssertionError: over budget\nassert 2 < 1"), "AssertionError: over budget"),
        (failed("x" * 300), "x" * 200),
        (failed("", "worker 'gw0' crashed while running 'a'"), "worker 'gw0' crashed while running 'a'"),
        (failed("", "a.py:1: in <module>\n    import b\nE   ImportError: no b"), "ImportError: no b"),
    ],
)
def test_the_first_line_of_a_failure(report, line):
    assert first_line(report) == line


@pytest.mark.parametrize("workerinput", [{}, {"workerinput": {}}], ids=["here", "a worker of pytest-xdist"])
def test_a_failure_is_told_at_once_and_once(workerinput):
    told = []
    terminal = SimpleNamespace(write_line=told.append, flush=lambda: told.append("flushed"))
    manager = SimpleNamespace(get_plugin=lambda name: terminal)
    OnGPU(SimpleNamespace(pluginmanager=manager, **workerinput)).pytest_runtest_logreport(failed("no\nmore"))
    assert told == ([] if workerinput else ["FAILED a.py::test: no", "flushed"])
