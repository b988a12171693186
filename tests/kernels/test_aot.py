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


@pytest.fixture(scope="module")
def compilations():
    """All of them at once, on all processors; LAUNCHES that no test asks for are not waited for."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield {key: pool.submit(resources, *key) for key in itertools.product(ARCHS, LAUNCHES)}
        pool.shutdown(wait=False, cancel_futures=True)


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
            seen.add((_tiles._row_name(choice.call), choice.tile))

    for name, module in list(sys.modules.items()):
        if name.startswith("fastlora.kernels.") and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setenv("FASTLORA_GEMM", "triton")
    for function, arguments in LAUNCHES.values():
        for model, one in itertools.product(MODELS, arguments):
            function(model, *one)
    kernels = set(screen.kernels()) - {"lora_gemm_rotary_fp32"}  # its tile holds no head of 128: lora_gemm's serves
    assert {(row.kernel, row.tile) for row in screen.shipped_rows(80, kernels) if row.m == ANY} <= seen


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
