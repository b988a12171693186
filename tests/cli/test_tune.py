"""fastlora tune and fastlora doctor, as a person meets them."""

import json
from functools import partial

import pytest
import torch
from patching import faults

from fastlora._versions import Known
from fastlora.cli import doctor


def wrong_projection(monkeypatch):
    from fastlora.modules import lora

    mlp = lora.ops.lora_mlp
    monkeypatch.setattr(lora.ops, "lora_mlp", lambda x, *args, **options: mlp(x * 1.1, *args, **options))


def no_llama(monkeypatch):
    def refuse(device):
        raise RuntimeError("no Llama")

    monkeypatch.setattr(doctor, "_verified", refuse)


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
def test_without_a_gpu_tune_says_what_runs_instead(fastlora_cli):
    done = fastlora_cli("tune")
    assert done.returncode == 1 and "fastlora tune --screen --arch sm_80" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--model", "8b"), "--model has 8b; there are 7b, 13b, 34b, 70b"),
        (("--tokens", "many"), "--tokens is 'many', needs numbers"),
        (("--screen", "--arch", "sm_70"), "--arch is 'sm_70', needs one of sm_80"),
        (("--screen", "--kernels", "softmax"), "--kernels has softmax; there are lora_gemm"),
        (("--rows",), "holds no measurements"),
    ],
)
def test_errors_name_the_flag(flags, says, tmp_path, monkeypatch, capsys):
    import sys

    from fastlora.cli import main

    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["fastlora", "tune", *flags])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1 and says in capsys.readouterr().err


def test_screen_prints_survivors_and_rows(fastlora_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path))
    done = fastlora_cli("tune", "--screen", "--arch", "sm_80", "--kernels", "swiglu")
    assert done.returncode == 0, done.stderr
    assert 'Row("swiglu", 80, Tile(' in done.stdout and "modelled, not measured" in done.stdout
    assert "Every shipped row of sm_80 is among the survivors." in done.stdout
    kept = json.loads((tmp_path / "screened-sm_80.json").read_text())["screened"]
    assert len(kept) >= 6 and all(one["registers"] > 0 for one in kept.values())


def run(capsys) -> tuple[bool, str]:
    from rich.console import Console

    well = doctor.doctor(Console(width=100))
    return well, capsys.readouterr().out


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_doctor_is_well_here(cache, capsys):
    well, text = run(capsys)
    assert "✗" not in text and well, text
    assert text.rstrip().endswith("All is well.")
    assert all(name in text for name in (*doctor.CHECKS, "torch", "csrc", "tuning cache", "26 of 26"))
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("found", "well", "line"),
    [
        ("5.25rc1", True, "✓ transformers         5.25rc1: newer than 5.24, the newest"),
        ("5.24.9", True, "✓ transformers         5.24.9\n"),
        ("4.56.2", False, "✗ transformers         4.56.2\n" + " " * 25 + "→ pip install 'transformers>=4.57'"),
        (None, False, "✗ transformers         not installed\n" + " " * 25 + "→ pip install transformers"),
    ],
)
def test_doctor_judges_versions(found, well, line, cache, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", {})
    monkeypatch.setattr(doctor, "_whole_model", lambda device: ())
    monkeypatch.setattr(doctor, "KNOWN", {"transformers": Known("4.57", "5.24")})
    monkeypatch.setattr(doctor, "versions", lambda: {"transformers": found, "trl": None})
    judged, text = run(capsys)
    assert judged == well and line in text, text


def test_doctor_has_a_check_for_every_op():
    from fastlora import ops

    assert set(doctor.CHECKS) == set(ops.__all__) - {"Branch", "Projection", "Quantised", "quantised"}


@pytest.mark.parametrize("op", doctor.CHECKS)
def test_doctor_sees_a_wrong_op(op, cache, capsys, monkeypatch):
    """3% off, which is about the distance of a forgotten rounding from a wrong formula; and an op that raises."""
    right = getattr(doctor.ops, op)

    def off(*args, **kwargs):
        out = right(*args, **kwargs)
        return tuple(one * 1.03 for one in out) if isinstance(out, tuple) else out * 1.03

    monkeypatch.setattr(doctor, "_whole_model", lambda device: ())
    checks = {op: doctor.CHECKS[op]}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    monkeypatch.setattr(doctor.ops, op, off)
    well, text = run(capsys)
    assert not well and "✗ " + op in text, text

    def raises(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(doctor.ops, op, raises)
    well, text = run(capsys)
    assert not well and "RuntimeError: no such kernel" in text


@pytest.mark.parametrize(
    ("fault", "name", "what"),
    [
        (faults.drop_cache, "greedy tokens", "the whole model: logits over a cache: "),
        (faults.fade_logits, "logits", "the whole model: logits, read again: "),
        (partial(faults.never_run, part="up_proj"), "fused paths", "mlp.up_proj: fused calls: said to be fused, but"),
        (wrong_projection, "tiny LoRA Llama", ": output: "),
        (no_llama, "tiny LoRA Llama", "RuntimeError: no Llama"),
    ],
)
def test_doctor_sees_a_wrong_model(fault, name, what, cache, capsys, monkeypatch):
    """Each in its own line. A wrong projection makes the whole wrong, too."""
    monkeypatch.setattr(doctor, "CHECKS", {})
    fault(monkeypatch)
    well, text = run(capsys)
    lines = [line for line in text.splitlines() if line.startswith("  ✗")]
    assert not well and name in lines[0] and what in text, text
    assert len(lines) == 1 or fault is wrong_projection
    assert doctor._REPORT in text


@pytest.mark.parametrize("width", [80, 100])
def test_doctor_keeps_to_the_width(width, cache, capsys):
    from rich.console import Console

    assert doctor.doctor(Console(width=width))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= width


def test_doctor_says_what_to_do_about_a_bad_cache(cache, capsys, monkeypatch):
    (cache / "tuning.json").write_text("{")
    monkeypatch.setattr(doctor, "CHECKS", {})
    monkeypatch.setattr(doctor, "_whole_model", lambda device: ())
    well, text = run(capsys)
    assert (
        not well and "not JSON" in text and f"→ rm {cache}/tuning.json" in text.replace("\n" + " " * doctor._INDENT, "")
    )
    assert (cache / "tuning.json").exists(), "the doctor moves nothing"


def test_doctor_has_an_exit_status(fastlora_cli, cache):
    (cache / "tuning.json").write_text("{")
    assert fastlora_cli("doctor").returncode == 1
