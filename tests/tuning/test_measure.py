"""Measuring, rehearsed on the CPU: parity first, every candidate, an entry that makes a row."""

import json

import pytest
import torch

from fastlora.kernels import _cache, _tiles
from fastlora.kernels._rows import ANY, Measured, Row, Tile
from fastlora.kernels._tiles import Call
from fastlora.tuning import calls, measure, rows

CPU = torch.device("cpu")
TINY = calls.Model(64, 176, 2, 1)


def _calls(dtype=torch.bfloat16, dropout=False):
    every = calls.of_model(TINY, 24, 8, dtype, CPU, dropout) + calls.of_attention(TINY, 24, dtype, CPU, dropout)
    return every + calls.beside(TINY, 24, dtype, CPU)


@pytest.mark.parametrize("dropout", [False, True])
def test_every_call_is_right_and_is_timed(dropout):
    for call in _calls(dropout=dropout):
        entry = measure.measure(call, seconds=0)
        names = {str(one) for one in measure.candidates(call)}
        assert set(entry["all"]) == names and not entry["refused"]
        alone = call.kernel.startswith("flash_attention")  # SDPA is beside all its kernels together: "attention"
        assert alone or len(names) > 1, "the library's way is always a candidate"
        assert entry["ms"] == min(entry["all"].values()) and entry["runner_up"] in names
        json.dumps(entry)


def _wrong(kernel, output):
    """The truth of a kernel with one column of one output perturbed, of a flat one one element in 64."""

    def perturbed(*arguments):
        found = list(kernel.truth(*arguments))
        one = found[output].clone()
        where = one[::64] if one.dim() == 1 else one[:, :1]
        where.copy_(where * 1.5 + one.abs().mean())
        found[output] = one
        return found

    return kernel._replace(truth=perturbed)


def test_a_wrong_result_is_refused(monkeypatch):
    seen = set()
    for call in _calls():
        if call.kernel in seen:
            continue
        seen.add(call.kernel)
        kernel = calls.KERNELS[call.kernel]
        outputs = len(kernel.truth(*kernel.arguments(call, measure._new(call))))
        for i in range(outputs):
            if call.kernel in ("lora_reduce", "lora_reduce_t", "swiglu"):
                continue  # flat: one element in many is no column; below
            monkeypatch.setitem(calls.KERNELS, call.kernel, _wrong(kernel, i))
            with pytest.raises(measure.Refused, match=f"output {i} is"):
                measure.measure(call, seconds=0)
            monkeypatch.setitem(calls.KERNELS, call.kernel, kernel)


def test_a_candidate_that_cannot_run_leaves_the_others(monkeypatch):
    """As one that a CUDA graph cannot hold."""
    call = next(call for call in _calls() if call.kernel == "lora_gemm_t")

    def run(*arguments):
        if _tiles._forced["lora_gemm_t"][0] == "addmm":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return torch.ops.fastlora.lora_gemm_t(*arguments)

    monkeypatch.setattr(calls.Kernel, "run", property(lambda self: run))
    entry = measure.measure(call, seconds=0)
    assert entry["refused"] == {"addmm": "operation not permitted when stream is capturing"}
    assert entry["method"] == "triton" and "addmm" not in entry["all"]


def test_nan_is_refused():
    call = Call("lora_reduce", torch.bfloat16, CPU, 64, 64, 0, 8, 1)
    truth = [torch.ones(8, dtype=torch.float64)]
    measure.check(torch.ones(8), truth, call)
    with pytest.raises(measure.Refused):
        measure.check(torch.full((8,), float("nan")), truth, call)
    with pytest.raises(measure.Refused):
        measure.check(torch.ones(8) * 1.001, truth, call)


def test_what_is_kept_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path))
    of = _calls()[:3]
    first = list(measure.tune(of, "here", measure=lambda call: measure.measure(call, seconds=0)))

    def never(call):
        raise AssertionError("measured again")

    assert list(measure.tune(of, "here", measure=never)) == first
    with pytest.raises(AssertionError):
        list(measure.tune(of, "here", again=True, measure=never))


def test_measured_rows_are_python_and_say_where_from():
    entry = {
        "method": "triton", "tile": [128, 256, 64, 16, 8, 4], "ms": 1.5, "runner_up": "addmm", "runner_up_ms": 1.6,
        "date": "2026-01-02", "call": [4096, 12288, 4096, 48, 3],
    }  # fmt: skip
    small = entry | {"tile": [64, 128, 64, 16, 4, 4], "call": [512, 12288, 4096, 48, 3]}
    entries = {"lora_gemm bfloat16 a": entry, "lora_gemm bfloat16 b": small, "lora_gemm float32 c": small}
    made = rows.of_environment("GPU X sm_90, driver 1, torch 2.13.0, triton 3.9.0, fastlora 0.1.0", entries)
    assert [(row.m, row.n, row.r, row.tile.m) for row in made] == [(512, 12288, 48, 64), (ANY, ANY, ANY, 128)]
    for row in made:
        (again,) = eval(rows.source(row))
        assert again == row
    assert made[0].provenance == Measured("GPU X", "2026-01-02", "2.13.0", "3.9.0", 1.5, "addmm", 1.6)


def test_rows_that_say_the_same_are_one():
    a, b = Tile(m=1), Tile(m=2)
    made = rows.merged([Row("k", 80, a, m=1), Row("k", 80, a, m=2), Row("k", 80, b, m=3), Row("k", 80, b, m=4)])
    assert [(row.tile, row.m) for row in made] == [(a, 2), (b, ANY)]


def test_the_table_has_losses_too():
    call = _calls()[0]
    entry = {"all": {"aten": 1.0, "triton 64 4w": 2.0, "triton 32 4w": 3.0}}
    (line,) = rows.table([(call, entry)])
    assert line[-1] == "2.00" and "aten" in line


def test_autotuning_measures_a_call_when_it_first_comes_up(monkeypatch, tmp_path):
    """And never without being asked: patch installs it where FASTLORA_AUTOTUNE=1."""
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_tiles, "arch", lambda device: 80)
    monkeypatch.setattr(_cache, "environment", lambda device, arch: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    measured = []

    def fake(call, seconds):
        measured.append(call)
        return {"method": "aten", "tile": [1, 512, 1, 64, 4, 2], "date": "today"}

    monkeypatch.setattr(measure, "measure", fake)
    monkeypatch.setattr(_tiles, "autotune", None)
    _tiles.forget()
    gpu = torch.device("cuda", 0)
    arguments = ("swiglu", torch.bfloat16, gpu, 0, 64, 0, 0, 0, None, None, False)
    assert _tiles._choose(*arguments).source == "screened" and not measured
    _tiles.forget()
    measure.install()
    assert _tiles._choose(*arguments).source == "measured here, today"
    assert _tiles._choose(*arguments).method == "aten" and len(measured) == 1
    _tiles.forget()
    assert _tiles._choose(*arguments).method == "aten" and len(measured) == 1, "read, not measured again"
    _tiles.forget()
