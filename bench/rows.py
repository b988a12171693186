"""The rows that `bench tune` measured on a GPU, into fastlora/kernels/_rows.py, in place of what was there.

    python -m bench rows FOLDER         FOLDER holds tuning.json, as `bench gpu` leaves it

The rows of a kernel and an architecture are replaced together; kernels that were not measured keep theirs. Each row
says on which GPU, when and with which versions it was measured, and what it won against.
"""

from __future__ import annotations

import ast
import json
import os
import tempfile
import textwrap
from itertools import groupby
from pathlib import Path

from fastlora.kernels import _rows
from fastlora.kernels._rows import Row
from fastlora.tuning import rows

from .cli import new_parser

_FILE = Path(_rows.__file__)


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
    calls = [node for node in ast.walk(ast.parse(textwrap.dedent(source))) if isinstance(node, ast.Call)]
    starts = {call.lineno: call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Row"}
    lines: list[str] = []
    skipped = 0  # the last line of a row that goes
    for number, line in enumerate(source.splitlines(), 1):
        if call := starts.get(number):
            kernel, arch = (ast.literal_eval(one) for one in call.args[:2])
            for key in [key for key in new if key[0] == kernel]:
                lines += [f"    {text}" for row in new.pop(key) for text in rows.source(row).splitlines()]
            if (kernel, arch) in gone:
                skipped = call.end_lineno or number
        if number > skipped:
            lines.append(line)
    if new:
        raise KeyError(f"no row of {', '.join(kernel for kernel, _ in new)} to put the measured ones beside")
    return "\n".join(lines) + "\n"
