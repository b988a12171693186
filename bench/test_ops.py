"""The same cases under pytest-benchmark, for --benchmark-save and --benchmark-compare:

    pytest bench --benchmark-only                         every provider at this device's shapes
    pytest bench --benchmark-only -k "swiglu and full"    some
    BENCH_QUICK=1 pytest bench --benchmark-only           tiny shapes

Each test gates its provider first: red fails, a provider that cannot run skips and says why.
"""

from __future__ import annotations

import os

import pytest
import torch

from bench import harness, machine
from bench.gate import Witness, reason
from bench.ops import NAMES, cases
from bench.record import shape_text

DEVICE = machine.default_device()
DTYPE = torch.bfloat16
QUICK = os.environ.get("BENCH_QUICK") == "1"


def _parameters():
    for op in NAMES:
        for case in cases(op, DEVICE, DTYPE, QUICK):
            for provider in harness.providers(case):
                for mode in case.modes:
                    name = f"{case.op}-{mode}-{provider.name}-{shape_text(case.shape)}".replace(" ", "_")
                    yield pytest.param(case, provider, mode, id=name)


@pytest.mark.parametrize(("case", "provider", "mode"), _parameters())
def test_op(benchmark, case, provider, mode):
    torch.compiler.reset()
    green, why = reason(provider, Witness(case, DEVICE, DTYPE).check)
    if green is None:
        pytest.skip(why)
    assert green, why
    run = harness.thunk(case, provider.run, case.prepare(DEVICE, DTYPE), mode)
    benchmark.group = f"{case.op} {mode} {shape_text(case.shape)}"

    def step():
        run()
        machine.synchronize(DEVICE)

    benchmark.pedantic(step, rounds=20, warmup_rounds=3)
