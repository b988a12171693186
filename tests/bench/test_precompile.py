"""What is compiled ahead is what a launch asks for."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from bench import precompile
from bench.ops import cases
from bench.setting import Setting
from fastlora.kernels import _tiles
from fastlora.tuning import aot

BF16 = torch.bfloat16


def _launched_with_memory(folder):
    """Compile swiglu's two kernels as they are launched on tensors that have memory; the names of all code in folder."""
    from fastlora.ops import swiglu

    gate, up = (torch.randn(64, 96, dtype=BF16, requires_grad=True) for _ in range(2))
    recorder = precompile._Recorder()
    with _tiles.assumed_arch(80), precompile.layer.traced(precompile.layer.Through(), recorder, 80):
        swiglu(gate, up).sum().backward()
    aot.triton.runtime.driver.set_active(aot.Driver(80))
    for one in recorder.launches.values():
        one.kernel.warmup(*one.args, grid=one.grid, **one.meta)
    return len(recorder.launches), sorted(path.name for path in folder.rglob("*.cubin"))


def _ahead(folder):
    with _tiles.assumed_arch(80):
        found = precompile.of_ops(cases("swiglu", "cpu", BF16, quick=True), BF16)
        compiled = precompile.compile_all(found)
    return compiled, len(list(folder.rglob("*.cubin")))


def _in_a_process(function, folder):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, folder).result()


def test_a_launch_finds_the_code_that_was_compiled_ahead(tmp_path, monkeypatch):
    """In processes of their own, as in use: nothing new is compiled for tensors that have memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert _in_a_process(_ahead, tmp_path) == (2, 2)
    launched, code = _in_a_process(_launched_with_memory, tmp_path)
    assert launched == 2 and len(code) == 2


@pytest.mark.parametrize("provider", ["fastlora", "fastlora-triton"])
def test_every_kernel_of_a_layer_is_recorded(provider):
    setting = Setting("tiny", BF16, "cuda", 1, 2048, 1)
    with _tiles.assumed_arch(90):
        names = {one.kernel.fn.__name__ for one in precompile.of_step(setting, ["peft", provider])}
    # On sm_90 the row of the base product of so many rows is a library's, unless told.
    assert ("_lora_gemm_kernel" in names) == (provider == "fastlora-triton")
    assert {"_lora_project_kernel", "_swiglu_bwd_reduce_kernel", "_lora_reduce_kernel"} <= names


def test_a_process_that_dies_leaves_its_kernels_to_their_launch(monkeypatch, capsys):
    monkeypatch.setattr(precompile, "_build_launcher", lambda compiled: os._exit(1))
    with _tiles.assumed_arch(80):
        found = precompile.of_ops(cases("swiglu", "cpu", BF16, quick=True), BF16)
        assert precompile.compile_all(found) == 0
    assert "not compiled ahead: A process in the process pool was terminated" in capsys.readouterr().out


def test_what_does_not_compile_is_said_and_left_to_its_launch(capsys):
    with _tiles.assumed_arch(80):
        found = precompile.of_ops(cases("swiglu", "cpu", BF16, quick=True), BF16)
        broken = [one._replace(meta={"no_such_option": 1}) for one in found]
        assert precompile.compile_all(broken) == 0
    out = capsys.readouterr().out
    assert "not compiled ahead: _swiglu_fwd_kernel" in out and "0 of 2 kernels compiled ahead" in out
