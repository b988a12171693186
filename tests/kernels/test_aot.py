"""No kernel spills registers or asks for more shared memory than an A100 or H100 has, in any layer of Llama 2.

`pytest -s tests/kernels` prints what each takes.
"""

import itertools
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton")

from kernels.launches import LAUNCHES, MODELS, resources

from fastlora.kernels import _tiles
from fastlora.kernels._rows import ANY
from fastlora.tuning import screen
from fastlora.tuning.aot import SHARED_LIMIT, cuobjdump

ARCHS = (80, 90)


# What launches the tiles that sm_86 and sm_89 do not share with sm_80.
SMALLER = ("bfloat16, float32 adapters of rank 128", "attention, other heads", "attention, fp32")


@pytest.fixture(scope="module")
def compilations():
    """All of them at once, on all processors; LAUNCHES that no test asks for are not waited for."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        found = {key: pool.submit(resources, *key) for key in itertools.product(ARCHS, LAUNCHES)}
        found |= {(86, name): pool.submit(resources, 86, name, is_of_sm_80) for name in SMALLER}
        yield found
        pool.shutdown(wait=False, cancel_futures=True)


def is_of_sm_80(row, tile):
    return not row or tile in {one.tile for one in screen.shipped_rows(80, [row]) if one.m == ANY}


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("arch", ARCHS)
def test_fits_the_registers_and_the_shared_memory_of(arch, name, compilations):
    compiled = compilations[arch, name].result()
    print("", *compiled, sep="\n")
    assert compiled
    over = [str(one) for one in compiled if one.spilled or one.shared > SHARED_LIMIT[arch]]
    assert not over, "\n".join(["over the limits:", *over])


def test_every_row_is_among_them(monkeypatch):
    """But those for short batches, which are tests/tuning/test_screen.py's."""
    seen = set()

    def launch(*_, choice=None, **meta):
        if choice is not None:
            seen.add((_tiles.row_name(choice.call), choice.tile))

    for name, module in list(sys.modules.items()):
        if name.startswith("fastlora.kernels.") and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setenv("FASTLORA_GEMM", "triton")
    for function, arguments in LAUNCHES.values():
        for model, one in itertools.product(MODELS, arguments):
            function(model, *one)
    assert {(row.kernel, row.tile) for row in screen.shipped_rows(80, screen.kernels()) if row.m == ANY} <= seen


def test_every_row_fits_sm_86_and_sm_89(compilations):
    """They have one set of rows, and the same limits. A tile that sm_80 has too takes what it takes there."""
    kernels = screen.kernels()
    rows = {(row.kernel, row.tile) for row in screen.shipped_rows(86, kernels) if not is_of_sm_80(row.kernel, row.tile)}
    assert screen.shipped_rows(86, kernels) == screen.shipped_rows(89, kernels) and len(rows) > 4
    own = [one for name in SMALLER for one in compilations[86, name].result()]
    shared = [one for name in LAUNCHES for one in compilations[80, name].result()]
    shared = [one for one in shared if one.tile in {row.tile for row in screen.shipped_rows(86, [one.row])}]
    assert {(row.kernel, row.tile) for row in screen.shipped_rows(86, kernels)} <= {
        (c.row, c.tile) for c in own + shared
    }
    over = [str(one) for one in own + shared if one.spilled or one.shared > SHARED_LIMIT[86]]
    assert not over, "\n".join(["over the limits:", *over])


# The multiplier of Philox.
PHILOX = "0xd2511f53"


@pytest.mark.parametrize("name", ["attention", "attention, dropout"])
def test_attention_on_sm_80_takes_tensor_cores_and_asynchronous_copies(name, compilations):
    """And draws no random number without dropout."""
    found = compilations[80, name].result()
    assert {one.kernel for one in found} == {f"flash_attention_{kernel}_kernel" for kernel in ("fwd", "dq", "dkdv")}
    for one in found:
        code = cuobjdump(one.cubin, "-sass")
        assert "HMMA.16816.F32" in code and "LDGSTS" in code, str(one)
        assert (PHILOX in code.lower()) == (name == "attention, dropout"), str(one)
