import json

import pytest

from bench import __main__ as bench
from bench import gpu
from bench.record import spread

MACHINE = {
    "bench": "machine", "slug": "x", "device": "cpu", "time": "2026-11-23T00:00:00Z", "commit": "abc",
    "versions": {"torch": "2.13"}, "cpu": {"name": "A CPU", "cores": 2, "flags": ["avx2"]}, "csrc": "loaded",
}  # fmt: skip


def step(provider, title, ms, peak, rows=4):
    return {
        "bench": "train_step", "op": "small", "shape": {"B": rows, "T": 512, "layers": 8, "r": 16}, "dtype": "bfloat16",
        "mode": "", "provider": provider, "title": title, "ms": spread(ms), "tokens_per_s": 2e6 / sorted(ms)[1],
        "mfu": 0.4, "fraction": 0.5, "peak_bytes": peak,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    ceilings = {"bandwidth": 1e10, "flops": 1e12}
    lines = [
        MACHINE,
        step("peft", "PEFT", [900.0, 1000.0, 1100.0], 200 << 20),
        step("fastlora", "fastlora", [390.0, 400.0, 430.0], 50 << 20),
        step("peft", "PEFT", [450.0, 500.0, 550.0], 100 << 20, rows=2),
        step("fastlora", "fastlora", [190.0, 200.0, 230.0], 25 << 20, rows=2),
        step("liger", "Liger", [1.0, 1.0], None) | {"ms": None, "why": "liger_kernel is not installed"},
        {"bench": "saved_bytes", "op": "7b", "shape": {}, "dtype": "bfloat16", "provider": "peft", "title": "PEFT",
         "figures": {"bytes/token/layer": 203112.0}},
        {"bench": "launches", "op": "7b", "shape": {"M": 4096}, "dtype": "bfloat16", "provider": "peft",
         "title": "PEFT", "figures": {"launches": 224, "elementwise GB": 14.6, "skinny GB": 1.9}},
        *(
            {"bench": "op", "op": "swiglu", "shape": {"M": 8, "F": 8}, "dtype": "bfloat16", "mode": "full",
             "provider": provider, "ms": spread([ms] * 3), "floor_ms": 0.1, "fraction": 0.1 / ms, "bytes": 1e6,
             "flops": 1e6, "saved_bytes": 1 << 20, "ceilings": ceilings}
            for provider, ms in (("eager", 2.0), ("fastlora", 1.0))
        ),
    ]  # fmt: skip
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_tables_and_plots(folder):
    assert bench.main(["report", str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert "| fastlora | 400 [394, 418] | 5,000 | 2.50× | 50% | 40% | 50 |" in text
    assert "| PEFT | 1,000 [940, 1,060] | 2,000 | 1.00× | 50% | 40% | 200 |" in text
    assert "Liger: liger_kernel is not installed" in text
    assert "| PEFT | 203.1 |" in text and "| PEFT | 224, 16.50 GB |" in text
    assert "| fastlora | 1.000 [1.000, 1.000] | 10% | 1.0 |" in text
    for name in ("train_step", "memory", "ops", "roofline"):
        assert f"({'.'}/{name}.png)" in text and (folder / f"{name}.png").stat().st_size > 5000


def test_the_short_form_goes_between_the_markers(folder):
    readme = folder / "README.md"
    readme.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    for _ in range(2):
        assert bench.main(["report", str(folder), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench:begin -->\n") and text.endswith("<!-- bench:end -->\nafter\n")
    assert "old" not in text and text.count("2.50×") == 2 and "roofline" not in text
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="has no lines"):
        bench.main(["report", str(folder), "--readme", str(readme)])


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["report", str(tmp_path)])
    assert "measure first" in capsys.readouterr().err


def test_a_stage_that_fails_or_hangs_loses_no_other(monkeypatch, tmp_path, capsys):
    def stages(results, rehearse):
        line = json.dumps(MACHINE).replace("\n", "")
        write = f"open({str(results)!r}, 'a').write({line!r} + chr(10))"
        return [
            gpu.Stage("absent", 20, ["no_such_module"]),
            gpu.Stage("hangs", 2, ["timeit", "-n1", "-r1", f"{write}; import time; time.sleep(60)"]),
            gpu.Stage("works", 20, ["timeit", "-n1", "-r1", write]),
        ]

    monkeypatch.setattr(gpu, "stages", stages)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert bench.main(["gpu", "--rehearse"]) == 1
    out = capsys.readouterr().out
    assert "absent: exit status 1" in out and "hangs: stopped after its 2 s" in out and "works: done" in out
    assert "report: done" in out
    # The hanging stage wrote its line before it was stopped.
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 2
    assert "no_such_module" in (tmp_path / "out" / "log.txt").read_text()


def test_without_a_gpu_the_gpu_pass_says_so(capsys, monkeypatch):
    monkeypatch.setattr(gpu.machine, "default_device", lambda: "cpu")
    assert bench.main(["gpu"]) == 1
    assert "No GPU is visible" in capsys.readouterr().out


def test_the_gpu_pass_fits_its_limits(tmp_path, monkeypatch):
    for rehearse in (False, True):
        assert all(stage.seconds <= 150 for stage in gpu.stages(tmp_path / "r.jsonl", rehearse))
    assert gpu.LIMIT < 9 * 60
