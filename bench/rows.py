"""The rows that `bench tune` measured on a GPU, into fastlora/kernels/_rows.py, in place of what was there.

    python -m bench rows FOLDER         FOLDER holds tuning.json, as `bench gpu` leaves it

The rows of a kernel and an architecture are replaced together; kernels that were not measured keep theirs. Each row
says on which GPU, when and with which versions it was measured, and what it won against.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from itertools import groupby
from pathlib import Path

from fastlora.kernels import _rows
from fastlora.kernels._rows import Row
from fastlora.tuning import rows

from .cli import new_parser

_FILE = Path(_rows.__file__)
_ROW = re.compile(r'\s*Row\("(?P<kernel>\w+)", (?P<arch>\d+),')


def main(argv: list[str]) -> int:
    parser = new_parser("rows", __doc__)
    parser.add_argument("folder", type=Path, help="where tuning.json is")
    parser.add_argument("--file", type=Path, default=_FILE, help="the file to change (default: the package's own)")
    args = parser.parse_args(argv)
    try:
        measured = read(args.folder / "tuning.json")
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"folder is {args.folder}, needs a tuning.json of bench tune on a GPU: {error}")
    if not measured:
        parser.error(f"folder is {args.folder}: its tuning.json holds no measurement of a GPU in bfloat16")
    text = replaced(args.file.read_text(encoding="utf-8"), measured)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=args.file.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, args.file)
    kernels = {(row.kernel, row.arch) for row in measured}
    print(f"{len(measured)} measured rows of {len(kernels)} kernels in {args.file}; run the tests, then commit")
    return 0


def read(file: Path) -> list[Row]:
    """The rows that the measurements of a tuning.json make, of every GPU in it; a rehearsal's are of no GPU."""
    entries = json.loads(file.read_text(encoding="utf-8"))["entries"]
    return [row for name, of in entries.items() if not name.startswith("cpu ") for row in rows.of_environment(name, of)]


def replaced(source: str, measured: list[Row]) -> str:
    """The text of _rows.py with the measured rows where their kernel's rows of that architecture were.

    Raises:
        KeyError: a measured kernel has no rows there.
    """
    new = {key: list(group) for key, group in groupby(measured, key=lambda row: (row.kernel, row.arch))}
    gone = set(new)
    lines: list[str] = []
    for line in source.splitlines():
        if found := _ROW.match(line):
            kernel = found["kernel"]
            for key in [key for key in new if key[0] == kernel]:
                lines += [f"    {rows.source(row)}" for row in new.pop(key)]
            if (kernel, int(found["arch"])) in gone:
                continue
        lines.append(line)
    if new:
        raise KeyError(f"no row of {', '.join(kernel for kernel, _ in new)} to put the measured ones beside")
    return "\n".join(lines) + "\n"
