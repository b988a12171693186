"""What `--device cuda` changes: where tensors are made, what runs, and how a failure is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

OPS = Path(__file__).resolve().parent / "ops"


def begin(config: pytest.Config) -> None:
    """Make CUDA the default device of this process, and OnGPU its plugin. Before anything starts CUDA."""
    if not torch.cuda.is_available():
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        raise pytest.UsageError(f"--device cuda: PyTorch sees no GPU here (torch {torch.__version__}, built {build})")
    # The suite asks for deterministic algorithms, and cuBLAS has them with a workspace of a fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Whatever the rows of an architecture choose, or `fastlora tune` measured here, what is tested are the Triton
    # programs in the tiles that are shipped.
    os.environ.setdefault("FASTLORA_GEMM", "triton")
    os.environ.setdefault("FASTLORA_CACHE_DIR", os.devnull)
    torch.set_default_device("cuda")
    config.pluginmanager.register(OnGPU(config), "on_gpu")


def header() -> str:
    import triton

    major, minor = torch.cuda.get_device_capability()
    gemm = os.environ["FASTLORA_GEMM"]
    software = f"torch {torch.__version__}, triton {triton.__version__}, FASTLORA_GEMM={gemm}"
    return f"fastlora on {torch.cuda.get_device_name()}, sm_{major}{minor}: {software}"


def first_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    """What went wrong, in at most 200 characters."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash is not None else report.longreprtext).strip().splitlines()
    # A module that cannot be imported has no crash, but its traceback marks the error.
    marked = [line[1:] for line in lines if line.startswith("E ")]
    return (marked or lines or [""])[0].strip()[:200]


class OnGPU:
    def __init__(self, config: pytest.Config) -> None:
        self.config, self.failed = config, False
        self.is_worker = hasattr(config, "workerinput")  # of pytest-xdist

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """The operators' tests alone: the others make their tensors where they test them."""
        return True if collection_path.suffix == ".py" and OPS not in collection_path.resolve().parents else None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if (marker := item.get_closest_marker("cpu_only")) is not None:
                item.add_marker(pytest.mark.skip(reason=f"--device cuda: {marker.kwargs['reason']}"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self):
        from fastlora.kernels import _tiles

        try:
            result = yield
            # What goes wrong on the device is told to who waits for it next: here, and not in another test.
            torch.cuda.synchronize()
        finally:
            lost = _tiles.given_up()
            if lost:  # the next test tries them again
                _tiles._broken.clear()
                _tiles.forget()
        if lost:
            # Another tile or the composition has served in its place, and would hide it.
            pytest.fail(f"a tile that does not run here: {'; '.join(lost)}", pytrace=False)
        return result

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._tell(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._tell(report)

    def _tell(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """At once, and not in a summary that a run which is stopped never comes to."""
        self.failed |= report.failed
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None and not self.is_worker:
            terminal.write_line(f"FAILED {report.nodeid}: {first_line(report)}")
            terminal.flush()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """After an illegal access every call of CUDA fails in this process: no more tests in it."""
        if not self.failed:
            return
        self.failed = False
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if self.is_worker:
                os._exit(1)  # pytest-xdist starts another in its place
            pytest.exit(
                f"after {nodeid} the device is lost to this process: {str(error).splitlines()[0]}", returncode=1
            )
