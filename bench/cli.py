"""What the commands' parsers have in common, and where their results go."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import machine, record

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def new_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """A parser that prints a module's docstring as it stands."""
    return argparse.ArgumentParser(
        f"python -m bench {command}".rstrip(),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def common_options(parser: argparse.ArgumentParser) -> None:
    """The options that every measuring command has."""
    device = machine.default_device()
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help=f"default here: {device}")
    parser.add_argument(
        "--dtype", type=_dtypes, default=_dtypes("bfloat16"), help="bfloat16, float16, float32; several with commas"
    )
    parser.add_argument("--providers", type=_names, default=(), help="only these, with commas")
    parser.add_argument("--out", type=Path, help="folder for the results (default bench/results/<machine>)")
    parser.add_argument("--append", type=Path, metavar="FILE", help="add the results to this file instead")


def open_sink(args: argparse.Namespace, name: str) -> record.Sink:
    """Where a command's results go: a file of its name in the folder of this machine, unless told otherwise."""
    folder = args.out or record.RESULTS / machine.slug(args.device)
    return record.Sink(args.append or folder / f"{name}.jsonl", machine.info(args.device), append=bool(args.append))


def _dtypes(text: str) -> list[torch.dtype]:
    try:
        return [DTYPES[name] for name in text.split(",")]
    except KeyError as unknown:
        raise argparse.ArgumentTypeError(f"{unknown} is not among {', '.join(DTYPES)}") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in text.split(","))))
