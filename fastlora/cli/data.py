"""Training rows: a JSON-lines file, checked line by line before any model is loaded."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CommandError

KINDS = 'a "messages" list, "prompt" and "completion" strings, or a "text" string'


@dataclass(frozen=True)
class Rows:
    """The rows of one file. `kind` is "messages", "prompt-completion" or "text"; `sha256` is that of the file."""

    kind: str
    rows: list[dict[str, Any]]
    sha256: str


def read_rows(path: str | Path) -> Rows:
    """Read and check a JSON-lines file.

    Every row must be of the same kind: messages (Llama 2 order: an optional system message, then user and assistant
    in turn, ending with assistant), prompt and completion, or text. Other keys are left out. Raises `CommandError`
    with file and line at the first row that is not so.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        lines = raw.decode("utf-8").split("\n")
    except FileNotFoundError:
        raise CommandError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{path}: cannot be read as UTF-8 text: {error}") from None

    kind, first, rows = "", 0, []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row_kind, row = _read_row(line)
            if kind and row_kind != kind:
                raise _Malformed(f"a {row_kind} row, but line {first} is a {kind} row: a file holds one kind")
        except _Malformed as error:
            raise CommandError(f"{path}:{number}: {error}") from None
        kind, first = kind or row_kind, first or number
        rows.append(row)
    if not rows:
        raise CommandError(f"{path}: holds no rows; needs one JSON object per line with {KINDS}")
    return Rows(kind, rows, hashlib.sha256(raw).hexdigest())


class _Malformed(Exception):
    pass


def _read_row(line: str) -> tuple[str, dict[str, Any]]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise _Malformed(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise _Malformed(f"a JSON {_json_type(row)}; a row is a JSON object with {KINDS}")

    found = [kind for kind, (keys, _) in _READERS.items() if any(key in row for key in keys)]
    if not found:
        raise _Malformed(f"keys are {', '.join(row) or 'none'}; a row needs {KINDS}")
    if len(found) > 1:
        raise _Malformed(f"is both a {found[0]} row and a {found[1]} row; a row needs only one of {KINDS}")
    keys, check = _READERS[found[0]]
    if absent := [key for key in keys if key not in row]:
        raise _Malformed(f'no "{absent[0]}" beside "{next(key for key in keys if key in row)}"')
    return found[0], {key: check(key, row[key]) for key in keys}


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _Malformed(f'"{name}" is a JSON {_json_type(value)}; it needs a string')
    if not value.strip():
        raise _Malformed(f'"{name}" is empty')
    return value


def _messages(name: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise _Malformed(f'"{name}" is a JSON {_json_type(value)}; it needs a list of messages')
    if not value:
        raise _Malformed(f'"{name}" is empty')
    messages = []
    expected = ["system", "user"]
    for index, message in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(message, dict):
            raise _Malformed(f'"{where}" is a JSON {_json_type(message)}; it needs an object with "role" and "content"')
        if absent := [key for key in ("role", "content") if key not in message]:
            raise _Malformed(f'"{where}" has no "{absent[0]}"')
        role = message["role"]
        if role not in expected:
            raise _Malformed(f'"{where}.role" is {json.dumps(role)}; it needs {" or ".join(map(json.dumps, expected))}')
        expected = ["user"] if role in ("system", "assistant") else ["assistant"]
        messages.append({"role": role, "content": _text(f"{where}.content", message["content"])})
    if messages[-1]["role"] != "assistant":
        raise _Malformed(f'the last role is "{messages[-1]["role"]}"; it needs "assistant", the answer to learn')
    return messages


def _json_type(value: Any) -> str:
    names = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "list"}
    return names.get(type(value), "object")


_Check = Callable[[str, Any], Any]
_READERS: dict[str, tuple[tuple[str, ...], _Check]] = {
    "messages": (("messages",), _messages),
    "prompt-completion": (("prompt", "completion"), _text),
    "text": (("text",), _text),
}
