"""The versions of the libraries fastlora rests on: the oldest that serve, and the newest that were tested.

A newer one may serve as well. It is not refused, but said: by ``fastlora doctor`` of each, by ``fastlora.patch`` of
transformers, whose modules are swapped.
"""

from __future__ import annotations

import functools
import logging
import re
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple


class Known(NamedTuple):
    """Two releases, as major.minor."""

    oldest: str
    newest: str

    def too_old(self, found: str) -> bool:
        """Whether the version ``found`` is below the oldest. A version that is no number is not."""
        return bool(release(found)) and release(found) < release(self.oldest)

    def too_new(self, found: str) -> bool:
        """Whether the version ``found`` is of a later release than the newest: 5.25.0.dev0 where that is 5.24."""
        return release(found) > release(self.newest)


KNOWN = {
    "torch": Known("2.11", "2.14"),
    "triton": Known("3.6", "3.9"),
    "transformers": Known("4.57", "5.24"),
    "peft": Known("0.18", "0.21"),
}


def release(found: str) -> tuple[int, ...]:
    """(major, minor) of a version such as 2.13.0+cpu; () where it does not begin with two numbers."""
    numbers = re.match(r"(\d+)\.(\d+)", found)
    return tuple(map(int, numbers.groups())) if numbers else ()


@functools.cache
def warn_if_newer() -> None:
    """Warn, once per process, where transformers is newer than what fastlora was tested with."""
    try:
        found = version("transformers")
    except PackageNotFoundError:  # on the path without being installed
        return
    newest = KNOWN["transformers"].newest
    if KNOWN["transformers"].too_new(found):
        logging.getLogger("fastlora").warning(
            "transformers %s is newer than %s, the newest that this fastlora was tested with. fastlora.verify(model, "
            "batch) tells whether the patched model is right; pip install 'transformers==%s.*' brings the tested one",
            *(found, newest, newest),
        )
