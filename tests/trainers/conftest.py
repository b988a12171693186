"""The tiny model and tokenizer of the command-line tests, on disk; a garbage collector that has little to do."""

import gc

import pytest
from cli.conftest import model_dir, rows_file, tokenizer  # noqa: F401


@pytest.fixture(autouse=True, scope="package")
def _freeze():
    """Every trainer collects garbage when it starts: half a second among all the objects of transformers and TRL."""
    import transformers.trainer  # noqa: F401

    gc.freeze()
    yield
    gc.unfreeze()
