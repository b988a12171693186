"""Measured rows replace those of their kernel and architecture, and no others."""

import json
import shutil

import pytest

from bench import __main__ as bench
from bench import rows
from fastlora.kernels import _rows
from fastlora.kernels._rows import ANY, Measured, Tile

GPU = "NVIDIA H200 sm_90, driver 580.1, torch 2.11.0, triton 3.6.0, fastlora 0.1.0"


def entry(call, method, tile, ms):
    return {
        "method": method, "tile": tile, "ms": ms, "runner_up": "addmm", "runner_up_ms": 2 * ms, "date": "2026-11-27",
        "call": call,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    entries = {
        "lora_gemm bfloat16 m1024 n4096 k4096 r16 p1": entry(
            [1024, 4096, 4096, 16, 1], "triton", [64, 128, 32, 16, 4, 3], 0.1
        ),
        "lora_gemm bfloat16 m4096 n4096 k4096 r16 p1": entry(
            [4096, 4096, 4096, 16, 1], "augmented", [1, 1, 1, 64, 4, 2], 0.3
        ),
        "swiglu bfloat16 m16 n45088768 k0 r0 p0": entry([0, 45088768, 0, 0, 0], "triton", [1, 2048, 1, 64, 8, 2], 0.2),
    }
    rehearsed = {"swiglu bfloat16 m16 n64 k0 r0 p0": entry([0, 64, 0, 0, 0], "aten", [1, 64, 1, 64, 4, 2], 9.0)}
    content = {"fastlora_tuning": 1, "entries": {GPU: entries, GPU.replace("NVIDIA H200", "cpu"): rehearsed}}
    (tmp_path / "tuning.json").write_text(json.dumps(content))
    return tmp_path


def evaluated(path):
    made: dict = {"__name__": "fastlora.kernels._rows"}
    exec(compile(path.read_text(), str(path), "exec"), made)
    return made["ROWS"]


def test_measured_rows_take_the_place_of_what_was_there(folder):
    file = folder / "_rows.py"
    shutil.copy(_rows.__file__, file)
    for _ in range(2):  # once more changes nothing
        assert bench.main(["rows", str(folder), "--file", str(file)]) == 0
        new = {("lora_gemm", 90), ("swiglu", 90)}
        found = [repr(row) for row in evaluated(file) if (row.kernel, row.arch) not in new]
        assert found == [repr(row) for row in _rows.ROWS if (row.kernel, row.arch) not in new]
        small, large = (row for row in evaluated(file) if (row.kernel, row.arch) == ("lora_gemm", 90))
        assert repr(small.tile) == repr(Tile(m=64, n=128, k=32, r=16, stages=3)) and small.m == 1024
        assert (large.method, large.m, large.n, large.r) == ("augmented", ANY, ANY, ANY)
        provenance = Measured("NVIDIA H200", "2026-11-27", "2.11.0", "3.6.0", 0.1, "addmm", 0.2)
        assert repr(small.provenance) == repr(provenance)
        (swiglu,) = (row for row in evaluated(file) if (row.kernel, row.arch) == ("swiglu", 90))
        assert swiglu.tile.n == 2048 and swiglu.method == "triton"


def test_a_kernel_without_rows_is_refused():
    row = _rows.Row("no_such_kernel", 90, Tile())
    with pytest.raises(KeyError, match="no row of no_such_kernel"):
        rows.replaced('    Row("swiglu", 0, Tile(n=1024)),\n', [row])


@pytest.mark.parametrize("content", [None, "not json", "{}", '{"entries": {}}'])
def test_a_folder_without_measurements_is_refused(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "tuning.json").write_text(content)
    before = rows._FILE.read_text()
    with pytest.raises(SystemExit, match="2"):
        bench.main(["rows", str(tmp_path)])
    assert f"folder is {tmp_path}" in capsys.readouterr().err and rows._FILE.read_text() == before
