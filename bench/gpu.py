"""Everything a GPU must answer, in under nine minutes: parity, tuning, the shapes that decide the design, whole steps.

Each stage is a process with a time limit of its own; one that fails or runs out of time loses nobody else's results,
nor its own up to there. Everything goes to the folder that OUT names (default bench/results/<machine>): results.jsonl
as it is measured, tuning.json with rows.txt and tuning.md, log.txt, report.md and plots. Needs torch, triton,
transformers, peft and accelerate; matplotlib for the plots, pytest for the tests. No network.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from . import machine, record
from .cli import new_parser

LIMIT = 525.0  # seconds in all
_REPORT = 25.0  # of them, kept for the report


class Stage(NamedTuple):
    """A command of ``python -m``, the most seconds it may take, and what it adds to the environment."""

    name: str
    seconds: float
    command: list[str]
    environment: dict[str, str] = {}  # noqa: RUF012  a NamedTuple's default is never written to


def stages(results: Path, rehearse: bool) -> list[Stage]:
    """What runs, most decisive first."""
    into = ["--append", str(results), "--device", "cpu" if rehearse else "cuda"]
    quick, ours = ["--quick", "--seconds", "0.02"], ["--providers", "eager,fastlora"]
    seconds = quick if rehearse else ["--seconds", "0.35"]
    step = ["--model", "tiny", "--tokens", "2x32", "--seconds", "2", "--memory", "off"]
    if not rehearse:
        step = ["--model", "7b", "--layers", "2", "--tokens", "1x4096", "--seconds", "12"]

    def ops(*names: str) -> list[str]:
        return ["bench", *names, *into, *seconds]

    found = [
        Stage("parity", 60, ["bench", *into, *quick, *ours]),
        # The very tiles and instructions of an A100, on whatever GPU this is.
        Stage(
            "parity of the A100's code",
            45,
            ["bench", "lora_gemm", "lora_group", "attention", *into, *quick, *ours],
            {"TRITON_OVERRIDE_ARCH": "sm80"},
        ),
        Stage("tuning", 80, ["bench", "tune", *into, "--seconds", "0.2", *(["--quick"] if rehearse else [])]),
        Stage("lora_gemm", 90, ops("lora_gemm", "lora_skinny")),
        Stage("train_step", 150, ["bench", "train_step", *into, *step]),
        Stage("attention", 50, ops("attention")),
        Stage("elementwise", 70, ops("rms_norm", "swiglu", "rope")),
        Stage("products", 90, ops("lora_group", "lora_mlp", "lora_linear", "linear_cross_entropy")),
        Stage("counted", 30, ["bench", "launches", *into]),
        Stage("parity, other dtypes", 90, ["bench", *into, *quick, *ours, "--dtype", "float16,float32"]),
    ]
    if not rehearse:
        long = ["--model", "7b", "--layers", "2", "--tokens", "4x1024,1x8192", "--seconds", "8"]
        eager = ["--providers", "peft,peft-bf16,liger,fastlora"]
        found.append(Stage("train_step, other lengths", 70, ["bench", "train_step", *into, *long, *eager]))
    return found


def run(stage: Stage, seconds: float, log: Path) -> str:
    """Run a stage for at most ``seconds``; its output goes to the log and its end here, and the verdict is returned."""
    start = time.monotonic()
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(machine.ROOT),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        **stage.environment,
    }
    with log.open("a") as file:
        file.write(f"\n=== {stage.name}: python -m {' '.join(stage.command)}\n")
        file.flush()
        mark = file.tell()
        try:
            done = subprocess.run(
                [sys.executable, "-m", *stage.command], cwd=machine.ROOT, env=environment, timeout=seconds,
                stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
            verdict = "done" if done.returncode == 0 else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            verdict = f"stopped after its {seconds:.0f} s"
    with log.open() as file:
        file.seek(mark)
        tail = file.read().splitlines()[-6:]
    verdict = f"{stage.name}: {verdict}, {time.monotonic() - start:.0f} s"
    print("\n".join(f"    {line[:200]}" for line in tail) + f"\n{verdict}", flush=True)
    return verdict


def main(argv: list[str]) -> int:
    parser = new_parser("gpu", __doc__)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU: does every stage run?")
    args = parser.parse_args(argv)
    if not args.rehearse and machine.default_device() != "cuda":
        print("No GPU is visible to PyTorch. python -m bench measures the CPU; --rehearse tries this script.")
        return 1
    if args.rehearse:
        # Threads of tiny shapes wait for each other, long where the machine is busy, and a C++ compiler works for the
        # code that torch.compile makes for a CPU: neither is a GPU's.
        os.environ |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    start = time.monotonic()
    out = Path(os.environ.get("OUT") or record.RESULTS / machine.slug("cpu" if args.rehearse else "cuda"))
    out.mkdir(parents=True, exist_ok=True)
    results, log = out / "results.jsonl", out / "log.txt"
    results.write_text("")
    log.write_text("")
    verdicts = []
    for stage in stages(results, args.rehearse):
        left = LIMIT - _REPORT - (time.monotonic() - start)
        if left < 10:
            verdicts.append(f"{stage.name}: no time left")
            continue
        verdicts.append(run(stage, min(stage.seconds, left), log))
    verdicts.append(run(Stage("report", _REPORT, ["bench", "report", str(out)]), _REPORT, log))
    summary = "\n".join(verdicts)
    with log.open("a") as file:
        file.write(f"\n=== summary\n{summary}\n")
    print(f"\n{summary}\n{time.monotonic() - start:.0f} s in all; {out}")
    return 0 if all(": done" in v for v in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
