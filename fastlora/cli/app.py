"""The commands and their flags. Imports only Typer; each command imports what it needs when it runs."""

import sys
from enum import Enum
from typing import Annotated, Any

import typer

import fastlora
from fastlora.planning.energy import INTENSITY, PUE

from .settings import Settings

app = typer.Typer(
    help="LoRA fine-tuning of Llama 2 models with fused kernels. Adapters are plain PEFT files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
DEFAULT = Settings(model="", data="", out="")


def _more_than_zero(value: float) -> float:
    if value <= 0:
        raise typer.BadParameter(f"{value} is not more than 0")
    return value


# What fastlora.patch takes.
Ops = Annotated[str | None, typer.Option(help="Fuse only these: rms_norm,swiglu.  [default: all]")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop if anything that could be fused would not be.")]
Memory = Annotated[
    str, typer.Option(help="fast, lean (checkpoint layers), auto (recompute what must be), or bytes: 20GB.")
]


class Dtype(str, Enum):
    """Weight types."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _console() -> Any:
    from rich.console import Console

    from .ranks import rank

    # Paths are printed as they are: not coloured, not read as markup, not broken over lines.
    return Console(highlight=False, markup=False, soft_wrap=True, quiet=rank() > 0)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fastlora {fastlora.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What every command shares."""


@app.command()
def train(
    model: Annotated[str, typer.Option(help="A model directory or a Hugging Face id.")],
    data: Annotated[str, typer.Option(help="JSON lines, all of one kind: messages, prompt + completion, or text.")],
    out: Annotated[str, typer.Option(help="Directory for adapter, checkpoints, loss.png and report.json.")],
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank.")] = DEFAULT.rank,
    alpha: Annotated[
        int, typer.Option(min=1, help="LoRA alpha; the update is scaled by alpha / rank.")
    ] = DEFAULT.alpha,
    dropout: Annotated[float, typer.Option(min=0, max=0.99, help="LoRA dropout.")] = DEFAULT.dropout,
    targets: Annotated[str, typer.Option(help="all-linear, or module names: q_proj,v_proj.")] = DEFAULT.targets,
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate; falls linearly to 0.")] = DEFAULT.lr,
    epochs: Annotated[float, typer.Option(callback=_more_than_zero, help="Passes over the data.")] = DEFAULT.epochs,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many steps, whatever --epochs says.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward.")] = DEFAULT.batch_size,
    grad_accum: Annotated[int, typer.Option(min=1, help="Forwards per optimizer step.")] = DEFAULT.grad_accum,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per sequence; the rest is cut.  [default: the model's context, at most 4096]"),
    ] = None,
    packing: Annotated[bool, typer.Option(help="Put several rows into one sequence.")] = DEFAULT.packing,
    answers_only: Annotated[
        bool | None,
        typer.Option(
            "--completion-only/--full-loss", help="Learn only the answers, or every token.  [default: completion-only]"
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Recompute layers in backward: less memory, slower.")
    ] = DEFAULT.gradient_checkpointing,
    ops: Ops = DEFAULT.ops,
    strict: Strict = DEFAULT.strict,
    memory: Memory = DEFAULT.memory,
    dtype: Annotated[
        Dtype, typer.Option(help="Type of the frozen weights. auto: bfloat16 where the GPU has it.")
    ] = Dtype.auto,
    seed: Annotated[int, typer.Option(help="Seed of adapter, data order and dropout.")] = DEFAULT.seed,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = DEFAULT.save_steps,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    no_patch: Annotated[bool, typer.Option("--no-patch", help="Train without fastlora, to compare.")] = False,
) -> None:
    """Fine-tune a model with LoRA.

    Ctrl-C (or SIGTERM) saves a checkpoint; --resume goes on from it on the same loss curve.

    Several GPUs: torchrun --nproc_per_node N -m fastlora.cli train …, or accelerate launch with a configuration.
    """
    from .train import Interrupted
    from .train import train as run

    settings = Settings(
        model=model, data=data, out=out, rank=rank, alpha=alpha, dropout=dropout, targets=targets, lr=lr,
        epochs=epochs, max_steps=max_steps, batch_size=batch_size, grad_accum=grad_accum, max_length=max_length,
        packing=packing, answers_only=answers_only, gradient_checkpointing=gradient_checkpointing, ops=ops,
        strict=strict, memory=memory, dtype=dtype.value, seed=seed, save_steps=save_steps, patch=not no_patch,
    )  # fmt: skip
    try:
        run(settings, resume, sys.argv[1:], _console())
    except Interrupted as stop:
        raise typer.Exit(128 + stop.signum) from None


@app.command()
def demo(
    out: Annotated[
        str | None, typer.Option(help="Empty directory for the results.  [default: a temporary one]")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Training steps of each run.")] = 200,
) -> None:
    """Train a small Llama with and without fastlora and compare. No download, no GPU, about four minutes."""
    from .demo import demo as run

    run(out, steps, _console())


@app.command()
def verify(
    model: Annotated[str, typer.Option(help="A model directory or a Hugging Face id.")],
    data: Annotated[str, typer.Option(help="JSON lines, as for train.")],
    adapter: Annotated[
        str | None, typer.Option(help="A PEFT adapter directory.  [default: a new adapter, its B drawn at random]")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in the batch.")] = DEFAULT.batch_size,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per sequence; the rest is cut.  [default: the model's context, at most 4096]"),
    ] = None,
    packing: Annotated[bool, typer.Option(help="Put several rows into one sequence.")] = DEFAULT.packing,
    dtype: Annotated[Dtype, typer.Option(help="Type of the frozen weights, as for train.")] = Dtype.auto,
    ops: Ops = DEFAULT.ops,
    strict: Strict = DEFAULT.strict,
    memory: Memory = DEFAULT.memory,
) -> None:
    """Hold the fused model against float64 on a batch of the data, layer by layer and whole. Trains nothing.

    Of the whole model: logits of a training step, logits and greedy tokens with and without a cache, and whether all
    that is said to be fused ran. Exit status 1 if anything exceeds the error budget, or did not run.
    """
    from .verify import verify as run

    settings = Settings(
        model=model, data=data, out="", batch_size=batch_size, max_length=max_length, packing=packing, ops=ops,
        strict=strict, memory=memory, dtype=dtype.value,
    )  # fmt: skip
    if not run(settings, adapter, _console()):
        raise typer.Exit(1)


@app.command()
def explain(
    model: Annotated[str, typer.Option(help="A model directory or a Hugging Face id.")],
    adapter: Annotated[
        str | None, typer.Option(help="A PEFT adapter directory.  [default: a new adapter, as train makes it]")
    ] = None,
) -> None:
    """Say for every module what runs fused, what is left alone, and why. Trains nothing."""
    from .explain import explain as run

    run(model, adapter, _console())


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="7b, 13b, 34b, 70b, a config.json, a model directory or a Hub id.")],
    tokens: Annotated[str, typer.Option(help="Tokens to train on, all epochs together: 1000000, 1e6, 1M, 1B.")],
    gpu: Annotated[str, typer.Option(help="a100-80gb, a100-40gb, h100-80gb, h200-141gb, or auto.")] = "a100-80gb",
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs.")] = 1,
    engine: Annotated[
        str | None, typer.Option(help="single, ddp, zero2, fsdp2 or zero3.  [default: the first that fits]")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank.")] = DEFAULT.rank,
    dropout: Annotated[float, typer.Option(min=0, max=0.99, help="LoRA dropout.")] = DEFAULT.dropout,
    targets: Annotated[str, typer.Option(help="all-linear, or module names: q_proj,v_proj.")] = DEFAULT.targets,
    seq: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 4096,
    quant: Annotated[str | None, typer.Option(help="nf4 for a 4-bit base.  [default: bf16]")] = None,
    memory: Annotated[str, typer.Option(help="auto, fast (no recomputation) or lean (all layers).")] = "auto",
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences per GPU and step.  [default: the fastest that fits]")
    ] = None,
    watts: Annotated[float | None, typer.Option(help="Per GPU.  [default: its design limit]")] = None,
    intensity: Annotated[float, typer.Option(help="kg CO2eq per kWh.")] = INTENSITY,
    pue: Annotated[float, typer.Option(help="Power usage effectiveness of the data centre.")] = PUE,
    measured: Annotated[
        str | None, typer.Option(help="Results of python -m bench on this GPU: their rates replace modelled ones.")
    ] = None,
    plot: Annotated[str | None, typer.Option(help="Write stacked bars of memory and time to this PNG.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say before a run whether it fits, how fast it is, and what it costs in GPU hours, kWh and kg CO2eq.

    Beside it, the same for PEFT's default. Needs no GPU and loads no weights.
    """
    from pathlib import Path

    from . import plan as planned

    chosen = {} if targets == "all-linear" else {"targets": [name.strip() for name in targets.split(",")]}
    made = planned.make(
        model, tokens, gpu, gpus=gpus, engine=engine, rank=rank, dropout=dropout, seq=seq, quant=quant, memory=memory,
        micro_batch=micro_batch, watts=watts, intensity=intensity, pue=pue, measured=measured, **chosen,
    )  # fmt: skip
    if plot:
        planned.plot(made, Path(plot))
    if json:
        print(planned.to_json(made))
    else:
        planned.show(made, _console())


@app.command()
def tune(
    model: Annotated[str, typer.Option(help="7b, 13b, 34b, 70b; several with commas.")] = "7b",
    tokens: Annotated[str, typer.Option(help="Tokens of a forward, batch × length; several with commas.")] = "4096",
    rank: Annotated[int, typer.Option(min=1, max=512, help="LoRA rank.")] = DEFAULT.rank,
    dropout: Annotated[bool, typer.Option("--dropout", help="The kernels of LoRA dropout.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also what was measured before.")] = False,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time to spend on each call.")] = 0.5,
    rows: Annotated[bool, typer.Option("--rows", help="Only print what was measured, as rows to commit.")] = False,
    screen: Annotated[bool, typer.Option("--screen", help="Compile and rank instead. Needs no GPU.")] = False,
    arch: Annotated[str, typer.Option(help="With --screen: sm_80, sm_86, sm_89, sm_90 or sm_100.")] = "sm_80",
    kernels: Annotated[str | None, typer.Option(help="With --screen: only these.  [default: all]")] = None,
) -> None:
    """Find the fastest tiles, and where a library is faster, for the GPU at hand.

    What is found is kept in tuning.json in $FASTLORA_CACHE_DIR, and used from the next start on.
    """
    from . import tune as run

    if screen:
        run.screened(arch, kernels, _console())
    elif rows:
        run.commit_rows(_console())
    else:
        run.measured(model, tokens, rank, dropout, again, seconds, _console())


@app.command()
def doctor() -> None:
    """Say what is installed, what runs where, and whether it is right. Exit status 1 if not all is well."""
    from .doctor import doctor as run

    if not run(_console()):
        raise typer.Exit(1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """The benchmark suite of a clone: what follows is python -m bench's, --help too."""
    from .bench import bench as run

    raise typer.Exit(run(context.args))
