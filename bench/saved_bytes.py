"""Bytes that autograd keeps for backward, per token, of one decoder layer with LoRA on all seven projections.

Counted by saved_tensors_hooks on tensors without memory, so it runs anywhere in seconds: every storage once and whole,
without parameters and the rotary tables, which are there anyway. Per token: the difference between two token counts,
so that what does not grow with them (copies of adapters in another dtype) is apart, as "per layer".
"""

from __future__ import annotations

import torch

from . import layer, models
from .cli import common_options, new_parser, open_sink
from .harness import SavedBytes

_SHAPES = ("7b", "13b", "70b")


def count(provider: str, model: str, dtype: torch.dtype, rank: int = 16, tokens: int = 1024) -> tuple[float, float]:
    """(bytes per token, bytes beside them) that one layer keeps."""
    kept = []
    for n in (tokens, 2 * tokens):
        one = layer.Layer(layer.BY_NAME[provider], models.shape(model), dtype, n, rank)
        with layer.traced(layer.Through(), lambda *args, **kwargs: None), SavedBytes(one.weights()) as saved:
            y = one.forward()
        kept.append(saved.bytes)
        del y
    per_token = (kept[1] - kept[0]) / tokens
    return per_token, kept[0] - per_token * tokens


def main(argv: list[str]) -> int:
    parser = new_parser("saved_bytes", __doc__)
    parser.add_argument("--model", default=",".join(_SHAPES), help="several with commas")
    parser.add_argument("--rank", type=int, default=16)
    common_options(parser)
    args = parser.parse_args(argv)
    sink = open_sink(args, "saved_bytes")
    for model in args.model.split(","):
        for dtype in args.dtype:
            for provider in layer.by_name(args.providers):
                line = {
                    "bench": "saved_bytes", "op": model, "shape": {"r": args.rank},
                    "dtype": str(dtype).removeprefix("torch."), "provider": provider.name, "title": provider.title,
                }  # fmt: skip
                why = layer.why_not(provider, dtype)
                if why is None:
                    per_token, beside = count(provider.name, model, dtype, args.rank)
                    line["figures"] = {"bytes/token/layer": per_token, "bytes/layer": beside}
                sink.write(line | {"why": why})
    return 0
