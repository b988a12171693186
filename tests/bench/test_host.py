"""The benchmark of the host's time: launchers run, nothing is started, and all is as before afterwards."""

import torch

from bench import __main__ as bench
from bench import host, record
from fastlora import ops


def test_it_measures_the_path_of_a_gpu(monkeypatch, tmp_path):
    looked_up = []
    monkeypatch.setattr(host._tl, "kinds", lambda args: looked_up.append(args) or ())
    command = ["host", "--steps", "2", "--providers", "peft,fastlora", "--out", str(tmp_path)]
    assert bench.main(command) == 0
    _, (peft, ours) = record.load(tmp_path / "host.jsonl")
    assert peft["ms"]["n"] == ours["ms"]["n"] == 2 and "figures" not in peft
    assert ours["figures"]["against PEFT"] > 0 and ours["mode"] == "rows of sm_90"
    assert len(looked_up) > 10 * host._LAYERS * (host._WARM + 2)  # the launches of so many steps


def test_the_operators_are_themselves_again(monkeypatch):
    looked_up = []
    monkeypatch.setattr(host._tl, "kinds", lambda args: looked_up.append(args) or ())
    x, up = torch.randn(5, 8), torch.randn(5, 8)
    expected = ops.swiglu(x, up)
    with host.launchers_on_the_cpu(90):
        ops.swiglu(x, up)
    assert torch.equal(ops.swiglu(x, up), expected) and len(looked_up) == 1
