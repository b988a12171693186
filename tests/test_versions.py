"""Which versions are known, and what is said of a newer one."""

import logging
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from torch import nn

import fastlora
from fastlora import _versions
from fastlora._versions import KNOWN, Known, release, warn_if_newer

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("found", "numbers"),
    [("2.13.0+cpu", (2, 13)), ("5.25.0.dev0", (5, 25)), ("5.25rc1", (5, 25)), ("0.21.2", (0, 21)), ("main", ())],
)
def test_release(found, numbers):
    assert release(found) == numbers


@pytest.mark.parametrize(
    ("found", "too_old", "too_new"),
    [
        ("4.56.9", True, False), ("4.57.0", False, False), ("5.9.1", False, False), ("5.24.7", False, False),
        ("5.25.0.dev0", False, True), ("5.100", False, True), ("6.0", False, True), ("main", False, False),
    ],
)  # fmt: skip
def test_what_is_known(found, too_old, too_new):
    known = Known("4.57", "5.24")
    assert (known.too_old(found), known.too_new(found)) == (too_old, too_new)


@pytest.fixture
def installed(monkeypatch, caplog):
    """What is logged by two calls where this version of transformers, or this error, is what is found."""

    def warnings(found, call=warn_if_newer):
        def version(name):
            assert name == "transformers"
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(_versions, "version", version)
        warn_if_newer.cache_clear()
        with caplog.at_level(logging.WARNING, logger="fastlora"):
            call()
            call()
        return [record.getMessage() for record in caplog.records if record.name == "fastlora"]

    yield warnings
    warn_if_newer.cache_clear()


def test_a_newer_transformers_is_said_once(installed):
    major, minor = release(KNOWN["transformers"].newest)
    (text,) = installed(f"{major}.{minor + 1}.0")
    assert f"transformers {major}.{minor + 1}.0 is newer than {major}.{minor}, " in text
    assert "fastlora.verify(model, batch)" in text and f"pip install 'transformers=={major}.{minor}.*'" in text


def test_patch_says_so(installed):
    """Whatever the model."""
    texts = installed("99.0", lambda: fastlora.patch(nn.Linear(1, 1)))
    assert ["99.0" in text for text in texts].count(True) == 1


@pytest.mark.parametrize("found", [KNOWN["transformers"].newest + ".9", "4.57.1", "main", PackageNotFoundError()])
def test_no_other_is(found, installed):
    assert installed(found) == []


def test_what_is_required_is_the_oldest_known():
    dependencies = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = ")[2].partition("]")[0]
    required = dict(re.findall(r'"(\w+)>=([\d.]+)', dependencies))
    assert required == {name: known.oldest for name, known in KNOWN.items()}
    major, minor = release(KNOWN["torch"].oldest)
    assert f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}0" in (ROOT / "setup.py").read_text()


def test_what_ci_runs_is_known():
    locked = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for name, known in KNOWN.items():
        assert not known.too_old(locked[name]) and not known.too_new(locked[name]), name
