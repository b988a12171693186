"""setup.py where csrc cannot be built, and the words with which fastlora says so."""

import os
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastlora.kernels import _library

ROOT = Path(__file__).parents[2]
COMMAND = "pip install --no-build-isolation --no-deps --force-reinstall"


def setup(where: Path, **environment) -> subprocess.CompletedProcess[str]:
    """``setup.py build`` with no program on the PATH, a compiler or ninja least of all."""
    pytest.importorskip("setuptools", "77", reason="an older one does not read our pyproject.toml")
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "FASTLORA_BUILD_CSRC")}
    arguments = (
        "egg_info",
        "--egg-base",
        where,
        "build",
        "--build-base",
        where / "build",
        "--build-lib",
        where / "lib",
    )
    return subprocess.run(
        [sys.executable, ROOT / "setup.py", "-q", *arguments],
        env={**kept, "PATH": str(where), **environment}, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture
def no_torch(tmp_path):
    """As under pip's build isolation."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    return {"PYTHONPATH": str(tmp_path)}


def assert_pure(done: subprocess.CompletedProcess[str], where: Path, why: str) -> None:
    assert done.returncode == 0, done.stderr
    assert f"fastlora: C++ CPU kernels not built: {why}" in done.stderr
    assert f"To build them: {COMMAND} ." in done.stderr
    assert (where / "lib/fastlora/ops/swiglu.py").exists() and not list(where.rglob("*.so"))


def test_without_a_compiler(tmp_path):
    assert_pure(setup(tmp_path), tmp_path, "the compiler failed")


def test_without_torch(tmp_path, no_torch):
    assert_pure(setup(tmp_path, **no_torch), tmp_path, "torch is not importable here")
    assert setup(tmp_path, FASTLORA_BUILD_CSRC="1", **no_torch).returncode != 0


def test_the_isolated_build_fetches_no_torch():
    """Build requirements are downloaded for every source install."""
    requires = (ROOT / "pyproject.toml").read_text().partition("requires = ")[2].partition("]")[0]
    assert "setuptools" in requires and "torch" not in requires


def installed(record):
    def distribution(name):
        if record is None:
            raise PackageNotFoundError(name)
        return SimpleNamespace(read_text=lambda file: record)

    return distribution


@pytest.mark.parametrize(
    ("record", "source"),
    [
        ('{"dir_info": {}, "url": "file:///home/me/my%20clone"}', "'/home/me/my clone'"),
        ('{"archive_info": {}, "url": "file:///tmp/fastlora-0.1.0-py3-none-any.whl"}', ". (in a clone of fastlora)"),
        ("", ". (in a clone of fastlora)"),
        (None, ". (in a clone of fastlora)"),
    ],
)
def test_the_command_names_where_fastlora_came_from(record, source, monkeypatch, tmp_path, caplog):
    """And the log has it, where the package has no csrc."""
    monkeypatch.setattr(_library, "EXTENSION", tmp_path / "site-packages/fastlora/_C.abi3.so")
    monkeypatch.setattr(_library, "distribution", installed(record))
    monkeypatch.setattr(_library, "INTERPRET", False)
    monkeypatch.delenv("FASTLORA_CSRC", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert _library._load_extension() == f"not built; to build them: {COMMAND} {source}"
    (line,) = caplog.messages
    assert line == f"ATen compositions serve on the CPU, C++ kernels are not built; to build them: {COMMAND} {source}"


def test_the_command_in_a_clone(monkeypatch, tmp_path):
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(_library, "EXTENSION", tmp_path / "fastlora/_C.abi3.so")
    assert _library.build_command() == f"{COMMAND} -e {shlex.quote(str(tmp_path))}"
