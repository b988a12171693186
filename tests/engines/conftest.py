"""Two processes at a time, on gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Pair:
    """Runs a function of a module in two processes; what they printed is in ``output``."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("pair.py"))]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment,
        )  # fmt: skip
        self.output = ["", ""]

    def __call__(self, target: str, *arguments: object, log: Path, imports=(), **environment: str) -> list[int]:
        """The exit statuses."""
        job = {"target": target, "arguments": list(map(str, arguments)), "environment": environment}
        log.mkdir(parents=True, exist_ok=True)
        print(json.dumps({**job, "log": str(log), "imports": list(imports)}), file=self._server.stdin, flush=True)
        answer = self._server.stdout.readline()
        assert answer, "the server of processes has died"
        self.output = [(log / f"rank-{rank}.txt").read_text(errors="replace") for rank in range(2)]
        return json.loads(answer)

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(30)


@pytest.fixture(scope="session")
def pair():
    found = Pair()
    yield found
    found.close()
