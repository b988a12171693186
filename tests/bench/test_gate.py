"""A wrong kernel gets no time."""

import pytest
import torch

from bench import gate, harness, machine
from bench.case import Case, Provider, Work
from bench.ops import NAMES, cases
from fastlora import ops, reference

GATED = ("fastlora", "base", "peft", "sdpa", "addmm", "augmented", "pitched", "tight", "stacked")
CEILINGS = machine.Ceilings(1e9, 1e10)


def off(t):
    """An operand perturbed by two per cent."""
    return t * 1.02


def wrong_gradient(gate, up):
    """The right value with a gradient that is two per cent off."""
    right = reference.swiglu(gate, up)
    return right + 0.02 * (up - up.detach()) * torch.nn.functional.silu(gate.detach())


def raises(gate, up):
    raise RuntimeError("no such device\nand a long story")


def swiglu(*providers):
    return Case(
        op="swiglu",
        shape={"M": 16, "F": 48},
        inputs=lambda new: {"gate": new(16, 48), "up": new(16, 48)},
        reference=reference.swiglu,
        wrt=("gate", "up"),
        forward=Work(3 * 16 * 48 * 2, 1),
        backward=Work(5 * 16 * 48 * 2, 1),
        providers=providers,
    )


def measured(case, dtype=torch.bfloat16):
    return {(r["provider"], r["mode"]): r for r in harness.measure(case, "cpu", dtype, CEILINGS, seconds=0.01)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("wrong", "figure"),
    [
        (lambda gate, up: ops.swiglu(off(gate), up), "output 0"),
        (lambda gate, up: ops.swiglu(gate, off(up)), "output 0"),
        (wrong_gradient, "dup"),
        (lambda gate, up: ops.swiglu(gate, up) * float("nan"), "output 0"),
    ],
)
def test_a_wrong_kernel_is_red_and_not_timed(wrong, figure, dtype):
    records = measured(swiglu(Provider("right", ops.swiglu), Provider("wrong", wrong)), dtype)
    for mode in ("forward", "full"):
        red = records["wrong", mode]
        assert red["parity"] is False and red["why"].startswith(f"parity is red: {figure}: over budget")
        assert not {"ms", "graph_ms", "fraction"} & set(red)
        for name in ("right", "eager"):
            assert records[name, mode]["parity"] is True and records[name, mode]["ms"]["median"] > 0


def test_who_cannot_run_says_why_and_the_others_run_on():
    records = measured(swiglu(Provider("broken", raises), Provider("absent", None, "absent is not installed")))
    assert records["broken", "full"]["why"] == "RuntimeError: no such device"
    assert records["absent", "full"]["why"] == "absent is not installed"
    assert records["broken", "full"]["parity"] is None and "ms" not in records["broken", "full"]
    assert records["eager", "full"]["ms"]["median"] > 0


def test_a_mean_is_judged_by_the_errors_of_eagers_terms():
    truth = torch.full((100,), 10.0, dtype=torch.float64)
    eager = truth + 0.02 * torch.tensor([1.0, -1.0] * 50)  # whose mean is right by luck
    gate.judge_mean(10.0 + 0.0219, 10.0, eager, truth, "loss")
    for bad in (10.0 + 0.0221, 10.0 - 0.0221, float("nan")):
        with pytest.raises(gate.Red, match="loss: over budget"):
            gate.judge_mean(bad, 10.0, eager, truth, "loss")


@pytest.mark.parametrize("op", NAMES)
def test_every_op_is_green_here(op):
    found = list(cases(op, "cpu", torch.bfloat16, quick=True))
    assert found
    for case in found:
        witness = gate.Witness(case, "cpu", torch.bfloat16)
        for provider in harness.providers(case, GATED):
            assert gate.reason(provider, witness.check) == (True, None), (case.op, provider.name)
