"""Peak memory of a training process on a CPU, against the plan's arithmetic."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlora.planning import Shape
from fastlora.planning.activations import Adapters
from fastlora.planning.cluster import Cluster
from fastlora.planning.step import step_bytes

ROOT = Path(__file__).parents[2]
SHAPE = Shape(512, 1376, 6, 8, 8, vocab=8000)
TOKENS = 1024
# Two steps: AdamW makes its state at the end of the first. What was there before the model is the process's own.
RUN = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
import fastlora
from bench import models
from fastlora.planning import Shape
def status(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024
def step(model, optimizer, tokens):
    ids = torch.randint(model.config.vocab_size, (1, tokens))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
def trained(shape):
    model = models.with_lora(models.base_model(shape, torch.float32, "cpu"), 16, 0.0, True)
    fastlora.patch(model, memory=memory).train()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
memory, shape, tokens = json.loads(sys.argv[1])
step(*trained(Shape(64, 176, 1, 2, 2, 256)), 64)  # loads what a step loads
def settle():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return status("VmRSS")
before = settle()
model, optimizer = trained(Shape(**shape))
settle()
Path("/proc/self/clear_refs").write_text("5")
for _ in range(2):
    step(model, optimizer, tokens)
print(json.dumps([before, status("VmHWM")]))
"""


# glibc keeps much of what is freed. With this it gives every large block back at once, and the peak is what is in use.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def run(memory, **environment):
    """Memory of a process before it has a model, and at its peak."""
    shape = {name: getattr(SHAPE, name) for name in ("hidden", "ffn", "layers", "heads", "kv_heads", "vocab")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([memory, shape, TOKENS])],
        cwd=ROOT, env={**os.environ, **environment}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def predicted(checkpointed):
    adapters = Adapters.uniform(16)
    resident = sum(Cluster(SHAPE, adapters, 1, "single", None, itemsize=4).resident().values())
    step = step_bytes(SHAPE, adapters, TOKENS, TOKENS, itemsize=4, device="cpu")
    return resident + step.peak(SHAPE.layers, 0, checkpointed)


needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


@needs_proc
def test_the_peak_of_a_training_process_is_predicted():
    before, peak = run("fast")
    assert before + predicted(0) == pytest.approx(peak, rel=0.15)


@needs_proc
def test_so_is_what_training_adds_where_every_layer_is_checkpointed():
    before, peak = run("lean", **GIVES_BACK)
    assert predicted(SHAPE.layers) == pytest.approx(peak - before, rel=0.15)
