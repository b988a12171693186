"""`fastlora verify`: a model and a batch of one's own data, fused and unfused, against float64."""

import re
import tempfile
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import fastlora

from .data import Rows, read_rows
from .errors import CommandError, first_line
from .models import load_adapter, load_model, load_tokenizer
from .settings import Settings
from .train import _answers_only, _arguments, add_lora, patch_options, quiet


def verify(settings: Settings, adapter: str | None, console: Console) -> bool:
    """Verify `settings.model` on the first batch that `fastlora train` would draw; whether all is within the budget."""
    options = patch_options(settings)
    rows = read_rows(settings.data)
    answers_only = _answers_only(settings, rows)
    quiet()
    tokenizer = load_tokenizer(settings.model)
    base = load_model(settings.model, settings.dtype)
    batch = _batch(settings, rows, answers_only, tokenizer, base.config)
    if adapter is None:
        model = add_lora(base, settings)
        _randomise(model)
        console.print(f"No --adapter: LoRA rank {settings.rank} on {settings.targets}, its B drawn at random")
    else:
        model = load_adapter(base, adapter)
    dtype = str(base.dtype).removeprefix("torch.")
    console.print(f"{settings.model} in {dtype}, {batch['input_ids'].numel():,} tokens of {settings.data}\n")
    try:
        found = fastlora.verify(model, batch, **options)
    except fastlora.NotFused as error:
        raise CommandError(f"--strict: {error}") from None
    _print(found, console)
    return found.within


def _batch(settings: Settings, rows: Rows, answers_only: bool, tokenizer: Any, config: Any) -> dict[str, Any]:
    """The first batch, tokenised, labelled and collated by TRL's SFTTrainer. It asks for a model: any will do."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTTrainer

    from .chat import training_template

    if rows.kind == "messages":
        tokenizer.chat_template = training_template(tokenizer, answers_only)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    standin = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    with tempfile.TemporaryDirectory() as out:
        arguments = _arguments(settings, rows, answers_only, config)
        arguments.output_dir = out
        try:
            data = Dataset.from_list(rows.rows)
            trainer: Any = SFTTrainer(standin, arguments, train_dataset=data, processing_class=tokenizer)
        except ValueError as error:
            raise CommandError(f"TRL cannot train this: {first_line(error)}") from error
    if not len(trainer.train_dataset):
        raise CommandError(f"no row of {settings.data} has a token to learn within --max-length {arguments.max_length}")
    return dict(next(iter(trainer.get_train_dataloader())))


def _randomise(model: Any) -> None:
    """A new B is zero, and with it every gradient of A."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)


def _print(found: fastlora.Verification, console: Console) -> None:
    header, *lines = found.lines()
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    # Names are what a narrow terminal, or a file, must show whole.
    narrow = sum(widths) + 2 * len(widths) > console.width
    columns = (0, 1, -1) if narrow else range(len(header))
    table = Table(box=None, pad_edge=False)
    for i in columns:
        table.add_column(header[i], overflow="fold")
    for line in lines:
        cells = [re.sub(r"^.*\.(?=layers\.)", "…", line[i]) if narrow else line[i] for i in columns]
        # As text: a path is no markup.
        table.add_row(*(Text(cell, "bold red" if line[-1].endswith("OVER") else "") for cell in cells))
    console.print(table)
    if narrow:
        for check in found.exceeded:
            if check.wrong:
                console.print(f"{check.module}: {check.quantity}: {check.wrong}")
        console.print(f"(COLUMNS={sum(widths) + 2 * len(widths)} shows {', '.join(header[2:-1])} too)")
    console.print(f"\n{found.notes()}\n{found.verdict()}")
