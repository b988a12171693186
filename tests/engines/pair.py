"""Pairs of processes, forked from one that has imported everything: imports are most of what a launch costs.

Reads one job per line from stdin, JSON: ``target`` ("module:function"), ``arguments``, ``environment``, and a ``log``
directory for what the processes print. Both processes call the target, with the variables that torchrun sets. Answers
with their exit statuses, JSON again.
"""

import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

SECONDS = 300


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def child(job: dict, rank: int, port: int) -> None:
    """Never returns."""
    log = os.open(Path(job["log"]) / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in names.items()}, **job.get("environment", {})}
    status = 1
    try:
        module, function = job["target"].split(":")
        getattr(importlib.import_module(module), function)(*job.get("arguments", []))
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(job: dict) -> list[int]:
    """The exit statuses of both. Where one fails, or time is up, the other is killed soon."""
    port, began = free_port(), time.monotonic()
    pids = []
    for rank in range(2):
        if not (pid := os.fork()):
            child(job, rank, port)
        pids.append(pid)
    statuses: dict[int, int] = {}
    until = began + SECONDS
    while len(statuses) < 2:
        for pid in set(pids) - statuses.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
                if statuses[pid]:
                    until = min(until, time.monotonic() + 10)
            elif time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [statuses[pid] for pid in pids]


def main() -> None:
    # Libraries may print; the answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # poison, as in tests/conftest.py
    for line in sys.stdin:
        job = json.loads(line)
        for name in job.get("imports", []):
            importlib.import_module(name)
        print(json.dumps(run(job)), file=answers, flush=True)


if __name__ == "__main__":
    main()
