"""What one GPU must answer, in two calls: ``gpu`` takes at most seven minutes, ``gpu --more`` five.

Each stage is a process with a time limit of its own; one that fails or hangs loses only what it had not yet written.
Results go to the folder that OUT names (default bench/results/<machine>), line by line as they are measured: gpu.jsonl
and gpu_more.jsonl, with a log of each; of tuning also tuning.json, rows.txt and tuning.md. Then

    python -m bench report FOLDER       tables and plots
    python -m bench rows FOLDER         the measured rows, into fastlora/kernels/_rows.py

Needs torch, triton, transformers, peft and accelerate. What else is there is used: pytest, liger-kernel, flash-attn,
bitsandbytes, nvidia-ml-py, compute-sanitizer. No network.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from . import machine, record, stages
from .cli import new_parser
from .stages import Stage

_TAIL = 4  # lines of a stage's output that are shown


class Runner:
    """Runs stages one after the other, each in a process group of its own."""

    def __init__(self, results: Path, log: Path) -> None:
        self._results, self._log = results, log
        self._environment = os.environ | {
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(machine.ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._spare: subprocess.Popen | None = None

    def run(self, stage: Stage, seconds: float, follows: bool) -> str:
        """Run a stage for at most ``seconds``; the end of its output is printed, its verdict recorded and returned.

        follows: whether another stage comes after it, whose process starts to import at once.
        """
        start = time.monotonic()
        with self._log.open("a") as file:
            file.write(f"\n=== {stage.name}: {' '.join(stage.command)}\n")
            file.flush()
            mark = file.tell()
            process = self._shell(stage, file) if stage.shell else self._worker(stage, file)
            if follows and self._spare is None:
                self._spare = self._start([sys.executable, "-m", "bench.worker"], file, stdin=subprocess.PIPE)
            try:
                status = process.wait(seconds)
                verdict = "done" if status == 0 else f"exit status {status}"
            except subprocess.TimeoutExpired:
                verdict = f"stopped after its {seconds:.0f} s"
            _kill(process)  # what it started, too
        with self._log.open(errors="replace") as file:
            file.seek(mark)
            tail = file.read().splitlines()[-_TAIL:]
        print("\n".join(f"    {line[:200]}" for line in tail))
        return self.note(stage, verdict, time.monotonic() - start)

    def note(self, stage: Stage, verdict: str, seconds: float = 0.0) -> str:
        """Put down how a stage ended."""
        line = {"bench": "stage", "op": stage.name, "shape": {}, "dtype": "", "provider": "", "verdict": verdict,
                "seconds": round(seconds, 1)}  # fmt: skip
        with self._results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        words = f"{stage.name}: {verdict}" + (f", {seconds:.0f} s" if seconds else "")
        print(words, flush=True)
        return words

    def close(self) -> None:
        if self._spare is not None:
            _kill(self._spare)

    def _shell(self, stage: Stage, file: IO[str]) -> subprocess.Popen:
        return self._start(list(stage.command), file, stage.environment)

    def _worker(self, stage: Stage, file: IO[str]) -> subprocess.Popen:
        process, self._spare = self._spare, None
        if process is None or process.poll() is not None:
            process = self._start([sys.executable, "-m", "bench.worker"], file, stdin=subprocess.PIPE)
        job = json.dumps({"argv": stage.command, "environment": stage.environment})
        with contextlib.suppress(BrokenPipeError):  # it ended while it imported; its exit status says so
            process.stdin.write(f"{job}\n".encode())
            process.stdin.close()
        return process

    def _start(self, command: list[str], file: IO[str], more: dict[str, str] | None = None, **options: Any):
        return subprocess.Popen(
            command, cwd=machine.ROOT, env=self._environment | (more or {}), stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, **options,
        )  # fmt: skip


def _kill(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(argv: list[str]) -> int:
    parser = new_parser("gpu", __doc__)
    parser.add_argument("--more", action="store_true", help="the second call: others, parity, other batches and bases")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU: does every stage run?")
    args = parser.parse_args(argv)
    if not args.rehearse and machine.default_device() != "cuda":
        print("No GPU is visible to PyTorch. python -m bench measures the CPU; --rehearse tries this script.")
        return 1
    if args.rehearse:
        # Threads of tiny shapes wait for each other, long where the machine is busy; and the code that torch.compile
        # makes for a CPU is not a GPU's.
        os.environ |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    start, call = time.monotonic(), "gpu_more" if args.more else "gpu"
    out = Path(os.environ.get("OUT") or record.RESULTS / machine.slug("cpu" if args.rehearse else "cuda"))
    out.mkdir(parents=True, exist_ok=True)
    results, log = out / f"{call}.jsonl", out / f"{call}.log"
    results.write_text("")
    log.write_text("")
    runner, verdicts = Runner(results, log), []
    found = stages.of_call(call, results, args.rehearse)
    try:
        for i, stage in enumerate(found):
            left = stages.LIMITS[call] - (time.monotonic() - start)
            if stage.why:
                verdicts.append(runner.note(stage, f"left out: {stage.why}"))
            elif left < 10:
                verdicts.append(runner.note(stage, "no time left"))
            else:
                follows = any(not later.shell and not later.why for later in found[i + 1 :])
                verdicts.append(runner.run(stage, min(stage.seconds, left), follows))
    finally:
        runner.close()
    print("\n" + "\n".join(verdicts) + f"\n{time.monotonic() - start:.0f} s in all; {out}")
    return 0 if all(": done" in v or ": left out" in v for v in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
