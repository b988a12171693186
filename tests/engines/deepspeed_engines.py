"""DeepSpeed's ZeRO, each parameter partitioned however small it is."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import Any

import torch
from torch import nn

from .training import ROWS, Engine, adapters, optimizer, train_all

LEAF = {"classes": ["transformers.models.llama.modeling_llama.LlamaDecoderLayer"]}


def zero(model: nn.Module, stage: int, leaf: bool = False, bf16: bool = False) -> Any:
    import deepspeed

    # Buckets are allocated whole, and poisoned whole.
    sharding: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 10**5, "allgather_bucket_size": 10**5}
    if stage == 3:
        sharding |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 10**5}
    if leaf:
        sharding["leaf_module"] = LEAF
        # DeepSpeed reduces a leaf's gradients when those of its inputs are there: they must require one.
        model.enable_input_require_grads()
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": 0.0,
        "zero_optimization": sharding,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
    }
    return deepspeed.initialize(model=model, optimizer=optimizer(model), config=config)[0]


def state(engine: Any) -> dict[str, torch.Tensor]:
    if engine.zero_optimization_stage() == 3:
        return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    return engine.module.state_dict()


ENGINES = {
    "zero-2": Engine(partial(zero, stage=2), state, adapters, strict=True),
    "zero-3": Engine(partial(zero, stage=3), state, adapters, strict=False),
    "zero-3, leaf": Engine(partial(zero, stage=3, leaf=True), state, adapters, strict=False),
    "zero-3, leaf, bf16": Engine(partial(zero, stage=3, leaf=True, bf16=True), state, adapters, strict=False),
}


def main(out: str) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # A collective in shared memory, which would be compiled here first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo")
    train_all(ENGINES, out)
