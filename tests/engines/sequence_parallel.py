"""A step whose tokens two ranks share: DeepSpeed's Ulysses, which puts itself in the place of transformers' SDPA."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist
from patching.tiny import batch, gradients, in_float64, llama, lora

import fastlora

TOKENS = 16


def build(seed: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return lora(llama(seed, dtype=dtype))


def inputs(seed: int) -> dict[str, torch.Tensor]:
    whole = batch(seed, rows=1, tokens=TOKENS)
    shifted = torch.nn.functional.pad(whole["labels"], (0, 1), value=-100)[:, 1:]
    return {**whole, "shift_labels": shifted, "position_ids": torch.arange(TOKENS)[None]}


def whole_step(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """By one process alone."""
    model.train().zero_grad()
    outputs = model(**inputs(seed), num_items_in_batch=TOKENS, use_cache=False)
    outputs.loss.backward()
    return {"loss": outputs.loss.detach(), "logits": outputs.logits[...].detach(), **gradients(model)}


def shared_step(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Each rank has half of the tokens; losses and gradients are added up, logits put together."""
    model.train().zero_grad()
    half = TOKENS // 2
    mine = {name: t[:, dist.get_rank() * half :][:, :half] for name, t in inputs(seed).items()}
    outputs = model(**mine, num_items_in_batch=TOKENS, use_cache=False)
    outputs.loss.backward()
    found = {"loss": outputs.loss.detach(), **gradients(model)}
    for tensor in found.values():
        dist.all_reduce(tensor)
    logits = outputs.logits[...].detach().contiguous()
    halves = [torch.empty_like(logits) for _ in range(2)]
    dist.all_gather(halves, logits)
    return found | {"logits": torch.cat(halves, 1)}


def main(out: str, seeds: str) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo")
    truth = [in_float64(build(seed), whole_step, seed) for seed in range(int(seeds))]
    alone = [whole_step(build(seed), seed) for seed in range(int(seeds))]
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    UlyssesSPAttentionHF.register_with_transformers(build(0), "sdpa", sequence_parallel_size=2, micro_batch_size=1)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not original
    unpatched = [shared_step(build(seed), seed) for seed in range(int(seeds))]
    models = [fastlora.patch(build(seed)) for seed in range(int(seeds))]
    patched = [shared_step(model, seed) for seed, model in enumerate(models)]
    if dist.get_rank() == 0:
        plan = fastlora.explain(models[0])
        runs = {"truth": truth, "alone": alone, "unpatched": unpatched, "patched": patched, "plan": plan}
        torch.save(runs, Path(out))
