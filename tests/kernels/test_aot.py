"""No kernel spills registers or asks for more shared memory than an A100 or H100 has, in any layer of Llama 2.

`pytest -s tests/kernels` prints what each takes.
"""

import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton")

from kernels.launches import LAUNCHES, resources

from fastlora.tuning.aot import SHARED_LIMIT

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
