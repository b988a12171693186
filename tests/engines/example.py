"""An example, as it stands, as one of two processes."""

import json
import os
import runpy
import sys
from pathlib import Path


def main(script: str, plan: str, *argv: str) -> None:
    """Runs the script, and leaves its model's plan in a file."""
    import fastlora

    if "deepspeed" in script:
        import deepspeed

        # A collective in shared memory, which would be compiled here first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sys.argv = [script, *argv]
    model = runpy.run_path(script, run_name="__main__")["model"]
    if os.environ["RANK"] == "0":
        Path(plan).write_text(json.dumps(fastlora.explain(model).to_dict()))
