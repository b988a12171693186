"""fastlora plan: one JSON object, or tables a person can read, and a plot."""

import json
import sys

import pytest

import fastlora
from fastlora import cli
from fastlora.cli.errors import CommandError
from fastlora.cli.plan import count

KEYS = {
    "gpu_hours", "kwh", "kg_co2eq", "tokens_per_s", "policy", "micro_batch_tokens", "memory_gb", "provenance", "peft",
}  # fmt: skip


@pytest.fixture
def shows(monkeypatch, capsys):
    """What `fastlora plan ARGS` prints, in this process."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["fastlora", "plan", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        assert stop.value.code in (0, None), said.err
        return said.out

    return run


def test_json_is_one_object_with_what_python_gives(shows):
    args = ("--model", "13b", "--tokens", "1B", "--gpus", 4, "--rank", 8, "--targets", "q_proj, v_proj", "--json")
    printed = json.loads(shows(*args))
    assert printed.keys() >= KEYS
    assert printed == fastlora.plan("13b", 10**9, gpus=4, rank=8, targets=["q_proj", "v_proj"]).to_dict()
    parts = {kind: size for kind, size in printed["memory_gb"].items() if kind not in ("total", "capacity")}
    assert sum(parts.values()) == pytest.approx(printed["memory_gb"]["total"])
    assert {rate["label"] for rate in printed["provenance"].values()} == {"modelled"}


def test_tables_say_it_beside_pefts_default(shows, model_dir, tmp_path):
    plot = tmp_path / "plots" / "plan.png"
    said = shows("--model", model_dir, "--tokens", "1e6", "--seq", 128, "--plot", plot)
    for words in (
        "PEFT default",
        "tokens/s",
        "GPU hours",
        "kWh",
        "kg CO2eq",
        "gate, up",
        "capacity",
        "modelled",
        "PUE",
    ):
        assert words in said
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_model_that_does_not_fit_is_said_not_to(shows, tmp_path):
    said = shows("--model", "70b", "--tokens", "1B", "--plot", tmp_path / "plan.png")
    assert "does not fit" in said and "total" in said


def test_energy_options_reach_the_plan(shows):
    args = ("--model", "7b", "--tokens", "1B", "--watts", 300, "--intensity", 0.1, "--pue", 1.5, "--json")
    printed = json.loads(shows(*args))
    assert printed["kg_co2eq"] == pytest.approx(printed["gpu_hours"] * 0.3 * 1.5 * 0.1)


@pytest.mark.parametrize(
    "text, tokens", [("1000", 1000), ("1e9", 10**9), ("2.5M", 2_500_000), ("3b", 3 * 10**9), ("1,000", 1000)]
)
def test_numbers_of_tokens(text, tokens):
    assert count(text) == tokens


@pytest.mark.parametrize("text", ["", "many", "M", "1e999"])
def test_what_is_no_number_of_tokens(text):
    with pytest.raises(CommandError, match="--tokens .*: needs a number such as"):
        count(text)
