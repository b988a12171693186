"""The checkpoints of a run: DIR/checkpoint-N, each one whole."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import ranks
from .files import flush

KEPT = 2
_UNFINISHED = ".unfinished"
_NAME = re.compile(r"checkpoint-(\d+)")


def finished(out: Path) -> list[Path]:
    """The checkpoints in `out`, oldest first."""
    found = [(int(match[1]), path) for path in out.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


@contextmanager
def staged(out: Path, name: str) -> Iterator[Path]:
    """Gives a hidden directory to write the checkpoint `name` into; it moves to `out` when the block ends.

    The Trainer writes file by file into checkpoint-N, and a kill in between leaves a torn checkpoint-N that it would
    later resume from. A rename leaves all or nothing. The newest `KEPT` checkpoints stay. Every rank writes its part
    between two barriers; `out` must be a directory that they share.
    """
    unfinished = out / _UNFINISHED

    def clear() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)

    def publish() -> None:
        for file in unfinished.rglob("*"):
            if file.is_file():
                flush(file)
        shutil.rmtree(out / name, ignore_errors=True)
        os.replace(unfinished / name, out / name)
        for old in finished(out)[:-KEPT]:
            shutil.rmtree(old)

    ranks.first(clear)
    try:
        yield unfinished
        ranks.wait()
        ranks.first(publish)
    finally:
        if ranks.rank() == 0:
            clear()
