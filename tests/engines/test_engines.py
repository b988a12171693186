"""Ten steps on two ranks in every engine: patched as good as unpatched, fused where the table says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from patching.tiny import Errors, InFloat64, batch, llama
from peft import PeftModel
from safetensors.torch import load_file

from .training import ROWS, SIZES, STEPS, adapters, optimizer, rows, whole

# What is left alone, by the end of its path, and a part of the reason.
LEFT_ALONE = {
    "ddp": {},
    "fsdp1": {},
    "fsdp1, adapters as units": {"_proj": "LoRA factor is a FullyShardedDataParallel"},
    "fsdp2": {},
    "fsdp2, bf16 compute": {},
    "fsdp2, checkpointing": {},
    "fsdp2, adapters as units": {"_proj": "hooks on the FSDPLinear"},
    "fsdp2, head as unit": {"base_model.model": "lm_head is a FSDPLinear"},
    "accelerate": {},
    "tensor parallel": {"_proj": "hooks on the Linear"},
    "zero-2": {},
    "zero-3": {
        "_proj": "ZeRO-3 gathers module by module",
        "mlp": "hooks on the SiLU",
        "base_model.model": "hooks on the Linear",
        "layers.0": "ZeRO-3",
        "layers.1": "ZeRO-3",
    },
    "zero-3, leaf": {"base_model.model": "hooks on the Linear"},
    "zero-3, leaf, bf16": {"base_model.model": "hooks on the Linear"},
}
TORCH = [name for name in LEFT_ALONE if not name.startswith("zero")]


@pytest.fixture(scope="session")
def runs(pair, tmp_path_factory):
    """The folder of an engine's runs. All engines of a kind share one launch."""
    found: dict[str, Path] = {}

    def of(engine: str) -> Path:
        kind = "torch" if engine in TORCH else "deepspeed"
        if kind not in found:
            found[kind] = tmp_path_factory.mktemp(kind) / "runs"
            imports = ("transformers", "peft", "accelerate")
            target = f"engines.{kind}_engines:main"
            statuses = pair(target, found[kind], log=found[kind].parent / "log", imports=imports)
            assert statuses == [0, 0], pair.output[0][-4000:] + pair.output[1][-4000:]
        return found[kind] / engine

    return of


def load(folder: Path) -> tuple[dict[str, torch.Tensor], object, str]:
    """Losses and weights, the plan, and the plan in words."""
    run = torch.load(folder / "run.pt", weights_only=False)
    adapter = folder / "adapter_model.safetensors"
    weights = load_file(adapter) if adapter.exists() else torch.load(folder / "state.pt")
    return {**run["losses"], **{name: t.float() for name, t in weights.items()}}, run["plan"], run["text"]


def key(name: str) -> str:
    """A parameter's name as PEFT saves it."""
    return name.replace(".default.", ".")


@pytest.fixture(scope="session")
def truth():
    """The same training in float64, in one process: the ranks' losses averaged, or one batch."""
    found: dict[bool, dict[str, torch.Tensor]] = {}

    def of(shared: bool) -> dict[str, torch.Tensor]:
        if shared not in found:
            model = (whole() if shared else adapters()).double()
            update, losses = optimizer(model), {}
            with InFloat64():
                for i in range(STEPS):
                    batches = [rows(i, None)] if shared else [rows(i, rank) for rank in range(2)]
                    mine, *others = [model(**one, use_cache=False).loss for one in batches]
                    (sum(others, mine) / len(batches)).backward()
                    update.step()
                    update.zero_grad()
                    losses[f"loss {i}"] = mine.detach()
            found[shared] = losses | {key(n): p.detach() for n, p in model.named_parameters() if p.requires_grad}
        return found[shared]

    return of


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("engine", LEFT_ALONE)
def test_trains_as_unpatched(engine, when, runs, truth):
    expected = truth(engine == "tensor parallel")
    ours, plan, text = load(runs(engine) / when)
    eager, _, _ = load(runs(engine) / "never")
    assert ours.keys() == eager.keys() == expected.keys()
    errors = Errors()
    errors.add(ours, eager, expected, torch.bfloat16 if "bf16" in engine else torch.float32)
    errors.check()

    assert plan.rows
    for row in plan.rows:
        reasons = [why for end, why in LEFT_ALONE[engine].items() if row.path.endswith(end)]
        if reasons:
            assert row.why and any(reason in row.why for reason in reasons), (row, text)
            assert row.fused == 0 and row.passed >= STEPS, row
        elif not row.path.endswith(".attention"):  # plain batches go to SDPA
            calls = 2 * STEPS if "checkpointing" in engine and ".layers." in row.path else STEPS
            assert row.why is None and (row.fused, row.passed) == (calls, 0), (row, text)


def test_the_budget_notices(runs, truth):
    """Weights and losses that are off by sixteen roundings."""
    ours, eager = ({n: t * (1 + off) for n, t in load(runs("fsdp2") / "never")[0].items()} for off in (2.0**-20, 0))
    errors = Errors()
    errors.add(ours, eager, truth(False), torch.float32)
    with pytest.raises(AssertionError, match="unpatched"):
        errors.check()


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp2", "zero-3, leaf"])
def test_the_adapter_is_plain_peft(engine, runs, truth):
    """Saved from sharded weights, loaded into an unpatched model: the logits of the float64 run's adapter."""

    def logits(folder: Path) -> torch.Tensor:
        model = PeftModel.from_pretrained(llama(1, **SIZES), folder).eval()
        with torch.no_grad():
            return model(input_ids=batch(99, ROWS, 12)["input_ids"]).logits

    assert "fastlora" not in (runs(engine) / "before" / "adapter_config.json").read_text()
    exact = adapters().double().eval()
    exact.load_state_dict({n: truth(False)[key(n)] for n, _ in exact.named_parameters() if "lora_" in n}, strict=False)
    with torch.no_grad(), InFloat64():
        expected = exact(input_ids=batch(99, ROWS, 12)["input_ids"]).logits
    errors = Errors()
    ours, eager = (logits(runs(engine) / when) for when in ("before", "never"))
    errors.add({"logits": ours}, {"logits": eager}, {"logits": expected}, torch.float32)
    errors.check()
