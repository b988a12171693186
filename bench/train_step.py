"""Whole-model LoRA training steps, everybody on the same frozen weights and batches.

A step is forward, backward and AdamW on the adapters of all seven projections; weights are random, and bf16 models run
under autocast as transformers' Trainer(bf16=True) runs them. Every provider's loss and adapter gradients are judged
against float64 before anything is timed; who is over budget gets no time. Providers take turns.

MFU = FORMULA over the time, over the rate of a large square product measured in the same run. The forward that
gradient checkpointing repeats is not counted as work. "floor" is the frozen products alone, timed in the same turns.
Peak memory is that of one step above the loaded model; on a CPU every provider is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from typing import Any

from . import machine, memory, precompile, record, steps
from .cli import common_options, new_parser, open_sink
from .models import FORMULA, SHAPES, shape
from .setting import Setting, batch
from .step_providers import BY_NAME
from .training import Trainee

_CPU = ("peft", "peft-bf16", "peft-compile", "peft-compile-layers", "liger", "fastlora")
_GPU = tuple(name for name, provider in BY_NAME.items() if not provider.environment)
_SMALL = ["--model", "small", "--tokens", "4x512,1x2048"]
_FP32 = ["--dtype", "float32", "--providers", "peft,peft-compile,peft-compile-layers,liger,fastlora"]
_MEMORY = ["--model", "small", "--memory", "only", "--providers", "peft,peft-bf16,peft-compile-layers,fastlora"]
_PROFILE = ["--model", "small", "--providers", "peft,peft-bf16,fastlora", "--profile"]
_ON_CPU = ["--device", "cpu", "--providers", "peft,peft-compile,fastlora", "--seconds", "30", "--memory", "off"]
_TUNED = ["--allocator", "tuned"]
# What `--suite` stands for: arguments by the name of their results file; a group is all that begin with its name.
_GROUPS = ("readme", "cpu")
SUITES = {
    "readme_bf16": [*_SMALL, "--dtype", "bfloat16", "--seconds", "45", "--memory", "off"],
    "readme_fp32": [*_SMALL, *_FP32, "--seconds", "45", "--memory", "off"],
    "readme_profile": [*_PROFILE, "--tokens", "2x512", "--seconds", "20", "--memory", "off"],
    "readme_memory": [*_MEMORY, "--tokens", "1x512,2x512,4x512"],
    "cpu_small": [*_ON_CPU, "--tokens", "4x512,1x2048"],
    "cpu_small_tuned": [*_ON_CPU, *_TUNED],
    "cpu_small_dropout": [*_ON_CPU, *_TUNED, "--dropout", "0.05"],
    "cpu_7b_layer": [*_ON_CPU, "--model", "l7b", "--tokens", "1x512", "--dtype", "bfloat16,float32"],
    "cpu_small_fp32": [*_ON_CPU, "--dtype", "float32"],
    "cpu_memory": [*_ON_CPU, "--memory", "only"],
    "quick": ["--model", "tiny", "--tokens", "2x32", "--seconds", "1"],
}


def main(argv: list[str]) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    start = time.monotonic()
    if args.suite in _GROUPS:  # each in a process of its own: an allocator is chosen at its start
        command = [sys.executable, "-m", "bench", "train_step", *argv, "--suite"]
        return max([subprocess.call([*command, name]) for name in SUITES if name.startswith(args.suite)])
    if args.suite:
        args = parser.parse_args([*argv, *SUITES[args.suite], "--name", args.suite])
    memory.use_allocator(args.allocator, ["train_step", *argv])
    if args.memory_of:
        print(json.dumps(_memory_of(args)))
        return 0
    sink = open_sink(args, args.name)
    red = _run(args, sink)
    print(f"{len(sink.records)} measurements, {time.monotonic() - start:.0f} s: {sink.path}")
    return min(red, 1)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("train_step", (__doc__ or "").replace("FORMULA", FORMULA))
    add = parser.add_argument
    add("--suite", choices=(*_GROUPS, *SUITES), help="a fixed set of measurements, in place of the options below")
    add("--model", default="small", help=f"among {', '.join(SHAPES)}; several with commas")
    add("--tokens", type=_sizes, default=_sizes("4x512"), help="rows × sequence, as 4x512,1x2048")
    add("--layers", type=int, help="layers of the model (default: all, on a GPU as many as memory allows)")
    add("--rank", type=_integers, default=[16])
    add("--dropout", type=float, default=0.0)
    add("--batch", type=lambda t: t.split(","), default=["dense"], help="dense, padded, packed; several with commas")
    add("--base", choices=("dense", "nf4"), default="dense", help="nf4: the projections in 4 bits, by bitsandbytes")
    add("--checkpointing", choices=("off", "on", "both"), default="off")
    add("--autocast", choices=("on", "off"), default="on")
    add("--allocator", choices=("default", "tuned"), default="default", help="glibc's thresholds, for every provider")
    add("--seconds", type=float, default=60.0, help="timing of each setting, all providers together (default 60)")
    add("--rounds", type=int, default=3, help="turns of each provider at least (default 3)")
    add("--memory", choices=("on", "off", "only"), default="on", help="peak memory; a process per provider on a CPU")
    add("--largest-batch", action="store_true", help="GPU: rows that fit, for each provider")
    add("--profile", action="store_true", help="one step of each provider under torch.profiler, kernel by kernel")
    add("--name", default="train_step", help="name of the results file (default train_step)")
    add("--memory-of", help=argparse.SUPPRESS)
    common_options(parser)
    return parser


def _run(args: argparse.Namespace, sink: record.Sink) -> int:
    names = args.providers or (_CPU if args.device == "cpu" else _GPU)
    if unknown := set(names) - set(BY_NAME):
        raise SystemExit(f"no provider is called {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    red = 0
    ceilings = {dtype: machine.ceilings(args.device, dtype) for dtype in args.dtype}
    for setting in _settings(args):
        steps.free_memory(setting.device)
        if args.device == "cuda":
            precompile.compile_all(precompile.of_step(setting, names))
        if args.memory == "only":
            lines = (setting.record() | _named(setting, name) for name in names)
        else:
            lines = steps.measure(setting, names, args.seconds, ceilings[setting.dtype], args.rounds, args.profile)
        beside: dict[str, dict[str, Any]] = {}
        for line in lines:
            ours = line["provider"].startswith("fastlora")
            red += ours and (line.get("parity") is False or bool({"given_up", "unfused"} & set(line)))
            if not line.get("provisional") and not line.get("why"):
                name = line["provider"]
                beside[name] = beside[name] if name in beside else _memory(setting, name, args)
                line |= beside[name]
            sink.write(line | {"ceilings": ceilings[setting.dtype]._asdict()})
    return red


def _named(setting: Setting, name: str) -> dict[str, Any]:
    why = BY_NAME[name].why_not(setting.device, setting.dtype)
    return {"provider": name, "title": BY_NAME[name].title, "parity": None, "why": why}


def _memory(setting: Setting, name: str, args: argparse.Namespace) -> dict[str, Any]:
    if setting.device == "cuda" and args.largest_batch:
        return {"largest_batch": steps.largest_batch(setting, BY_NAME[name], setting.base_model())}
    if setting.device == "cpu" and args.memory != "off":
        return _memory_in_its_own_process(setting, name, args)
    return {}


def _settings(args: argparse.Namespace):
    checkpointing = {"off": [False], "on": [True], "both": [False, True]}[args.checkpointing]
    for model, dtype, (rows, sequence), rank, kind, checkpoint in itertools.product(
        args.model.split(","), args.dtype, args.tokens, args.rank, args.batch, checkpointing
    ):
        layers = args.layers or steps.layers_that_fit(model, dtype, args.device, rows * sequence, checkpoint)
        whole = shape(model).layers
        if layers < whole:
            print(f"{model}: {layers} of its {whole} layers are measured")
        yield Setting(
            model=model, dtype=dtype, device=args.device, rows=rows, sequence=sequence, layers=layers, rank=rank,
            dropout=args.dropout, batch=kind, checkpointing=checkpoint, autocast=args.autocast == "on", base=args.base,
        )  # fmt: skip


def _memory_in_its_own_process(setting: Setting, name: str, args: argparse.Namespace) -> dict[str, Any]:
    found = memory.in_its_own_process(
        [
            "train_step", "--memory-of", name, "--model", setting.model, "--layers", str(setting.layers),
            "--tokens", f"{setting.rows}x{setting.sequence}", "--rank", str(setting.rank),
            "--dropout", str(setting.dropout), "--batch", setting.batch, "--device", setting.device,
            "--base", setting.base, "--checkpointing", "on" if setting.checkpointing else "off",
            "--autocast", args.autocast, "--allocator", args.allocator, "--dtype", setting.record()["dtype"],
        ]
    )  # fmt: skip
    return {"peak_bytes": found.get("peak_bytes"), "why_no_peak": found.get("why")}


def _memory_of(args: argparse.Namespace) -> dict[str, Any]:
    setting = next(_settings(args))
    trainee = Trainee(BY_NAME[args.memory_of], setting.base_model(), setting)
    made = batch(setting)
    return {"peak_bytes": memory.peak_rss(lambda: trainee.step(made))}


def _sizes(text: str) -> list[tuple[int, int]]:
    try:
        return [(int(rows), int(sequence)) for rows, sequence in (one.split("x") for one in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not rows × sequence, such as 4x512 or 4x512,1x2048") from None


def _integers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
