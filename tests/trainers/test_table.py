"""docs/trainers.md claims what tests show: every test that it names is there, every example is run by one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEST = re.compile(r"`([\w./…]*)::(\w+)(?:\[(.+?)\])?`")
CITED = []
_file = ""
for _path, _function, _case in TEST.findall((ROOT / "docs" / "trainers.md").read_text()):
    _file = _file if _path == "…" else _path if "/" in _path else f"tests/trainers/{_path}"
    CITED.append((_file, _function, _case))


@pytest.mark.parametrize(("path", "function", "case"), CITED)
def test_a_test_that_is_named_is_there(path, function, case):
    source = (ROOT / path).read_text()
    assert f"def {function}(" in source
    assert f'"{case.removesuffix("…")}' in source


def test_the_table_names_tests():
    assert len(CITED) > 30


def test_every_example_is_run():
    from engines.test_examples import LEFT_ALONE

    from .test_examples import DATA

    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*DATA, *LEFT_ALONE}
