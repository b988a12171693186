"""PyTorch's own engines, and Accelerate's."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM

import fastlora
from fastlora.modules.lazy_logits import Product

from .training import Engine, adapters, rows, train_all, whole

CPU = torch.device("cpu")


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp1(model: nn.Module) -> nn.Module:
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=CPU, auto_wrap_policy=policy)


def fsdp1_adapter_units(model: nn.Module) -> nn.Module:
    """PEFT's own policy: every trained factor is a unit inside the layer's unit."""
    model.base_model.model._no_split_modules = ["LlamaDecoderLayer"]
    policy = fsdp_auto_wrap_policy(model)
    return FullyShardedDataParallel(model, use_orig_params=False, device_id=CPU, auto_wrap_policy=policy)


def fsdp2(model: nn.Module, **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in layers(model):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp2_mixed(model: nn.Module) -> nn.Module:
    return fsdp2(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


def fsdp2_checkpointing(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return fsdp2(model)


def fsdp2_adapter_units(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for name, module in model.named_modules():
        if name.endswith((".lora_A.default", ".lora_B.default")):
            fully_shard(module, mesh=mesh)
    return fsdp2(model)


def fsdp2_head(model: nn.Module) -> nn.Module:
    """As Accelerate: the embedding is a unit, the last norm and the head are another, never resharded in forward."""
    mesh = init_device_mesh("cpu", (2,))
    inner = model.base_model.model
    fully_shard(inner.model.embed_tokens, mesh=mesh)
    fully_shard([inner.model.norm, inner.lm_head], mesh=mesh, reshard_after_forward=False)
    return fsdp2(model)


def tensor_parallel(model: nn.Module) -> nn.Module:
    plan = {f"self_attn.{n}_proj": ColwiseParallel() for n in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
    plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    for layer in layers(model):
        parallelize_module(layer, init_device_mesh("cpu", (2,)), plan)
    return model


def accelerate(model: nn.Module) -> nn.Module:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    return accelerator.prepare(model)


ENGINES = {
    "ddp": Engine(ddp, full_state, adapters, strict=True),
    "fsdp1": Engine(fsdp1, full_state, adapters, strict=True),
    "fsdp1, adapters as units": Engine(fsdp1_adapter_units, full_state, adapters, strict=False),
    "fsdp2": Engine(fsdp2, full_state, adapters, strict=True),
    "fsdp2, bf16 compute": Engine(fsdp2_mixed, full_state, adapters, strict=True),
    "fsdp2, checkpointing": Engine(fsdp2_checkpointing, full_state, adapters, strict=True),
    "fsdp2, adapters as units": Engine(fsdp2_adapter_units, full_state, adapters, strict=False),
    "fsdp2, head as unit": Engine(fsdp2_head, full_state, adapters, strict=False),
    "accelerate": Engine(accelerate, full_state, adapters, strict=True),
    "tensor parallel": Engine(tensor_parallel, full_state, whole, strict=False, shared=True),
}


def classes_are_given_back() -> None:
    """patch and unpatch after fully_shard: the same class objects, units still units."""
    model = fsdp2(adapters())
    before = [type(module) for module in model.modules()]
    fastlora.patch(model, strict=True)
    assert type(layers(model)[0]) is type(layers(model)[1]) is not before[0]
    assert isinstance(layers(model)[0], FSDPModule) and isinstance(model, FSDPModule)
    fastlora.unpatch(model)
    assert [type(module) for module in model.modules()] == before
    patched = fsdp2(fastlora.patch(whole()))
    with fastlora.patched(patched, ops={"rope"}):
        assert isinstance(patched, FSDPModule)
    assert type(fastlora.unpatch(patched)).__bases__ == (FSDPModule, LlamaForCausalLM)


def logits_are_read_while_there_is_a_head() -> None:
    """Before backward they are what they are unpatched; afterwards the head is sharded, which is said."""
    model = fsdp2(adapters())
    expected = model(**rows(0, dist.get_rank()), use_cache=False).logits
    outputs = fastlora.patch(model)(**rows(0, dist.get_rank()), use_cache=False)
    torch.testing.assert_close(outputs.logits[...], expected)
    outputs = model(**rows(0, dist.get_rank()), use_cache=False)
    outputs.loss.backward()
    try:
        outputs.logits[...]
    except RuntimeError as error:
        assert "sharded again" in str(error)
    else:
        raise AssertionError("logits of a sharded head")


def ddp_looks_at_them_for_nothing() -> None:
    """Searching the graph for unused parameters, or kept, it passes every output through its own node."""

    def gradients(read: bool, **options: bool) -> list[torch.Tensor]:
        model = fastlora.patch(whole())
        wrapped = nn.parallel.DistributedDataParallel(model, **options)
        for _ in range(2):  # a static graph is known after the first
            with nullcontext() if read else patch.object(Product, "compute", None):
                outputs = wrapped(**rows(0, dist.get_rank()), use_cache=False)
                (outputs.loss + outputs.logits.pow(2).mean() if read else outputs.loss).backward()
        return [p.grad for p in model.parameters()]

    for read in (False, True):
        for options in ({"find_unused_parameters": True}, {"static_graph": True}):
            assert all(map(torch.equal, gradients(read, **options), gradients(read)))


def they_are_gathered() -> None:
    """By Accelerate and by collectives, as the tensor that they are."""
    from accelerate import Accelerator

    accelerator, rank, model = Accelerator(cpu=True), dist.get_rank(), fastlora.patch(adapters())

    def reduced(logits: torch.Tensor) -> torch.Tensor:
        copy = logits.detach().clone()
        dist.all_reduce(copy)
        return copy + 0

    def gathered(logits: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty(logits.shape) for _ in range(2)]
        dist.all_gather(parts, logits.detach())
        return torch.cat(parts)

    for function in (
        accelerator.gather,
        accelerator.gather_for_metrics,
        accelerator.reduce,
        lambda logits: accelerator.pad_across_processes(logits[:, rank:], dim=1),
        reduced,
        gathered,
    ):
        logits = model(**rows(0, rank), use_cache=False).logits
        found = function(logits)
        assert type(found + 0) is torch.Tensor
        assert torch.equal(found, function(logits[...]))


def no_output_is_a_view() -> None:
    """FSDP2 warns of them: an in-place operation would drop the hook that gathers before backward."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*returned a view")
        fsdp2(fastlora.patch(adapters()))(**rows(0, dist.get_rank()), use_cache=False)


def main(out: str) -> None:
    dist.init_process_group("gloo")
    train_all(ENGINES, out)
    classes_are_given_back()
    logits_are_read_while_there_is_a_head()
    ddp_looks_at_them_for_nothing()
    they_are_gathered()
    no_output_is_a_view()
    dist.destroy_process_group()
