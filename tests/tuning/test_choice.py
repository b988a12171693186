"""The one function that says which implementation runs, in which tile, and why."""

import logging

import pytest
import torch

from fastlora.kernels import _library, _tiles, _tl, swiglu
from fastlora.kernels._rows import ANY, ROWS, Measured, Row, Tile
from fastlora.kernels._tiles import Call, NothingLeft, answer, assumed_arch, choose, forced
from fastlora.tuning import calls

META = torch.device("meta")
X = torch.empty(0, dtype=torch.bfloat16, device="meta")


@pytest.fixture(autouse=True)
def _nothing_broken(monkeypatch):
    monkeypatch.delenv("FASTLORA_GEMM", raising=False)
    monkeypatch.setattr(_tiles, "_broken", set())
    _tiles.forget()
    yield
    _tiles.forget()


def test_every_kernel_has_a_default_row_without_bounds():
    for kernel in {row.kernel for row in ROWS}:
        for arch in {row.arch for row in ROWS if row.kernel == kernel} | {0}:
            last = [row for row in ROWS if (row.kernel, row.arch) == (kernel, arch)][-1]
            assert (last.m, last.n, last.r) == (ANY, ANY, ANY), f"{kernel} of {arch} ends with bounds"


def test_no_row_is_hidden_by_one_before_it():
    for i, row in enumerate(ROWS):
        for before in ROWS[:i]:
            same = (before.kernel, before.arch) == (row.kernel, row.arch)
            assert not same or before.m < row.m or before.n < row.n or before.r < row.r, f"{row} is never reached"


@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 120])
def test_every_call_of_llama_2_has_a_row(arch):
    with assumed_arch(arch):
        for model in calls.MODELS.values():
            for tokens in (1, *calls.TOKENS, 10**6):
                for rank in calls.RANKS:
                    for dropout in (False, True):
                        for call in calls.of_model(model, tokens, rank, torch.bfloat16, META, dropout):
                            choice = answer(call)
                            assert (
                                choice.source in ("screened", "the safe bet, not measured")
                                or "measured on" in choice.source
                            )


def test_the_first_row_that_holds_a_call_serves(monkeypatch):
    small, wide, last = Tile(m=1), Tile(m=2), Tile(m=3)
    rows = [Row("k", 80, small, m=1024, r=48), Row("k", 80, wide, m=1024), Row("k", 80, last)]
    monkeypatch.setitem(_tiles._by_kernel, "k", {80: rows})

    def tile(m, r):
        return answer(Call("k", torch.bfloat16, META, m, r=r)).tile

    assert (tile(1024, 48), tile(1024, 49), tile(1025, 48)) == (small, wide, last)


def test_a_variable_forces_and_is_named(monkeypatch):
    assert choose("lora_gemm", X, m=4096, r=16).method == "triton"
    monkeypatch.setenv("FASTLORA_GEMM", "augmented")
    forced_one = choose("lora_gemm", X, m=4096, r=16)
    assert (forced_one.method, forced_one.source) == ("augmented", "FASTLORA_GEMM=augmented")
    assert choose("swiglu", X, n=1).method == "triton", "a variable of another kernel"
    monkeypatch.setenv("FASTLORA_GEMM", "cublas")
    with pytest.raises(ValueError, match="FASTLORA_GEMM is 'cublas', needs 'triton', 'addmm' or 'augmented'"):
        choose("lora_gemm", X, m=4096, r=16)


def test_another_architecture_takes_its_own_rows(monkeypatch):
    assert choose("lora_gemm", X, m=4096, r=16).method == "triton"
    monkeypatch.setenv("TRITON_OVERRIDE_ARCH", "sm90a")
    _tiles.forget()
    assert choose("lora_gemm", X, m=4096, r=16).method == "addmm"


class _Fails:
    """Stands for a Triton kernel: raises what it is given for the tiles it is given, and counts."""

    def __init__(self, error, blocks):
        self.error, self.blocks, self.launched = error, blocks, []
        self.fn = self

    def __getitem__(self, grid):
        def run(*args, BLOCK, **meta):
            self.launched.append(BLOCK)
            if BLOCK in self.blocks:
                raise self.error

        return run


def _swiglu(monkeypatch, error, blocks):
    """The registered CUDA launcher of swiglu over a kernel that fails, on tensors without memory."""
    kernel = _Fails(error, blocks)
    monkeypatch.setattr(swiglu, "_swiglu_fwd_kernel", kernel)
    launcher, _ = _library.implementations["swiglu_fwd"]
    run = _library._with_fallback(launcher, lambda gate, up: "aten")
    x = torch.empty(8, 64, dtype=torch.bfloat16, device="meta")
    return kernel, lambda: run(x, x)


def _out_of_resources():
    return _tl.triton.OutOfResources(200_000, 166_912, "shared memory")


TWO = [Row("swiglu", 80, Tile(n=2048)), Row("swiglu", 0, Tile(n=1024))]


def test_a_tile_that_does_not_launch_gives_way_to_the_next_once(monkeypatch, caplog):
    monkeypatch.setitem(_tiles._by_kernel, "swiglu", {80: TWO[:1], 0: TWO[1:]})
    kernel, run = _swiglu(monkeypatch, _out_of_resources(), {2048})
    with caplog.at_level(logging.WARNING, "fastlora"):
        run(), run()
    assert kernel.launched == [2048, 1024, 1024], "remembered: the second call does not try it again"
    (warning,) = caplog.records
    text = warning.getMessage()
    assert "triton 2048 4w does not run here: OutOfResources" in text and "triton 1024 4w (screened) serves" in text


def test_when_no_tile_runs_the_composition_does(monkeypatch, caplog):
    monkeypatch.setitem(_tiles._by_kernel, "swiglu", {80: TWO[:1], 0: TWO[1:]})
    kernel, run = _swiglu(monkeypatch, _out_of_resources(), {1024, 2048})
    assert (run(), run()) == ("aten", "aten")
    assert kernel.launched == [2048, 1024]
    assert "aten (no tile runs here) serves" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)"),
        TypeError("a user's"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:40],
)
def test_what_is_not_the_tiles_fault_passes_through(error, monkeypatch, caplog):
    kernel, run = _swiglu(monkeypatch, error, {1024})
    with pytest.raises(type(error)):
        run()
    assert len(kernel.launched) == 1 and not caplog.records and not _tiles._broken


@pytest.mark.parametrize(
    "error", [RuntimeError("Triton Error [CUDA]: invalid argument"), RuntimeError("PassManager::run failed")]
)
def test_a_refused_launch_and_a_failed_compilation_are(error, monkeypatch):
    _, run = _swiglu(monkeypatch, error, {1024})
    assert run() == "aten"


def test_the_library_is_the_last_candidate_of_a_wide_product():
    call = Call("lora_gemm", torch.bfloat16, META, 4096, 4096, 4096, 16, 1)
    every = list(_tiles.candidates(call))
    assert every[0].method == "triton" and every[-1].method == "addmm"
    for choice in every[:-1]:
        _tiles._broken.add(("lora_gemm", META, choice.method, choice.tile))
    _tiles.forget()
    assert choose("lora_gemm", X, m=4096, n=4096, k=4096, r=16, p=1).method == "addmm"


def test_a_composition_that_was_measured_to_be_faster_is_taken():
    with forced("swiglu", "aten", Tile(n=1024)), pytest.raises(NothingLeft):
        choose("swiglu", X, n=64)


def test_a_provenance_says_what_was_measured():
    row = Row("k", 80, Tile(), provenance=Measured("A100", "2026-01-02", "2.13.0", "3.9.0", 1.25, "addmm", 1.5))
    assert row.source == "measured on A100, 2026-01-02, torch 2.13.0, triton 3.9.0: 1.25 ms, addmm 1.5 ms"


def test_asking_again_is_a_look_up():
    """Not one row is read the second time."""
    choose("lora_gemm", X, m=4096, n=4096, k=4096, r=16, p=1)
    before = _tiles._choose.cache_info()
    choose("lora_gemm", X, m=4096, n=4096, k=4096, r=16, p=1)
    after = _tiles._choose.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


@pytest.mark.parametrize("kernel", ["lora_gemm", "lora_gemm_t_dropout", "lora_project", "rms_norm_reduce"])
def test_on_a_gpu_fp32_products_are_the_librarys(kernel, monkeypatch):
    """Which adds up in parts; not where the tensor cores round more than either, nor where the user wants the kernel."""
    call = Call(kernel, torch.float32, torch.device("cuda"), 64, 64, 64, 16, 1)
    monkeypatch.setattr(_tiles, "_measured", lambda call: None)
    monkeypatch.setattr(_tiles, "tf32", lambda: False)
    with _tiles.assumed_arch(90):
        assert _tiles.answer(call).method == "aten"
        assert _tiles.answer(call._replace(dtype=torch.bfloat16)).source != _tiles.answer(call).source
        assert _tiles.answer(call._replace(kernel="flash_attention_fwd_d64")).method == "triton"
        assert _tiles.answer(call._replace(device=torch.device("cpu"))).method != "aten", (
            "tests of the kernels run there"
        )
        if kernel == "lora_gemm":
            monkeypatch.setenv("FASTLORA_GEMM", "triton")
            assert _tiles.answer(call).method == "triton"
            monkeypatch.delenv("FASTLORA_GEMM")
        monkeypatch.setattr(_tiles, "tf32", lambda: True)
        assert _tiles.answer(call).method != "aten"
