"""A process that has imported everything and waits for the line that tells it what to run.

Importing torch, transformers and PEFT takes ten seconds on some machines: while one stage of ``bench gpu`` runs, the
process of the next one imports. The line is JSON: {"argv": of python -m bench, "environment": variables to set}.
"""

from __future__ import annotations

import json
import os
import sys

if __name__ == "__main__":  # and not in the processes that this one spawns, which import it by another name
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from . import __main__ as bench
    from . import parity, train_step, tune  # noqa: F401


def main() -> int:
    line = sys.stdin.readline()
    if not line:  # no stage is left
        return 0
    job = json.loads(line)
    os.environ.update(job["environment"])
    return bench.main(job["argv"])


if __name__ == "__main__":
    sys.exit(main())
