"""tuning.json: read and written by many at once, and never in the way."""

import errno
import json
import logging
import multiprocessing
import os
import signal
import time

import pytest
import torch

from fastlora.kernels import _cache, _tiles
from fastlora.kernels._tiles import Call
from fastlora.tuning import measure

ENTRY = {"method": "triton", "tile": [64, 64, 64, 16, 4, 3], "ms": 1.0, "runner_up": "addmm", "date": "2026-01-01"}
CALLS = [Call("lora_gemm", torch.bfloat16, torch.device("meta"), 16 << i, 64, 64, 16, 1) for i in range(8)]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path))
    _cache.entries.cache_clear()
    monkeypatch.setattr(_cache, "_warned", set())
    yield
    _cache.entries.cache_clear()


def _tune(log, pause):
    """One of the processes: measures by writing a line to the log."""

    def fake(call):
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {call.m}\n")
        time.sleep(pause)
        return ENTRY | {"ms": float(call.m)}

    for _ in measure.tune(CALLS, "a GPU", measure=fake):
        pass
    for _ in measure.tune(CALLS, f"GPU of {os.getpid()}", measure=lambda call: ENTRY):
        pass


def test_eight_processes_at_once_and_one_killed(tmp_path):
    """Whoever comes first measures and the others read: the killed one's call is the only one measured twice."""
    log = tmp_path / "log"

    def start(pause):
        process = multiprocessing.get_context("fork").Process(target=_tune, args=(log, pause))
        process.start()
        return process

    victim = start(600)
    while not log.exists():  # then it is in the middle of a measurement, and holds the lock
        assert victim.is_alive()
        time.sleep(0.01)
    others = [start(0.01) for _ in range(7)]
    # Killed while the others wait for it, or are about to.
    os.kill(victim.pid, signal.SIGKILL)
    for process in (victim, *others):
        process.join(180)
    assert victim.exitcode == -signal.SIGKILL
    assert [process.exitcode for process in others] == [0] * 7
    found = json.loads((tmp_path / "tuning.json").read_text())["entries"]
    keys = {_cache.key(call) for call in CALLS}
    assert {key: entry["ms"] for key, entry in found["a GPU"].items()} == {_cache.key(c): float(c.m) for c in CALLS}
    for process in others:
        assert set(found[f"GPU of {process.pid}"]) == keys, "what one process stored, another lost"
    measured = [line.split()[1] for line in log.read_text().splitlines()]
    assert sorted(measured, key=int) == sorted([str(CALLS[0].m), *(str(call.m) for call in CALLS)], key=int)
    assert _cache.inspect()[1] is None
    assert not list(tmp_path.glob(".*")), "no half-written file is left"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"fastlora_tuning": 1, "entries": {"a G', "not JSON"),
        ("\x00\x01garbage", "not JSON"),
        ("", "not JSON"),
        ('{"some": "one else\'s"}', "not written by fastlora"),
        ('{"fastlora_tuning": 99, "entries": {}}', "of format 99"),
        ('{"fastlora_tuning": 1, "entries": {"a GPU": {"x": {"method": "triton", "tile": [0]}}}}', "damaged"),
        ('{"fastlora_tuning": 1, "entries": []}', "damaged"),
    ],
)
def test_a_file_that_is_not_ours_is_set_aside_with_one_warning(content, says, tmp_path, caplog):
    _cache.path().write_text(content)
    with caplog.at_level(logging.WARNING, "fastlora"):
        assert _cache.entries("a GPU") == {}
        assert _cache.entries("another GPU") == {}
    (warning,) = caplog.records
    assert says in warning.getMessage() and "shipped rows serve" in warning.getMessage()
    (aside,) = tmp_path.glob("tuning.json.bad-*")
    assert aside.read_text() == content
    assert _cache.store("a GPU", {"x": ENTRY})
    assert _cache.entries("a GPU") == {"x": ENTRY}


def test_bytes_that_are_not_text(tmp_path, caplog):
    _cache.path().write_bytes(b"\xff\xfe\x00\x80")
    assert _cache.entries("a GPU") == {}
    assert "not JSON" in caplog.text


def test_a_folder_that_cannot_be_written(monkeypatch, caplog):
    """As on a read-only file system; root writes where a mode forbids it."""
    _cache.store("a GPU", {"old": ENTRY})

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(_cache.Path, "open", refuse)
        assert not _cache.store("a GPU", {"new": ENTRY})
        made = [entry for _, entry in measure.tune(CALLS[:3], "a GPU", measure=lambda call: ENTRY)]
    assert made == [ENTRY] * 3
    assert caplog.text.count("cannot be written (") == 1, "one warning, not one per call"
    _cache.path().write_text("garbage")
    monkeypatch.setattr(_cache.os, "replace", refuse)
    assert _cache.read() == {}
    assert "cannot be moved away" in caplog.text


def test_a_folder_that_is_a_file(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path / "file"))
    assert _cache.entries("a GPU") == {}
    assert not _cache.store("a GPU", {"x": ENTRY})
    assert "cannot be written" in caplog.text


def test_where_it_is(monkeypatch, tmp_path):
    assert _cache.path() == tmp_path / "tuning.json"
    monkeypatch.delenv("FASTLORA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(_cache.path()) == "/xdg/fastlora/tuning.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _cache.path().parts[-3:] == (".cache", "fastlora", "tuning.json")


def test_rows_are_rounded_up_to_a_power_of_two():
    def m(rows):
        return _cache.key(Call("k", torch.bfloat16, torch.device("meta"), rows)).split()[2]

    assert [m(rows) for rows in (0, 1, 16, 17, 4096, 4097, 10**6)] == [
        "m16", "m16", "m16", "m32", "m4096", "m8192", "m32768",
    ]  # fmt: skip


def test_an_environment_names_what_a_measurement_holds_for():
    named = _cache.environment(torch.device("cpu"), 80)
    parts = _cache.parts(named)
    assert parts["gpu"] == "cpu sm_80" and parts["torch"] == torch.__version__
    assert set(parts) == {"gpu", "driver", "torch", "triton", "fastlora"}


def test_what_was_measured_serves(monkeypatch):
    """On a GPU the entry of the call wins over the shipped row."""
    call = CALLS[0]
    monkeypatch.setattr(_cache, "environment", lambda device, arch: "a GPU")
    monkeypatch.setattr(_tiles, "arch", lambda device: 80)
    on_gpu = call._replace(device=torch.device("cuda", 0))
    before = _tiles.answer(on_gpu)
    assert before.source == "screened"
    _cache.store("a GPU", {_cache.key(on_gpu): ENTRY})
    after = _tiles.answer(on_gpu)
    assert (after.method, after.tile.m, after.source) == ("triton", 64, "measured here, 2026-01-01")
    assert _tiles.answer(call).source == "screened", "no GPU: nothing was measured on it"
