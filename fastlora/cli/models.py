"""Loading the model and the tokenizer, with one human line when it fails."""

from pathlib import Path
from typing import Any

from . import ranks
from .errors import CommandError, first_line

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_tokenizer(name: str) -> Any:
    """The tokenizer of `name`. It must have an end-of-sequence token, else the model never learns to stop."""
    from transformers import AutoTokenizer

    _check(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CommandError(f"cannot load the tokenizer of {name!r}: {first_line(error)}") from None
    if tokenizer.eos_token is None:
        raise CommandError(f"the tokenizer of {name!r} has no end-of-sequence token (eos_token)")
    return tokenizer


def _check(name: str) -> None:
    # What is no directory is taken for a name on the Hub, and the error would be about its spelling.
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise CommandError(f"--model {name}: no such directory")


def load_config(name: str) -> Any:
    """The configuration of `name`."""
    from transformers import AutoConfig

    _check(name)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise CommandError(f"cannot load the model {name!r}: {first_line(error)}") from None


def load_model(name: str, dtype: str) -> Any:
    """The causal language model `name` on the GPU, or on the CPU where there is none, in `dtype`."""
    import torch
    from transformers import AutoModelForCausalLM

    resolved = resolve_dtype(dtype, load_config(name))
    # Straight onto the device: which kernels run is decided by where the weights are when the model is patched.
    # What is to be sharded may not fit there: FSDP and DeepSpeed load it their own way.
    device_map = {"": ranks.local_rank()} if torch.cuda.is_available() and not ranks.engine() else None
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=resolved, device_map=device_map)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise CommandError(f"cannot load the model {name!r}: {first_line(error)}") from None


def load_adapter(base: Any, adapter: str) -> Any:
    """`base` with the PEFT adapter of a directory or a Hub id, to be trained."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, adapter, is_trainable=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(f"cannot load the adapter {adapter!r}: {first_line(error)}") from None


def resolve_dtype(dtype: str, config: Any) -> Any:
    """The torch dtype for `--dtype`. auto: bfloat16 on a GPU that has it, on a CPU where the model is stored so."""
    import torch

    cuda = torch.cuda.is_available()
    if dtype == "float16" and not cuda:
        raise CommandError("--dtype float16 needs a GPU; on a CPU use float32 or bfloat16")
    if dtype != "auto":
        return getattr(torch, dtype)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else config.dtype == torch.bfloat16
    return torch.bfloat16 if bf16 else torch.float32


def device() -> str:
    """The devices to train on, in words. Raises `CommandError` where several GPUs are seen by a single process."""
    import torch

    count = torch.cuda.device_count()
    if count > 1 and ranks.world_size() == 1:
        raise CommandError(
            f"{count} GPUs are visible to one process. Choose one: CUDA_VISIBLE_DEVICES=0; or start one process for "
            f"each: torchrun --nproc_per_node {count} -m fastlora.cli train …"
        )
    if ranks.engine() and not count:
        raise CommandError("accelerate launch was told to shard the weights, which needs GPUs; none is visible")
    if 0 < count <= ranks.local_rank():
        raise CommandError(f"process {ranks.local_rank()} of this machine needs a GPU of its own, {count} are visible")
    name = torch.cuda.get_device_name(ranks.local_rank()) if count else "cpu"
    return name if ranks.world_size() == 1 else f"{ranks.world_size()} × {name}"
