"""Screening without a GPU: what is shipped is in the space, what is ranked fits, and a first step searches nothing."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton")

from fastlora.kernels import _tiles
from fastlora.kernels._rows import ANY, ROWS, Row, Tile
from fastlora.kernels._tiles import Call
from fastlora.tuning import calls, candidates, model, rows, screen
from fastlora.tuning.aot import SHARED_LIMIT
from fastlora.tuning.screen import Screened


@pytest.mark.parametrize(
    "row", screen.shipped_rows(80, [k for k in screen.kernels() if not k.endswith("_fp32")]), ids=rows.source
)
def test_every_shipped_row_of_sm_80_is_in_the_space(row):
    """That it compiles without spills for every Llama 2 is tests/kernels' to show."""
    assert row.tile in set(candidates.enumerated(row.kernel, 80))
    assert candidates.shared_bytes(row.kernel, row.tile, 80) <= SHARED_LIMIT[80]


def test_the_space_has_more_than_what_is_shipped():
    for kernel in candidates.SPACES:
        assert len(set(candidates.enumerated(kernel, 80)) - candidates.shipped(kernel)) >= 4, kernel
    assert {name for name in screen.kernels() if not name.endswith("_fp32")} == set(candidates.SPACES)


def test_every_row_with_a_tile_is_screened():
    assert {row.kernel for row in ROWS if row.tile != Tile()} == set(screen.kernels())


def test_a_candidate_is_compiled_as_it_is_launched(tmp_path):
    """Another process: the fake driver is the process's own. A tile that is too large is told from one that serves."""
    good, large = Tile(m=32, k=128, stages=3), Tile(m=128, k=512, stages=6)
    probe = [calls.of_model(calls.MODELS["7b"], 4096, 16, torch.bfloat16, torch.device("meta"))[0]]
    assert probe[0].kernel == "rms_norm_project"
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(screen.compile_one, "rms_norm_project", tile, 80, probe) for tile in (good, large)]
        one, other = (job.result() for job in jobs)
    assert (
        one.survives(80) and one.registers > 32 and one.shared >= candidates.shared_bytes("rms_norm_project", good, 80)
    )
    assert not other.survives(80)


def test_rows_for_short_batches_and_for_packed_ones_in_fp32_do_not_spill():
    """tests/kernels compiles what 4096 tokens launch; here, what fewer do on an A100, and attention's fp32 tiles as
    screening does."""
    every = screen.shipped_rows(80, screen.kernels())
    of = [row for row in every if row.m < ANY]
    fp32 = [row for row in every if "attention" in row.kernel and row.kernel.endswith("_fp32")]
    fp32 = [row for row in fp32 if "dropout" not in row.kernel]
    assert len(of) > 5 and len(fp32) == 9
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(screen.compile_one, row.kernel, row.tile, 80, _served(row)) for row in of]
        jobs += [pool.submit(screen.compile_one, row.kernel, row.tile, 80) for row in fp32]
        over = [job.result() for job in jobs if not job.result().survives(80)]
    assert not over


def _served(row):
    """The calls, of as many rows as it holds, that this row answers and none before it."""
    rows = screen.shipped_rows(80, [row.kernel])
    every = [
        call
        for rank in (16, 128)
        for call in calls.of_kernel(row.kernel, calls.MODELS["7b"], row.m, rank, torch.bfloat16, torch.device("meta"))
    ]
    served = [call for call in every if _tiles._fit(rows, call) is row]
    assert served, row
    return served


def _fake(job):
    kernel, tile, arch = job
    return Screened(kernel, tile, registers=100, spilled=0 if tile.warps == 4 else 8, shared=1000)


class _Here:
    """A process pool that is this process."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def submit(self, function, *args):
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(*args))
        return future


def test_what_was_compiled_is_read_the_second_time(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(screen, "ProcessPoolExecutor", _Here)
    monkeypatch.setattr(screen, "_compile", _fake)
    seen = []
    first = screen.screen(80, ["swiglu"], lambda *at: seen.append(at))
    assert seen[0][:2] == (0, len(first)) and seen[-1][:2] == (len(first), len(first))
    monkeypatch.setattr(screen, "_compile", lambda job: pytest.fail("compiled again"))
    assert screen.screen(80, ["swiglu"]) == first
    monkeypatch.setattr(screen, "fingerprint", lambda: "other sources")
    assert screen.known(80) == {}
    (tmp_path / "screened-sm_80.json").write_text("{")
    assert screen.known(80) == {}


def test_a_row_of_its_own_needs_a_margin():
    """Of two tiles, one is better for short batches; the other serves the rest, in a row without bounds."""
    found = [
        Screened("lora_gemm", Tile(128, 256, 64, 16, 8, 4), registers=250, shared=147_456),
        Screened("lora_gemm", Tile(64, 128, 64, 16, 4, 4), registers=168, shared=73_728),
        Screened("lora_gemm", Tile(256, 128, 64, 16, 8, 4), registers=250, spilled=4, shared=147_456),
    ]
    made = rows.screened(found, "lora_gemm", 80)
    assert made[-1] == Row("lora_gemm", 80, Tile(128, 256, 64, 16, 8, 4), m=ANY, n=ANY, r=ANY)
    assert all(row.tile != found[2].tile for row in made), "what spills is never a row"
    assert rows.screened([], "lora_gemm", 80) == []


def test_occupancy_is_the_scarcest_of_three():
    assert model.occupancy(registers=255, shared=1000, warps=8) == 1
    assert model.occupancy(registers=128, shared=1000, warps=4) == 4
    assert model.occupancy(registers=32, shared=82_000, warps=4) == 2
    assert model.occupancy(registers=32, shared=0, warps=8) == 8


def test_the_model_knows_the_floors_and_the_waves():
    """Never below 312 TFLOP/s or 2.04 TB/s; 109 programs take two rounds of 108 multiprocessors."""
    meta = torch.device("meta")
    tile = Tile(128, 256, 64, 16, 8, 4)
    for one in calls.MODELS.values():
        for call in calls.of_model(one, 4096, 16, torch.bfloat16, meta):
            if call.kernel == "lora_gemm":
                assert model.milliseconds(call, tile, 250, 147_456) > 2e3 * call.m * call.n * call.k / 312e12
            if call.kernel == "swiglu_reduce":
                bound = 1e3 * 10 * call.m * call.n / 2.04e12
                assert model.milliseconds(call, Tile(32, 64, 1, 16), 200, 30_000) > bound

    def one_tile_each(n):
        return model.milliseconds(
            Call("lora_gemm", torch.bfloat16, meta, 128 * n, 256, 4096, 16, 1), tile, 250, 147_456
        )

    assert one_tile_each(108) < 1.02 * one_tile_each(90) and one_tile_each(109) > 1.5 * one_tile_each(108)


def _first_step():
    """A fresh process: patch, one layer's training step, every launch compiled for an A100 that is not there."""
    import fastlora.kernels.swiglu
    from bench import layer
    from bench.launches import Count
    from bench.models import shape
    from fastlora.kernels import _tiles
    from fastlora.tuning import measure
    from fastlora.tuning.aot import compiling

    def never(*args, **kwargs):
        raise AssertionError("a search")

    for module, name in ((screen, "compile_one"), (screen, "screen"), (measure, "measure"), (measure, "tune")):
        setattr(module, name, never)
    one = layer.Layer(layer.BY_NAME["fastlora"], shape("7b"), torch.bfloat16, 4096, 16)
    launched = []
    with compiling(80) as compiled:
        compile_ = fastlora.kernels.swiglu.launch

        def launch(kernel, grid, *args, **meta):
            launched.append(kernel.fn.__name__)
            compile_(kernel, grid, *args, **meta)

        with layer.traced(Count(one.x.device.type), launch):
            one.backward(one.forward())
            first = len(compiled), len(launched)
    kernels = sorted({found.kernel for found in compiled.values()})
    return kernels, first, _tiles.autotune


def test_patch_and_the_first_step_compile_what_they_launch_and_search_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FASTLORA_AUTOTUNE", raising=False)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        kernels, (compiled, launched), autotune = pool.submit(_first_step).result()
    assert kernels == [
        "_lora_gemm_kernel",
        "_lora_gemm_t_kernel",
        "_lora_project_kernel",
        "_lora_project_t_kernel",
        "_lora_reduce_kernel",
        "_lora_reduce_t_kernel",
        "_rms_norm_bwd_kernel",
        "_rope_kernel",
        "_swiglu_bwd_reduce_kernel",
    ]
    assert 0 < compiled <= launched, "no program is compiled that is not launched"
    assert autotune is None
    assert not list(tmp_path.iterdir()), "nothing was measured, and nothing kept"
