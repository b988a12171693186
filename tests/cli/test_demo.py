"""The demo in small: all its steps, few of each."""

import json

import pytest
from rich.console import Console

from fastlora.cli import demo
from fastlora.cli.errors import CommandError


def test_the_demo_compares_the_runs_and_answers_a_question(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(demo, "BASE_STEPS", 2)
    monkeypatch.setattr(demo, "ROWS", 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "demo"
    demo.demo(str(out), steps=3, console=Console(highlight=False, markup=False, soft_wrap=True))

    said = capfd.readouterr().out
    for line in (
        "saved for backward, KiB per token",
        "differ in nothing but summation order",
        "Question   Which model",
    ):
        assert line in said
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    unpatched, patched = (json.loads((out / name / "report.json").read_text()) for name in ("unpatched", "patched"))
    assert unpatched["plan"] is None and patched["plan"] is not None
    losses = [[point["loss"] for point in report["loss"]] for report in (unpatched, patched)]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_directory_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CommandError, match="is not an empty directory"):
        demo.demo(str(tmp_path), steps=3, console=Console())
