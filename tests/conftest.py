"""Every test runs on one thread, from one seed, with uninitialised memory full of NaN.

The poison is PyTorch's own: under deterministic algorithms every empty float tensor is filled with NaN, whether Python,
ATen or csrc allocates it. An output that a kernel forgets to write is then seen.

`pytest tests/ops --device cuda` runs the operators' tests on a GPU: CUDA is the default device (on_gpu.py).
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRET:
    # Whatever the rows of an architecture choose, what is interpreted is the Triton program.
    os.environ.setdefault("FASTLORA_GEMM", "triton")
    import bf16_interpreter

    bf16_interpreter.install()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the tests of tests/ops run")


def pytest_configure(config: pytest.Config) -> None:
    if on_gpu(config):  # before a module of tests is read: some make tensors right there
        from on_gpu import begin

        begin(config)


def on_gpu(config: pytest.Config) -> bool:
    return config.getoption("--device", default="cpu") == "cuda"


def cpu_kernels() -> str:
    """What the CPU key runs in this process: "csrc", "aten" or "triton (interpreter)"."""
    from fastlora.kernels import _library, rms_norm  # noqa: F401  the operator must be registered to be asked about

    return _library.runs_on_cpu("rms_norm_fwd")


@pytest.fixture(scope="session")
def backend() -> str:
    return cpu_kernels()


def pytest_report_header(config: pytest.Config) -> str:
    if on_gpu(config):
        from on_gpu import header

        return header()
    return f"fastlora on the CPU: {cpu_kernels()}"


@pytest.fixture(autouse=True, scope="session")
def _one_thread_and_poison():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
