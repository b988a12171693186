"""What was measured on this machine: `tuning.json` in $FASTLORA_CACHE_DIR, by default `~/.cache/fastlora` (XDG).

    {"fastlora_tuning": 1, "entries": {<environment>: {<call>: {"method", "tile", "ms", "runner_up", ...}}}}

Any number of processes may read and write it at once: a writer holds a lock, reads what is there, adds its own and
puts a whole file in the place of the old one. A file that is not of this form is renamed, with one warning. What
cannot be written (a read-only folder) is a warning, and the shipped rows serve.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .._version import __version__

FORMAT = 1
Entry = dict[str, Any]
Entries = dict[str, dict[str, Entry]]
_LOG = logging.getLogger("fastlora")
_warned: set[str] = set()


def folder() -> Path:
    """$FASTLORA_CACHE_DIR, or fastlora in the XDG cache folder."""
    if own := os.environ.get("FASTLORA_CACHE_DIR"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlora"


def path() -> Path:
    return folder() / "tuning.json"


def environment(device: torch.device, arch: int) -> str:
    """What a measurement holds for: GPU, driver, torch, triton and fastlora."""
    return _environment(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type, arch)


def parts(of_environment: str) -> dict[str, str]:
    """An environment's GPU and versions, by name."""
    gpu, *software = of_environment.split(", ")
    return {"gpu": gpu} | dict(one.split(" ", 1) for one in software)


@functools.lru_cache
def _environment(gpu: str, arch: int) -> str:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    software = f"driver {_driver()}, torch {torch.__version__}, triton {triton}, fastlora {__version__}"
    return f"{gpu} sm_{arch}, {software}"


def _driver() -> str:
    # The kernel module's own file, where there is one: no process is started for it.
    with suppress(OSError, IndexError):
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
        return next(word for word in line.split() if word[:1].isdigit() and "." in word)
    return str(torch.version.cuda)


def key(call: Any) -> str:
    """The name of a call in the file; rows are rounded up to a power of two from 16 to 32768."""
    m = min(max(16, 1 << max(0, call.m - 1).bit_length()), 32768)
    dtype = str(call.dtype).removeprefix("torch.")
    return f"{call.kernel} {dtype} m{m} n{call.n} k{call.k} r{call.r} p{call.p}"


@functools.lru_cache
def entries(of_environment: str) -> Mapping[str, Entry]:
    """What the file holds for an environment; read once per process."""
    return read().get(of_environment, {})


def read() -> Entries:
    """Everything in the file, {} where there is none. A file that is not ours is set aside."""
    found, why = inspect()
    if why:
        try:
            with _locked():
                # Another process may have set it aside, and written a good one, while this one waited.
                found, why = inspect()
                if why:
                    _set_aside(why)
        except OSError as error:
            _warn_once(f"{path()}: {why}, and it cannot be moved away ({error}). The shipped rows serve.")
    return found


def inspect() -> tuple[Entries, str | None]:
    """The entries, and what is wrong with the file; nothing is moved."""
    try:
        content = json.loads(path().read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}, None
    except OSError as error:
        _warn_once(f"{path()} cannot be read ({error}). The shipped rows serve.")
        return {}, None
    except ValueError as error:
        return {}, f"not JSON ({error})"
    if not isinstance(content, dict) or "fastlora_tuning" not in content:
        return {}, "not written by fastlora"
    if content["fastlora_tuning"] != FORMAT:
        return {}, f"of format {content['fastlora_tuning']!r}, this version reads {FORMAT}"
    found: Any = content.get("entries")
    if not _well_formed(found):
        return {}, "its entries are damaged"
    return found, None


def _well_formed(found: Any) -> bool:
    if not isinstance(found, dict) or not all(isinstance(calls, dict) for calls in found.values()):
        return False
    every = [entry for calls in found.values() for entry in calls.values()]
    return all(
        isinstance(e, dict)
        and isinstance(e.get("method"), str)
        and isinstance(e.get("date"), str)
        and isinstance(e.get("tile"), list)
        and len(e["tile"]) == 6
        and all(isinstance(size, int) and size > 0 for size in e["tile"])
        for e in every
    )


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        _LOG.warning("%s", text)


def _set_aside(why: str) -> None:
    aside = path().with_name(f"tuning.json.bad-{os.getpid()}")
    os.replace(path(), aside)
    _LOG.warning("%s: %s. Moved to %s; the shipped rows serve.", path(), why, aside.name)


def store(of_environment: str, measured: Mapping[str, Entry]) -> bool:
    """Add measurements to the file; False, with a warning, where it cannot be written."""
    read()  # sets a bad file aside
    try:
        with _locked():
            found, _ = inspect()
            found.setdefault(of_environment, {}).update(measured)
            write(path(), {"fastlora_tuning": FORMAT, "entries": found})
    except OSError as error:
        _warn_once(f"{path()} cannot be written ({error}): what was measured is not kept.")
        return False
    entries.cache_clear()
    return True


def write(file_: Path, content: Any) -> None:
    """Put JSON in the place of a file, whole or not at all."""
    file_.parent.mkdir(parents=True, exist_ok=True)
    temporary = file_.with_name(f".{file_.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, file_)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(name: str = "tuning.lock") -> Iterator[None]:
    import fcntl

    folder().mkdir(parents=True, exist_ok=True)
    with (folder() / name).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel lets go of it when the process ends, however it ends
        yield


@contextmanager
def measuring() -> Iterator[None]:
    """Held by the one process of a machine that measures: the others wait, and then read.

    Where the folder cannot be written everybody measures for themselves.
    """
    entries.cache_clear()
    lock = _locked("measuring.lock")
    try:
        lock.__enter__()
    except OSError:
        yield
        return
    try:
        entries.cache_clear()
        yield
    finally:
        lock.__exit__(None, None, None)
