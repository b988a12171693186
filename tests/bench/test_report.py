import json

import pytest

from bench import __main__ as bench
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


def profiled(record, busy, host):
    kernels = [
        ["void gemm<bf16>", 7, 1e5],
        ["_swiglu_fwd_kernel", 1, 5e4],
        ["vectorized_elementwise_kernel<4>", 3, 1e4],
    ]
    profile = {"device": "cuda", "kernels": kernels, "launches": 11, "busy_ms": busy, "host_ms": host, "ms": 500.0}
    return record | {"profile": profile, "joules": 90.0, "plan": {"ms": 320.0, "peak_bytes": 40 << 20}}


@pytest.fixture
def folder(tmp_path):
    ceilings = {"bandwidth": 1e10, "flops": 1e12}
    lines = [
        MACHINE,
        step("peft", "PEFT", [900.0, 1000.0, 1100.0], 200 << 20),
        step("fastlora", "fastlora", [800.0, 800.0, 800.0], None) | {"provisional": True},
        profiled(step("fastlora", "fastlora", [390.0, 400.0, 430.0], 50 << 20), 160.0, 300.0),
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
    # The time of the turns, and not the provisional one; 160 ms of 400 are covered by kernels.
    assert "| fastlora | 400 [394, 418] | 5,000 | 2.50× | 50% | 40% | 50 | 300 | 60% | 90 |" in text
    assert "| PEFT | 1,000 [940, 1,060] | 2,000 | 1.00× | 50% | 40% | 200 |" in text and "provisional" not in text
    assert "| small (8 layers), 4×512 tokens, bfloat16, r=16: fastlora | 1.25 | 1.25 |" in text
    # Kinds of kernels: products, ours, the rest; busy, step, launches.
    assert "| fastlora | 100.0 | 50.0 | 10.0 | 160.0 | 400.0 | 11 |" in text and "| `gemm` | 7 | 100.00 |" in text
    assert "Liger: liger_kernel is not installed" in text
    assert "| PEFT | 203.1 |" in text and "| PEFT | 224, 16.50 GB |" in text
    assert "| fastlora | 1.000 [1.000, 1.000] | 10% | 1.0 |" in text
    for name in ("train_step", "memory", "profile", "ops", "roofline"):
        assert f"({'.'}/{name}.png)" in text and (folder / f"{name}.png").stat().st_size > 5000


def test_the_short_form_goes_between_the_markers(folder):
    readme = folder / "README.md"
    readme.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    for _ in range(2):
        assert bench.main(["report", str(folder), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench:begin -->\n") and text.endswith("<!-- bench:end -->\nafter\n")
    assert "old" not in text and "| 1,000 | **400** (2.50×) |" in text and "| 500 | **200** (2.50×) |" in text
    assert "roofline" not in text
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="has no lines"):
        bench.main(["report", str(folder), "--readme", str(readme)])


def test_the_profiles_go_into_the_page_on_performance(folder):
    page = folder / "performance.md"
    page.write_text("before\n<!-- profile:begin -->\nold\n<!-- profile:end -->\nafter\n")
    assert bench.main(["report", str(folder), "--performance", str(page)]) == 0
    text = page.read_text()
    assert "**Where the time goes" in text and "/profile.png)" in text and "old" not in text


def test_what_was_cut_off_is_reported_as_provisional(folder):
    lines = [MACHINE, step("peft", "PEFT", [900.0, 1000.0, 1100.0], None) | {"provisional": True}]
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert bench.main(["report", str(folder)]) == 0
    assert "| PEFT (provisional) | 1,000 [940, 1,060] |" in (folder / "report.md").read_text()


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["report", str(tmp_path)])
    assert "measure first" in capsys.readouterr().err
