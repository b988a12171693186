"""`fastlora bench`: the benchmark suite, which lives beside the package in a clone and is not installed with it."""

import os
import subprocess
import sys
from pathlib import Path

from .errors import CommandError

ROOT = Path(__file__).resolve().parents[2]


def bench(arguments: list[str]) -> int:
    """Run ``python -m bench`` with these arguments; its exit status.

    Raises:
        CommandError: this fastlora was not installed from a clone.
    """
    if not (ROOT / "bench" / "__main__.py").exists():
        raise CommandError(
            f"the benchmark suite is not installed: {ROOT} holds no bench/. Run it from a clone: pip install -e ."
        )
    # The suite is imported from the clone, whatever directory this was called in; results files are named from there.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run([sys.executable, "-m", "bench", *arguments], env=os.environ | {"PYTHONPATH": path}).returncode
