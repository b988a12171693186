"""The fastlora command, as one of two processes."""

import sys


def main(*argv: str) -> None:
    from fastlora.cli import main as fastlora

    sys.argv = ["fastlora", *argv]
    fastlora()
