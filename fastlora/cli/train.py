"""`fastlora train`: LoRA fine-tuning on TRL's SFTTrainer, patched."""

import json
import logging
import shlex
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

import fastlora

from . import checkpoints, ranks
from .data import Rows, read_rows
from .errors import CommandError, first_line
from .files import write_json
from .settings import Settings

CONTEXT = 4096
RUN_FILE = "run.json"
# What may differ between a run and its --resume: everything else would bend the loss curve.
FREE_ON_RESUME = {"out", "epochs", "max_steps", "save_steps", "patch", "ops", "strict", "memory"}


class Interrupted(Exception):
    """A signal ended the run after a checkpoint. `signum` is the signal."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


def train(settings: Settings, resume: bool, argv: Sequence[str], console: Console) -> dict[str, Any]:
    """Run or go on with a run. Writes adapter, tokenizer, loss.png and report.json to `settings.out`; the report.

    `argv` is the command line, shown again as the way to resume. Under torchrun and accelerate launch every process
    calls this, on the same directory; rank 0 writes, except that each rank adds its part to a checkpoint.
    """
    began = time.perf_counter()
    options = patch_options(settings)
    rows = read_rows(settings.data)
    answers_only = _answers_only(settings, rows)
    checkpoint = _open(settings, rows, resume, console)
    quiet()

    trainer, stop, speed, progress = _build(settings, options, rows, answers_only, console)
    from .energy import EnergyMeter, energy_report
    from .measure import PeakMemory
    from .trainer import Complete

    # Not before: a run that never began leaves its directory free, and every rank has seen that it was.
    ranks.wait()
    ranks.first(lambda: write_json(Path(settings.out) / RUN_FILE, _identity(settings, rows)))
    memory, meter = PeakMemory(), EnergyMeter()
    try:
        with stop, suppress(Complete):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()
    state = trainer.state
    if stop.signum is not None and state.global_step < state.max_steps:
        again = shlex.join([*argv, *([] if "--resume" in argv else ["--resume"])])
        console.print(f"\nStopped at step {state.global_step} of {state.max_steps}; a checkpoint is saved. Go on with:")
        console.print(f"  fastlora {again}" + ("" if ranks.world_size() == 1 else "   (by the same launcher)"))
        raise Interrupted(stop.signum)

    from .report import loss_curve, plot_loss, versions

    report = {
        "device": str(trainer.args.device),
        "versions": versions(),
        "settings": asdict(settings),
        "data": {"kind": rows.kind, "rows": len(rows.rows), "sha256": rows.sha256, "loss_on_answers": answers_only},
        "processes": ranks.world_size(),
        "steps": state.global_step,
        "resumed_from_step": int(checkpoint.name.rpartition("-")[2]) if checkpoint else None,
        "seconds": round(time.perf_counter() - began, 3),
        "tokens": speed.tokens,
        "tokens_per_second": speed.tokens_per_second(),
        "peak_memory": {"bytes": memory.bytes(), "at_start": memory.start, "what": memory.what},
        "saved_for_backward": {
            "bytes_per_token": trainer.saved_bytes_per_token,
            "what": "what autograd keeps of the first batch, without the model's weights, per position of the batch",
        },
        "energy": energy_report(meter, settings, trainer.model.config, speed.tokens, trainer.args.max_length),
        "plan": fastlora.explain(trainer.model).to_dict() if settings.patch else None,
        "loss": loss_curve(state.log_history),
    }
    _finish(settings, trainer, report, plot_loss, console)
    return report


def patch_options(settings: Settings) -> dict[str, Any]:
    """What the flags of these names are to `fastlora.patch`."""
    from fastlora.modules.memory import parse
    from fastlora.patching.engine import parse_ops

    options = {"ops": settings.ops, "strict": settings.strict, "memory": settings.memory}
    try:
        parse_ops(settings.ops)
        parse(settings.memory)
    except ValueError as error:
        raise CommandError(f"--{error}") from None
    for name, value in options.items():
        if not settings.patch and value != getattr(Settings, name):
            said = f"--{name}" if value is True else f"--{name} {value}"
            raise CommandError(f"{said} is fastlora's own; it does not go with --no-patch")
    return options


def _answers_only(settings: Settings, rows: Rows) -> bool:
    if rows.kind == "text":
        if settings.answers_only:
            raise CommandError(
                f'--completion-only needs messages or prompt and completion; {settings.data} holds "text"'
            )
        return False
    return settings.answers_only is not False


def _identity(settings: Settings, rows: Rows) -> dict[str, Any]:
    return {**asdict(settings), "data": f"sha256 {rows.sha256}", "processes": ranks.world_size()}


def _open(settings: Settings, rows: Rows, resume: bool, console: Console) -> Path | None:
    """See that the run's directory is free, or find in it the checkpoint to resume from."""
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise CommandError(f"--out {out} is a file; it needs a directory")
    identity = _identity(settings, rows)
    if not resume:
        if out.exists() and any(out.iterdir()):
            raise CommandError(f"--out {out} is not empty. Go on with its run: --resume; or choose another directory")
        return None
    if not (out / RUN_FILE).exists():
        raise CommandError(f"--resume: {out} holds no run of fastlora train ({RUN_FILE} is not there)")
    before = json.loads((out / RUN_FILE).read_text(encoding="utf-8"))
    changed = [key for key in identity if key not in FREE_ON_RESUME and identity[key] != before.get(key)]
    if changed:
        said = "; ".join(f"{key} was {before.get(key)}, is {identity[key]}" for key in changed)
        raise CommandError(f"--resume: the run in {out} was started otherwise: {said}")
    if found := checkpoints.finished(out):
        console.print(f"Resuming from {found[-1]}")
        return found[-1]
    console.print(f"No checkpoint in {out} yet: starting at the first step")
    return None


def quiet(bars: bool = True) -> None:
    """No warnings of transformers and TRL: what is left to say is said by the plan and the report."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not bars:
        transformers.utils.logging.disable_progress_bar()


def _build(
    settings: Settings, options: dict[str, Any], rows: Rows, answers_only: bool, console: Console
) -> tuple[Any, ...]:
    from datasets import Dataset
    from transformers import PrinterCallback

    from .chat import training_template
    from .measure import Speed
    from .models import device, load_config, load_model, load_tokenizer
    from .progress import ShowProgress
    from .trainer import LoRATrainer, Measure, StopIfComplete, StopOnSignal

    devices = device()
    tokenizer = load_tokenizer(settings.model)
    if rows.kind == "messages":
        tokenizer.chat_template = training_template(tokenizer, answers_only)
    # Before the model: they start the process group, and DeepSpeed and FSDP load what they shard their own way.
    args = _arguments(settings, rows, answers_only, load_config(settings.model))
    model = add_lora(load_model(settings.model, settings.dtype), settings)
    if settings.patch:
        try:
            fastlora.patch(model, **options)
        except fastlora.NotFused as error:
            raise CommandError(f"--strict: {error}") from None

    stop, speed = StopOnSignal(), Speed()
    progress = ShowProgress(console, speed)
    try:
        trainer: Any = LoRATrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(rows.rows),
            processing_class=tokenizer,
            callbacks=[StopIfComplete(), stop, Measure(speed), progress],
        )
    except ValueError as error:
        raise CommandError(f"TRL cannot train this: {first_line(error)}") from error
    trainer.remove_callback(PrinterCallback)
    trainer.speed = speed
    if not len(trainer.train_dataset):
        raise CommandError(
            f"no row of {settings.data} has a token to learn within --max-length {trainer.args.max_length}"
        )
    _announce(settings, rows, trainer, devices, console)
    return trainer, stop, speed, progress


def add_lora(model: Any, settings: Settings) -> Any:
    """`model` with a fresh LoRA adapter as a PeftModel, its A matrices drawn from `settings.seed`."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    targets: str | list[str] = settings.targets
    if targets != "all-linear":
        targets = [name.strip() for name in settings.targets.split(",")]
        # PEFT passes over a name that matches nothing as long as another one matches.
        there = {path.rpartition(".")[2] for path, _ in model.named_modules()}
        if absent := [name for name in targets if name not in there]:
            raise CommandError(f"--targets {settings.targets}: no module is called {', '.join(absent)}")
    config = LoraConfig(
        # Without a task type PEFT records the class it was given, which is ours once the model is patched.
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
    )
    set_seed(settings.seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise CommandError(f"--targets {settings.targets}: {first_line(error)}") from None


def _arguments(settings: Settings, rows: Rows, answers_only: bool, config: Any) -> Any:
    import torch
    from trl import SFTConfig

    from .models import resolve_dtype

    length = settings.max_length or min(CONTEXT, config.max_position_embeddings)
    return SFTConfig(
        output_dir=settings.out,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        learning_rate=settings.lr,
        max_length=length,
        packing=settings.packing,
        completion_only_loss=answers_only if rows.kind == "prompt-completion" else None,
        assistant_only_loss=answers_only if rows.kind == "messages" else False,
        gradient_checkpointing=settings.gradient_checkpointing,
        seed=settings.seed,
        save_steps=settings.save_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        # The weights already have the wanted type and the adapter is float32; autocast would only add casts.
        # float16 alone needs the loss scaling that comes with it. DeepSpeed reads from it what to compute in.
        bf16=ranks.engine() == "DEEPSPEED" and resolve_dtype(settings.dtype, config) == torch.bfloat16,
        fp16=settings.dtype == "float16",
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )


def _announce(settings: Settings, rows: Rows, trainer: Any, device: str, console: Console) -> None:
    trained, total = trainer.model.get_nb_trainable_parameters()
    sequences = len(trainer.train_dataset)
    dtype = str(trainer.model.dtype).removeprefix("torch.")
    console.print(f"{settings.model} in {dtype} on {device}")
    console.print(f"LoRA rank {settings.rank}: {trained:,} of {total:,} parameters train")
    loss_on = "the answers" if trainer.args.assistant_only_loss or trainer.completion_only_loss else "every token"
    note = f"{len(rows.rows):,} {rows.kind} rows, loss on {loss_on}"
    if settings.packing:
        note += f", packed into {sequences:,} sequences"
    elif sequences < len(rows.rows):
        note += f"; {len(rows.rows) - sequences:,} left out: nothing to learn within {trainer.args.max_length} tokens"
    console.print(note)
    if not settings.patch:
        console.print("not patched (--no-patch)")
        return
    console.print(f"patched: {fastlora.explain(trainer.model).summary()}")


def _finish(settings: Settings, trainer: Any, report: dict[str, Any], plot_loss: Any, console: Console) -> None:
    out = Path(settings.out)
    if not report["loss"] or (report["resumed_from_step"] == report["steps"] and (out / "report.json").exists()):
        console.print(f"The run in {out} is already complete: step {report['steps']}")
        return
    # Of sharded weights every rank holds a part.
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if ranks.engine() else None
    if ranks.rank() > 0:
        return
    # The report comes last: where it is, everything is.
    trainer.model.save_pretrained(str(out), state_dict=state, save_embedding_layers=False)
    trainer.processing_class.save_pretrained(str(out))
    plot_loss(report["loss"], out / "loss.png")
    write_json(out / "report.json", report)
    rate = report["tokens_per_second"]
    console.print(
        f"loss {report['loss'][0]['loss']:.4f} → {report['loss'][-1]['loss']:.4f} in {report['steps']} steps"
        + (f", {rate:,.0f} tokens/s" if rate else "")
        + f", peak {report['peak_memory']['bytes'] / 2**20:,.0f} MiB ({report['peak_memory']['what']})",
    )
    console.print(f"Adapter, tokenizer, loss.png and report.json are in {out}")
