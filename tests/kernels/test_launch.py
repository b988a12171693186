"""A kernel that ran before is started without asking Triton again, and only where Triton would not compile anew."""

import itertools
import os
from types import SimpleNamespace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton")

import triton

from fastlora.kernels import _tl, swiglu
from fastlora.kernels._rows import Tile
from fastlora.kernels._tiles import Call, Choice
from fastlora.kernels._tl import kinds, launch
from fastlora.tuning import aot

STORAGE = torch.zeros(64, dtype=torch.bfloat16)
ALIGNED, SHIFTED = STORAGE, STORAGE[1:]
assert ALIGNED.data_ptr() % 16 == 0
VALUES = (ALIGNED, SHIFTED, ALIGNED.half(), None, True, 0.5, 1, 15, 16, 17, 0, -1, -16, 2**31 - 16, 2**31, -(2**31), 2**40,
          2**63, (ALIGNED, SHIFTED), (ALIGNED, ALIGNED), (1, 16), (16, 16), (15, 16), (None, 16))  # fmt: skip


def test_arguments_of_one_kind_are_compiled_to_one_kernel():
    driver = triton.runtime.driver
    driver.set_active(aot.Driver(90))
    try:
        *_, binder = swiglu._swiglu_fwd_kernel.device_caches[90]
        # gate; the other arguments stay as they are.
        rest = [16] * (len(swiglu._swiglu_fwd_kernel.arg_names) - 1)
        specialised = [repr(binder(value, *rest)[1]) for value in VALUES]
    finally:
        driver.set_active(None)
    for (value, one), (other, two) in itertools.combinations(zip(VALUES, specialised, strict=True), 2):
        assert one == two or kinds((value,)) != kinds((other,)), (value, other)
    assert kinds((3, 32)) == kinds((5, 48))  # or every length would be kept by itself


class OnGPU(torch.Tensor):
    """A tensor that says where it is."""

    device = torch.device("cuda", 0)


class Kernel:
    """Stands for a kernel of Triton's: what is asked of it, and what is started."""

    arg_names = ("p_x", "n", "BLOCK")

    def __init__(self):
        self.asked, self.started, self.pre_run_hooks = [], [], []

    def __getitem__(self, grid):
        def ask(*args, **meta):
            self.asked.append((grid, args, meta))
            return SimpleNamespace(run=lambda *words: self.started.append(words), function="f", packed_metadata="m")

        return ask


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(_tl, "_loaded", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    return Kernel()


def x(dtype=torch.float32):
    return torch.zeros(16, dtype=dtype).as_subclass(OnGPU)


def choice(warps):
    return Choice(Call("k", torch.float32, x().device), "triton", Tile(warps=warps), "")


def test_the_second_launch_is_started_with_all_that_triton_would_pass_on(kernel):
    first, second = x(), x()
    launch(kernel, (3,), first, 32, choice=choice(8), BLOCK=64)
    launch(kernel, (5, 2), second, 48, choice=choice(8), BLOCK=64)
    assert [grid for grid, _, _ in kernel.asked] == [(3,)]
    assert kernel.asked[0][2] == {"BLOCK": 64, "num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
    ((*started, pointer, n, block),) = kernel.started
    assert started == [5, 2, 1, 7, "f", "m", None, None, None] and pointer is second and (n, block) == (48, 64)


@pytest.mark.parametrize(
    "other", [
        lambda k: launch(k, (3,), x(torch.float16), 32, choice=choice(8), BLOCK=64),
        lambda k: launch(k, (3,), x(), 33, choice=choice(8), BLOCK=64),
        lambda k: launch(k, (3,), x(), 32, choice=choice(4), BLOCK=64),
        lambda k: launch(k, (3,), x(), 32, choice=choice(8), BLOCK=32),
    ], ids=["dtype", "divisibility", "warps", "block"],
)  # fmt: skip
def test_triton_is_asked_again(kernel, other):
    launch(kernel, (3,), x(), 32, choice=choice(8), BLOCK=64)
    other(kernel)
    assert len(kernel.asked) == 2 and not kernel.started


def test_whoever_watches_launches_sees_them_all(kernel):
    for _ in range(2):
        launch(kernel, (3,), x(), 32, BLOCK=64)
    kernel.pre_run_hooks.append(print)
    launch(kernel, (3,), x(), 32, BLOCK=64)
    assert (len(kernel.asked), len(kernel.started)) == (2, 1)


def test_another_current_device(kernel, monkeypatch):
    launch(kernel, (3,), x(), 32, BLOCK=64)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch(kernel, (3,), x(), 32, BLOCK=64)
    assert len(kernel.asked) == 2
