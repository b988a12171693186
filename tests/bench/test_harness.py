import pytest
import torch

from bench import harness, machine, record
from bench.ops import cases


class Simulated:
    """A clock that only calls move on, each by its own time."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def thunk(self, name, seconds):
        def run():
            self.calls.append(name)
            self.now += seconds

        return run


def test_times_are_each_providers_own():
    clock = Simulated()
    times = harness.interleave(
        {"a": clock.thunk("a", 0.002), "b": clock.thunk("b", 0.003)}, "cpu", seconds=0.1, clock=clock
    )
    assert times == {"a": [pytest.approx(2.0)] * 20, "b": [pytest.approx(3.0)] * 20}


def test_providers_take_turns_in_a_changing_order():
    clock = Simulated()
    harness.interleave({n: clock.thunk(n, 1.0) for n in "abc"}, "cpu", seconds=0, clock=clock, least=12)
    rounds = ["".join(clock.calls[-36 + 3 * i :][:3]) for i in range(12)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds) and len(set(rounds)) > 2


def test_spread():
    found = record.spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert found == {"median": 3.5, "p20": 2.0, "p80": 5.0, "n": 6}


def test_saved_bytes_counts_storages_once_without_the_weights():
    x = torch.ones(8, 4, requires_grad=True)
    w = torch.ones(4, 4)
    with harness.SavedBytes([w]) as saved:
        h = (x @ w).exp()  # keeps w and its own result
        y = h * h[:, :1]  # keeps that result again, and a view of it
    assert saved.bytes == h.numel() * 4
    del y


def test_half_a_line_of_a_cut_off_run_is_left_out(tmp_path):
    sink = record.Sink(tmp_path / "ops.jsonl", {"bench": "machine", "slug": "x"})
    sink.write({"bench": "op", "op": "o", "shape": {}, "dtype": "float32", "provider": "p", "why": "no"})
    with sink.path.open("a") as file:
        file.write('{"bench": "op", "op": "o", "sha')
    machines, records = record.load(tmp_path)
    assert [m["slug"] for m in machines] == ["x"] and [r["provider"] for r in records] == ["p"]
    with pytest.raises(FileNotFoundError, match="holds no"):
        record.load(tmp_path / "empty")


def test_code_of_another_architecture_is_no_measurement_of_this_one(monkeypatch):
    (case,) = cases("swiglu", "cpu", torch.bfloat16, quick=True)
    monkeypatch.setenv("TRITON_OVERRIDE_ARCH", "sm80")
    lines = list(harness.measure(case, "cpu", torch.bfloat16, machine.Ceilings(1e9, 1e10), 0.01, ("fastlora",)))
    assert [line["mode"] for line in lines] == ["forward, code of sm80", "full, code of sm80"]
