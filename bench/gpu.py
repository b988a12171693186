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
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from . import machine, record, stages
from .cli import new_parser
from .stages import Stage

_TAIL = 4  # lines of a stage's output that are shown
_WORKER = [sys.executable, "-m", "bench.worker"]


class Runner:
    """Runs stages one after the other, or those of a group at once, each in a process group of its own."""

    def __init__(self, results: Path, log: Path, rehearse: bool) -> None:
        self._results, self._log = results, log
        self._environment = os.environ | {
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(machine.ROOT), os.environ.get("PYTHONPATH")))),
            "HF_HUB_OFFLINE": "1",
            # What torch.profiler opens stays open: closing and opening it again loses events.
            "TEARDOWN_CUPTI": "0",
        }
        if rehearse:
            # Threads of tiny shapes wait for each other, long where the machine is busy; and the code that
            # torch.compile makes for a CPU is not a GPU's.
            self._environment |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
        self._spare: subprocess.Popen | None = None

    def run(self, group: tuple[Stage, ...], seconds: float, follows: bool) -> list[str]:
        """Run a group for at most ``seconds``; what each printed last is shown, and its verdict recorded and returned.

        follows: whether a stage comes after it whose process can start to import at once.
        """
        start = time.monotonic()
        ends: list[tuple[str, float]] = []
        with ExitStack() as files:
            log = files.enter_context(self._log.open("a+", errors="replace"))
            outputs = [log if len(group) == 1 else files.enter_context(TemporaryFile("w+")) for _ in group]
            running = []
            for stage, output in zip(group, outputs, strict=True):
                output.write(f"\n=== {stage.name}: {' '.join(stage.command)}\n")
                output.flush()
                running.append((stage, output, output.tell(), self._begin(stage, output, alone=len(group) == 1)))
            if follows and self._spare is None:
                self._spare = self._start(_WORKER, log, stdin=subprocess.PIPE)
            for _, _, _, process in running:
                try:
                    status = process.wait(max(0.0, seconds - (time.monotonic() - start)))
                    verdict = "done" if status == 0 else f"exit status {status}"
                except subprocess.TimeoutExpired:
                    verdict = f"stopped after its {seconds:.0f} s"
                _kill(process)  # what it started, too
                ends.append((verdict, time.monotonic() - start))
            for _, output, mark, _ in running:
                output.seek(mark)
                tail = output.read().splitlines()[-_TAIL:]
                print("\n".join(f"    {line[:200]}" for line in tail))
                if output is not log:
                    output.seek(0)
                    log.write(output.read())
        return [self.note(stage, *end) for stage, end in zip(group, ends, strict=True)]

    def note(self, stage: Stage, verdict: str, seconds: float = 0.0) -> str:
        """Put down how a stage ended."""
        line = {"bench": "stage", "op": stage.name, "shape": {}, "dtype": "", "provider": "", "verdict": verdict,
                "seconds": round(seconds, 1)}  # fmt: skip
        with self._results.open("a") as file:
            file.write(f"\n{json.dumps(line)}\n")  # on a line of its own, whatever was cut off before it
        words = f"{stage.name}: {verdict}" + (f", {seconds:.0f} s" if seconds else "")
        print(words, flush=True)
        return words

    def close(self) -> None:
        if self._spare is not None:
            _kill(self._spare)

    def _begin(self, stage: Stage, output: IO[str], alone: bool) -> subprocess.Popen:
        if stage.shell:
            return self._start([*stage.command], output, stage.environment)
        if not alone:
            return self._start([sys.executable, "-m", "bench", *stage.command], output, stage.environment)
        process, self._spare = self._spare, None
        if process is None or process.poll() is not None:
            process = self._start(_WORKER, output, stdin=subprocess.PIPE)
        job = json.dumps({"argv": stage.command, "environment": stage.environment})
        with contextlib.suppress(BrokenPipeError):  # it ended while it imported; its exit status says so
            process.stdin.write(f"{job}\n".encode())
            process.stdin.close()
        return process

    def _start(self, command: list[str], output: IO[str], more: dict[str, str] | None = None, **options: Any):
        return subprocess.Popen(
            command, cwd=machine.ROOT, env=self._environment | (more or {}), stdout=output, stderr=subprocess.STDOUT,
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
    parser.add_argument(
        "--only", action="append", metavar="STAGE", help="this stage alone, or 'parity*'; may be repeated"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU: does every stage run?")
    args = parser.parse_args(argv)
    if not args.rehearse and machine.default_device() != "cuda":
        print("No GPU is visible to PyTorch. python -m bench measures the CPU; --rehearse tries this script.")
        return 1
    start, call = time.monotonic(), "gpu_more" if args.more else "gpu"
    out = Path(os.environ.get("OUT") or record.RESULTS / machine.slug("cpu" if args.rehearse else "cuda"))
    results, log = out / f"{call}.jsonl", out / f"{call}.log"
    groups = stages.of_call(call, results, args.rehearse, args.only)
    if not groups:
        parser.error(f"only is {', '.join(args.only)}, needs the names of stages of this call")
    out.mkdir(parents=True, exist_ok=True)
    for file in (results, log):
        if file.exists():  # of an earlier call, which the report leaves out
            os.replace(file, f"{file}.before")
        file.touch()
    runner, verdicts = Runner(results, log, args.rehearse), []
    try:
        for i, group in enumerate(groups):
            left = stages.LIMITS[call] - (time.monotonic() - start)
            can = tuple(stage for stage in group if not stage.why)
            verdicts += [runner.note(stage, f"left out: {stage.why}") for stage in group if stage.why]
            if left >= 10 and can:
                follows = any(len(later) == 1 and not later[0].shell and not later[0].why for later in groups[i + 1 :])
                verdicts += runner.run(can, min(max(stage.seconds for stage in can), left), follows)
                if i or args.more or args.rehearse or args.only or _fastlora_runs(results):
                    continue
                # The rest would measure what is not ours: better to keep the time, mend, and run again.
                verdicts.append("fastlora does not run here, or not in its own tiles: nothing else was measured")
                break
            verdicts += [runner.note(stage, "no time left") for stage in can]
    finally:
        runner.close()
    print("\n" + "\n".join(verdicts) + f"\n{time.monotonic() - start:.0f} s in all; {out}")
    return 0 if all(": done" in v or ": left out" in v for v in verdicts) else 1


def _fastlora_runs(results: Path) -> bool:
    """Whether a training step of ours was timed, all of it fused and no tile failing."""
    return any(
        r.get("ms") and not {"given_up", "unfused"} & set(r)
        for r in record.load(results)[1]
        if r["bench"] == "train_step" and r["provider"].startswith("fastlora")
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
