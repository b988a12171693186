"""Peak memory of a training process on a CPU, against the plan's arithmetic."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastlora.planning import Shape
from fastlora.planning.activations import Adapters
from fastlora.planning.cluster import Cluster
from fastlora.planning.step import step_bytes

ROOT = Path(__file__).parents[2]
SHAPE = Shape(512, 1376, 4, 8, 8, vocab=4000)
TOKENS = 1024
# Two steps each: AdamW makes its state at the end of the first. What was there before the model is the process's own.
RUN = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
import fastlora
from bench import models
from fastlora.planning import Shape
libc = ctypes.CDLL("libc.so.6")
# glibc keeps some of what is freed. With this it gives every large block back at once, and the peak is what is in use.
libc.mallopt(-3, 65536)
def status(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024
def settle():
    gc.collect()
    libc.malloc_trim(0)
    return status("VmRSS")
def train(shape, tokens, memory):
    before = settle()
    model = models.with_lora(models.base_model(shape, torch.float32, "cpu"), 16, 0.0, True)
    fastlora.patch(model, memory=memory).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    settle()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        ids = torch.randint(shape.vocab, (1, tokens))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, status("VmHWM")
shape, tokens = json.loads(sys.argv[1])
train(Shape(64, 176, 1, 2, 2, 256), 64, "fast")  # loads what a step loads
print(json.dumps([train(Shape(**shape), tokens, memory) for memory in ("fast", "lean")]))
"""


@pytest.fixture(scope="module")
def runs():
    """Memory of a process before it has a model, and at its peak: trained under "fast", and under "lean"."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    shape = {name: getattr(SHAPE, name) for name in ("hidden", "ffn", "layers", "heads", "kv_heads", "vocab")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([shape, TOKENS])],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def predicted(checkpointed):
    adapters = Adapters.uniform(16)
    resident = sum(Cluster(SHAPE, adapters, 1, "single", None, itemsize=4).resident().values())
    step = step_bytes(SHAPE, adapters, TOKENS, TOKENS, itemsize=4, device="cpu")
    return resident + step.peak(SHAPE.layers, 0, checkpointed)


@pytest.mark.parametrize("run, checkpointed", [(0, 0), (1, SHAPE.layers)], ids=["fast", "lean"])
def test_the_peak_of_a_training_process_is_predicted(runs, run, checkpointed):
    """Within 15 %, of the whole process and of what the model and its training add to it."""
    before, peak = runs[run]
    assert before + predicted(checkpointed) == pytest.approx(peak, rel=0.15)
    assert predicted(checkpointed) == pytest.approx(peak - before, rel=0.15)
