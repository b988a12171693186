"""Two ranks that share the tokens of a step give what one process gives, patched as well as unpatched."""

import torch
from patching.tiny import Errors

SEEDS = 4


def test_deepspeeds_ulysses(pair, tmp_path):
    out = tmp_path / "runs.pt"
    imports = ("transformers", "peft")
    statuses = pair("engines.sequence_parallel:main", out, SEEDS, log=tmp_path / "log", imports=imports)
    assert statuses == [0, 0], pair.output[0][-4000:] + pair.output[1][-4000:]
    runs = torch.load(out, weights_only=False)
    for ours, eager in (("patched", "unpatched"), ("patched", "alone"), ("unpatched", "alone")):
        errors = Errors()
        for seed in range(SEEDS):
            errors.add(runs[ours][seed], runs[eager][seed], runs["truth"][seed], torch.float32)
        errors.check()
    reasons = {r.path.rsplit(".", 1)[-1]: r.why for r in runs["plan"].unfused}
    assert reasons.keys() == {"attention"}
    assert "uattn_wrapper (ulysses_sp.py:" in reasons["attention"]
