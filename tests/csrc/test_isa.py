"""The C++ kernels under every instruction set this machine runs; parity.py has the checks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastlora

EXTENSION = Path(fastlora.__file__).with_name("_C.abi3.so")
pytestmark = pytest.mark.skipif(not EXTENSION.exists(), reason="csrc is not built")


def run(isa: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("parity.py"))],
        # passive: where cores are shared, a thread that spins while it waits for the other makes both slow.
        env={**os.environ, "FASTLORA_CPU_ISA": isa, "FASTLORA_C": str(EXTENSION), "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "plain"])
def test_parity(isa):
    done = run(isa)
    if "this machine and build run:" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert f"{isa} refusals ok" in done.stdout


def test_unknown_isa_is_refused():
    done = run("mmx")
    assert done.returncode != 0
    assert "FASTLORA_CPU_ISA is 'mmx'; this machine and build run:" in done.stderr
    assert "plain" in done.stderr.splitlines()[-1]
