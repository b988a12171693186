"""transformers' continuous batching, which TRL's use_transformers_paged asks for: the tokens are the unpatched ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

# In a process of its own, which ends whatever the batching's thread does.
SCRIPT = """
import json, os, torch
from patching.tiny import llama, lora
from transformers import GenerationConfig
import fastlora

ids = torch.randint(3, 101, (3, 9), generator=torch.Generator().manual_seed(4)).tolist()
paged = GenerationConfig(
    max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0, num_blocks=16, block_size=32, max_batch_tokens=64
)
found = []
for patch in (lambda model: model, fastlora.patch):
    model = patch(lora(llama(max_position_embeddings=256)).eval())
    outputs = model.generate_batch(inputs=ids, generation_config=paged, progress_bar=False)
    found.append([list(output.generated_tokens) for output in outputs.values()])
attention = [r for r in fastlora.explain(model).rows if r.path.endswith(".attention")]
print("OUT", json.dumps([*found, [r.fused for r in attention]]), flush=True)
os._exit(0)
"""


def test_the_tokens_are_the_unpatched_ones():
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("OUT")] or [done.stderr[-3000:]]
    unpatched, patched, fused = json.loads(line.removeprefix("OUT"))
    assert patched == unpatched and [len(tokens) for tokens in patched] == [6, 6, 6]
    assert fused == [0, 0], "attention over a paged cache is transformers'"
