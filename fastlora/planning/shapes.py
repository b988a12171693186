"""The sizes of a Llama model: built in by name, or read off a configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """The field's letters: hidden H, ffn F, layers, heads, kv_heads, vocab V. head_dim 0 is hidden / heads."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 32000
    head_dim: int = 0
    tied: bool = False

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden // self.heads)

    @property
    def q(self) -> int:
        """Width of the queries and of the attention output."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    def projections(self) -> dict[str, tuple[int, int]]:
        """(N, K) of every projection of a layer."""
        H, F, q, kv = self.hidden, self.ffn, self.q, self.kv
        sizes = ((q, H), (kv, H), (kv, H), (H, q), (F, H), (F, H), (H, F))
        return dict(zip(PROJECTIONS, sizes, strict=True))

    def layer_weights(self) -> int:
        """Parameters in the projections of one layer."""
        return sum(n * k for n, k in self.projections().values())

    def flops(self, tokens: int, sequence: int) -> float:
        """FLOPs of a training step's products: 4 per frozen weight and token (y and dx; W itself gets no gradient) in
        layers and head, and causal attention, 2·T·H forward and 2.5 times that backward, per token and layer."""
        weights = self.layers * self.layer_weights() + self.vocab * self.hidden
        return tokens * (4.0 * weights + 3.5 * 2 * sequence * self.q * self.layers)


SHAPES = {
    "7b": Shape(4096, 11008, 32, 32, 32),
    "13b": Shape(5120, 13824, 40, 40, 40),
    "34b": Shape(8192, 22016, 48, 64, 8),
    "70b": Shape(8192, 28672, 80, 64, 8),
}


def shape_of(config: Any) -> Shape:
    """The shape that ``config`` means.

    Args:
        config: a name among SHAPES, a config.json or a directory with one, the parsed JSON, a Hugging Face config, or
            a Shape.

    Raises:
        ValueError: there is no such model, or a size is missing.
    """
    if isinstance(config, Shape):
        return config
    if isinstance(config, str | Path):
        if str(config).lower() in SHAPES:
            return SHAPES[str(config).lower()]
        config = _read(Path(config))
    get: Callable[[str], Any] = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
    wanted = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if missing := [name for name in wanted if not isinstance(get(name), int)]:
        raise ValueError(f"config is a {type(config).__name__} without {', '.join(missing)}, needs a Llama config")
    hidden, ffn, layers, heads, vocab = (get(name) for name in wanted)
    return Shape(
        hidden, ffn, layers, heads, get("num_key_value_heads") or heads, vocab,
        get("head_dim") or 0, bool(get("tie_word_embeddings")),
    )  # fmt: skip


def _read(path: Path) -> Any:
    file = path / "config.json" if path.is_dir() else path
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(
            f"config is {str(path)!r}, needs one of {', '.join(SHAPES)}, or a config.json or a directory with one"
        ) from None
    except ValueError as error:
        raise ValueError(f"config: {file} is not JSON: {error}") from None
