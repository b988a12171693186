"""Patching one model changes nothing else in the process: no module, no class, no setting of another library."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, sys, logging, warnings
import fastlora
heavy = {"transformers", "peft", "triton", "torch"} & set(sys.modules)
assert not heavy, f"import fastlora imported {heavy}"

import torch
from patching import bystanders
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

def build():
    config = LlamaConfig(vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=32,
                         num_attention_heads=2, num_key_value_heads=1)
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules="all-linear", lora_dropout=0.1))

def run(model):
    ids = torch.arange(10).view(2, 5)
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    model.train()(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    model.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, pad_token_id=0)

model = build()
run(model)
before = bystanders.everything()
fastlora.patch(model)
run(model)
fused = [r for r in fastlora.explain(model).rows if r.fused]
assert len(fused) >= 10, fused
bystanders.compare(before)
fastlora.unpatch(model)
run(model)
bystanders.compare(before)
print("nothing else changed")
"""


def test_nothing_else_changes():
    """In a process of its own, so that the first patch, and the imports it causes, are seen too."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing else changed" in done.stdout
