"""python -m bench: what fastlora gives on the machine at hand.

    python -m bench                       every op at this device's shapes
    python -m bench rms_norm swiglu       some ops
    python -m bench train_step            whole-model training steps, all providers
    python -m bench saved_bytes           bytes kept for backward, per token and layer
    python -m bench launches              kernels per layer and step; bytes moved outside the big products (traffic)
    python -m bench host                  CPU time of a layer's step between a GPU's kernels: any machine
    python -m bench tune                  tiles and libraries against each other, per kernel call
    python -m bench report                Markdown tables and plots of what was measured
    python -m bench rows FOLDER           measured rows into fastlora/kernels/_rows.py
    python -m bench compare A B           was B slower than A? exit status 1 if so
    python -m bench precompile            machine code for a GPU elsewhere, into Triton's cache
    python -m bench parity                a patched model against float64, dtype by dtype, and its greedy tokens
    python -m bench trust                 what it costs per forward to see that nothing bypassed was replaced
    python -m bench gpu                   what one GPU must answer, in seven minutes; gpu --more: in five more

Every command has --help of its own.
"""

from __future__ import annotations

import importlib
import sys
import warnings

from fastlora.kernels import _tiles

from . import machine, precompile
from .cli import common_options, new_parser, open_sink
from .harness import measure
from .ops import NAMES, cases


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    argv = sys.argv[1:] if argv is None else argv
    command, rest = (argv[0], argv[1:]) if argv and argv[0] in _COMMANDS else ("ops", argv)
    return _COMMANDS[command](rest) or 0


def _ops(argv: list[str]) -> int:
    parser = new_parser("", __doc__)
    parser.add_argument("op", nargs="*", help=f"among {', '.join(NAMES)} (default: all)")
    common_options(parser)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each case and mode (default 2)")
    args = parser.parse_args(argv)
    if unknown := set(args.op) - set(NAMES):
        parser.error(f"no command or op is called {', '.join(unknown)}; ops are {', '.join(NAMES)}")
    sink = open_sink(args, "ops")
    red = 0
    for dtype in args.dtype:
        ceilings = machine.ceilings(args.device, dtype, args.quick)
        print(f"{dtype}: {ceilings.bandwidth / 1e9:,.0f} GB/s copied, {ceilings.flops / 1e12:,.2f} TFLOP/s multiplied")
        every = [case for op in args.op or NAMES for case in cases(op, args.device, dtype, args.quick)]
        if args.device == "cuda":
            precompile.compile_all(precompile.of_ops(every, dtype))
        for case in every:
            for line in measure(case, args.device, dtype, ceilings, args.seconds, args.providers):
                sink.write(line | {"ceilings": ceilings._asdict()})
                red += line["parity"] is False and line["provider"].startswith("fastlora")
    for words in _tiles.given_up():  # green or not, it was another's work that was measured
        print(f"RED   does not run here: {words}")
        red += 1
    return min(red, 1)


def _load(module: str):
    def run(argv: list[str]) -> int:
        return importlib.import_module(f"bench.{module}").main(argv)

    return run


_MODULES = (
    *("train_step", "saved_bytes", "launches", "host", "tune", "report", "compare", "rows", "precompile", "parity"),
    *("trust", "gpu"),
)
_COMMANDS = {"ops": _ops} | {name: _load(name) for name in _MODULES}
_COMMANDS["traffic"] = _COMMANDS["launches"]

if __name__ == "__main__":
    sys.exit(main())
