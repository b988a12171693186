"""The processes of one run: one per GPU, started by torchrun or accelerate launch, which say so in the environment."""

import os
from collections.abc import Callable
from typing import Any


def rank() -> int:
    """This process's number; 0 is the one that prints and writes."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Its number on this machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def engine() -> str | None:
    """What accelerate launch was told to shard the weights by: "FSDP", "DEEPSPEED", or None."""
    names = ("FSDP", "DEEPSPEED")
    return next((name for name in names if os.environ.get(f"ACCELERATE_USE_{name}", "false") == "true"), None)


def wait() -> None:
    """Return when every process has come here. Processes that do not know of each other do not wait."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def largest(value: int, device: Any) -> int:
    """The largest `value` of any process."""
    import torch
    import torch.distributed as dist

    if world_size() == 1:
        return value
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found.item())


def from_all(value: Any) -> list[Any]:
    """The `value` of every process, by rank."""
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def first(write: Callable[[], None]) -> None:
    """Let rank 0 write, while the others wait for it."""
    if rank() == 0:
        write()
    wait()
