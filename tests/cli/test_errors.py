"""Every error is one line on stderr and exit status 1, before a model is loaded where that can be."""

import sys

import pytest
from typer.testing import CliRunner

from fastlora import cli
from fastlora.cli.data import read_rows
from fastlora.cli.files import write_json
from fastlora.cli.settings import Settings
from fastlora.cli.train import RUN_FILE, _identity


@pytest.fixture
def fails(monkeypatch, capsys):
    """Run `fastlora ARGS` in this process; the one line it fails with."""

    def run(*args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["fastlora", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        message = said.err if stop.value.code == 1 else str(stop.value.code)
        assert "Traceback" not in message
        # Bars of what was loaded before may stand above it.
        last = message.rstrip("\n").split("\n")[-1]
        assert last.startswith("fastlora: ")
        return last

    return run


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is a mistake."""
    monkeypatch.setattr("fastlora.cli.train._build", lambda *args: pytest.fail("a model was about to be loaded"))


def test_a_missing_extra_is_named(monkeypatch, fails):
    find_spec = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("trl", "typer") else find_spec(name))
    assert fails("--help") == "fastlora: not installed: typer, trl. Install them with: pip install typer trl"


def test_the_doctor_needs_no_trainer(monkeypatch, capsys):
    missing = dict.fromkeys(("trl", "datasets", "matplotlib"))
    monkeypatch.setattr(cli, "find_spec", lambda name: missing.get(name, name))
    monkeypatch.setattr(sys, "argv", ["fastlora", "doctor"])
    monkeypatch.setattr("fastlora.cli.doctor.doctor", lambda console: True)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code


def test_a_malformed_row(fails, no_model, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "t"}\n{"text": 1}\n')
    assert f"{data}:2: " in fails("train", "--model", "m", "--data", data, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_not_empty(fails, no_model, rows_file, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    message = fails("train", "--model", "m", "--data", rows_file, "--out", tmp_path)
    assert f"--out {tmp_path} is not empty" in message
    assert "--resume" in message


def test_resuming_what_is_no_run(fails, no_model, rows_file, tmp_path):
    message = fails("train", "--model", "m", "--data", rows_file, "--out", tmp_path / "absent", "--resume")
    assert "holds no run of fastlora train" in message


def test_a_model_that_is_not_there_leaves_the_directory_free(fails, rows_file, tmp_path):
    args = ["train", "--data", rows_file, "--out", tmp_path / "run", "--model"]
    assert f"--model {tmp_path}/absent: no such directory" in fails(*args, tmp_path / "absent")
    assert "cannot load the tokenizer of 'nobody/nothing'" in fails(*args, "nobody/nothing")
    assert not (tmp_path / "run").exists()


def test_resuming_with_another_setting(fails, no_model, rows_file, tmp_path):
    args = ["train", "--model", "m", "--data", rows_file, "--out", tmp_path / "run"]
    settings = Settings(model="m", data=str(rows_file), out=str(tmp_path / "run"))
    write_json(tmp_path / "run" / RUN_FILE, _identity(settings, read_rows(rows_file)))
    assert "started otherwise: rank was 16, is 8; lr was 0.0002, is 0.1" in fails(
        *args, "--resume", "--rank", 8, "--lr", 0.1
    )


def test_memory_policies_that_are_none(fails, no_model, rows_file, tmp_path):
    args = ["train", "--model", "m", "--data", rows_file, "--out", tmp_path / "out", "--memory"]
    assert "--memory is 'all', needs 'fast', 'lean', 'auto', or bytes" in fails(*args, "all")
    assert "--memory lean is fastlora's own; it does not go with --no-patch" in fails(*args, "lean", "--no-patch")


def test_what_else_patch_takes(fails, no_model, rows_file, tmp_path):
    for command in (["train", "--out", tmp_path / "out"], ["verify"]):
        args = [*command, "--model", "m", "--data", rows_file]
        assert "--ops has ['rmsnorm'], needs names among" in fails(*args, "--ops", "rmsnorm,swiglu")
    args = ["train", "--out", tmp_path / "out", "--model", "m", "--data", rows_file, "--no-patch"]
    assert "--strict is fastlora's own; it does not go with --no-patch" in fails(*args, "--strict")


def test_completion_only_on_text(fails, no_model, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "t"}\n')
    args = ["train", "--model", "m", "--data", data, "--out", tmp_path / "out"]
    assert "--completion-only needs messages" in fails(*args, "--completion-only")


def test_a_module_that_is_not_there(fails, model_dir, rows_file, tmp_path):
    args = ["train", "--model", model_dir, "--data", rows_file, "--out", tmp_path / "out", "--targets", "q_proj,wrong"]
    # PEFT passes over a name that matches nothing as long as another matches.
    assert "--targets q_proj,wrong: no module is called wrong" in fails(*args)


def test_rows_longer_than_the_limit(fails, model_dir, rows_file, tmp_path):
    args = ["train", "--model", model_dir, "--data", rows_file, "--out", tmp_path / "out", "--max-length", 3]
    assert "has a token to learn within --max-length 3" in fails(*args)


def test_no_epochs():
    from fastlora.cli.app import app

    shown = CliRunner().invoke(app, ["train", "--model", "x", "--data", "y", "--out", "z", "--epochs", "0"])
    assert shown.exit_code == 2 and "'--epochs': 0.0 is not more than 0" in " ".join(shown.output.split())


@pytest.mark.parametrize(
    "args", [["--help"], ["train", "--help"], ["demo", "--help"], ["explain", "--help"], ["plan", "--help"]]
)
def test_help_says_what_the_command_does(args):
    from fastlora.cli.app import app

    shown = CliRunner().invoke(app, args)
    assert shown.exit_code == 0
    expected = {
        "train": "Fine-tune a model with LoRA",
        "demo": "No download, no GPU",
        "explain": "Trains nothing",
        "plan": "loads no weights",
    }
    assert expected.get(args[0], "LoRA fine-tuning of Llama 2 models") in " ".join(shown.output.split())


def test_help_and_version_import_no_torch(fastlora_cli):
    assert_light = (
        "import atexit; atexit.register(lambda: print('torch' in sys.modules or 'transformers' in sys.modules))"
    )
    for flag in ("--help", "--version"):
        shown = fastlora_cli(flag, before=assert_light)
        assert shown.returncode == 0
        assert shown.stdout.rstrip().endswith("False")


def test_explain_prints_the_plan(fastlora_cli, model_dir):
    shown = fastlora_cli("explain", "--model", model_dir)
    assert shown.returncode == 0, shown.stderr
    assert "No --adapter: LoRA rank 16 on all-linear" in shown.stdout
    assert "q_proj" in shown.stdout


def test_the_benchmark_suite_is_a_clones(monkeypatch, fails, tmp_path):
    monkeypatch.setattr("fastlora.cli.bench.ROOT", tmp_path)
    message = fails("bench", "rms_norm")
    assert message.startswith("fastlora: the benchmark suite is not installed") and "pip install -e ." in message


def test_bench_is_the_suites_command(capfd):
    """Its arguments, options and exit status pass through."""
    from fastlora.cli.app import app

    result = CliRunner().invoke(app, ["bench", "rms_nrm", "--quick"])
    assert result.exit_code == 2
    assert "no command or op is called rms_nrm" in capfd.readouterr().err
