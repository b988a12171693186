"""The `fastlora` command. Typer, transformers and TRL are imported only when a command needs them."""

import os
import sys
from importlib.util import find_spec

from .errors import CommandError
from .ranks import local_rank

TRAIN_EXTRA = ("typer", "rich", "trl", "datasets", "matplotlib")


def main() -> None:
    """Run the command line. An error is one line on stderr and exit status 1."""
    # What ails a lean installation, too, is asked of the doctor.
    needed = TRAIN_EXTRA[:2] if sys.argv[1:] == ["doctor"] else TRAIN_EXTRA
    if missing := [name for name in needed if find_spec(name) is None]:
        sys.exit(f"fastlora: not installed: {', '.join(missing)}. Install them with: pip install {' '.join(missing)}")
    # A bar over a thousand tokenized rows that lives for a tenth of a second is noise in a log file.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from .app import app

    try:
        app()
    except CommandError as error:
        # Every process of a run meets the same error; a machine says it once.
        if local_rank() == 0:
            print(f"fastlora: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("fastlora: interrupted", file=sys.stderr)
        sys.exit(130)
