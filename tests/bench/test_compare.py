"""Two runs of one commit differ by noise alone; a planted slow-down is seen through it."""

import json
import random

import pytest

from bench import __main__ as bench
from bench.record import spread


def results(seed, slower=1.0, machine=1.0, spikes=True, n=15, cases=40):
    """A run with log-normal noise, now and then a spike, and eager beside every case."""
    dice = random.Random(seed)
    yield {"bench": "machine", "slug": "a-machine"}
    for i in range(cases):
        for provider, ms in (("eager", 30.0), ("fastlora", 10.0 * slower), ("torch.compile", 15.0 * slower)):
            times = [machine * ms * dice.lognormvariate(0, 0.08) for _ in range(n)]
            if spikes:
                times[dice.randrange(n)] *= 3
            yield {
                "bench": "op", "op": "swiglu", "shape": {"M": i}, "dtype": "bfloat16", "mode": "full",
                "provider": provider, "ms": spread(times),
            }  # fmt: skip
    yield {"bench": "saved_bytes", "op": "7b", "shape": {}, "dtype": "bfloat16", "provider": "fastlora",
           "figures": {"bytes/token/layer": 93544 * (1.05 if slower > 1 else 1.0)}}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(name, lines):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    return write


@pytest.mark.parametrize("seed", range(10))
def test_two_runs_of_one_commit_report_nothing(write, capsys, seed):
    a, b = write("a", results(seed)), write("b", results(seed + 100))
    assert bench.main(["compare", a, b]) == 0
    assert "41 compared, 0 worse, 0 better" in capsys.readouterr().out


def test_a_machine_that_is_slower_today_is_no_regression(write, capsys):
    assert bench.main(["compare", write("a", results(1)), write("b", results(2, machine=1.6))]) == 0
    assert "0 worse" in capsys.readouterr().out


def test_a_planted_slow_down_is_reported(write, capsys):
    a, b = write("a", results(1)), write("b", results(2, slower=1.5))
    assert bench.main(["compare", a, b]) == 1
    out = capsys.readouterr().out
    assert "41 compared, 41 worse" in out and out.startswith("WORSE")
    assert "against eager" in out and "bytes/token/layer 93,544 → 98,221.2" in out
    assert "torch.compile" not in out
    assert bench.main(["compare", b, a]) == 0
    assert "41 better" in capsys.readouterr().out


def test_others_are_judged_on_request(write, capsys):
    assert bench.main(["compare", "--all", write("a", results(1)), write("b", results(2, slower=1.5))]) == 1
    assert "torch.compile" in capsys.readouterr().out


def test_what_turned_red_or_is_gone_is_reported(write, capsys):
    before, after = list(results(1, cases=2)), list(results(1, cases=2))
    red = next(r for r in after if r.get("provider") == "fastlora")
    red |= {"ms": None, "parity": False, "why": "parity is red: dx"}
    after = [r for r in after if r["bench"] != "saved_bytes"]
    assert bench.main(["compare", write("a", before), write("b", after)]) == 1
    out = capsys.readouterr().out
    assert "gone: parity is red: dx" in out and "gone: not measured" in out and "2 worse" in out


def test_different_machines_and_missing_files_are_refused(write, tmp_path, capsys):
    a = write("a", results(1))
    b = write("b", [{"bench": "machine", "slug": "another"}])
    for other, message in ((b, "different machines"), (str(tmp_path / "absent"), "absent")):
        with pytest.raises(SystemExit, match="2"):
            bench.main(["compare", a, other])
        assert message in capsys.readouterr().err
