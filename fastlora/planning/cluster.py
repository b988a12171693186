"""What stays on each GPU between steps, by the engine that spreads a model over them."""

from __future__ import annotations

from dataclasses import dataclass

from .activations import Adapters
from .shapes import Shape

ENGINES = ("single", "ddp", "zero2", "fsdp2", "zero3")
_SHARD_WEIGHTS = ("fsdp2", "zero3")
_SHARD_STATE = ("zero2", "fsdp2", "zero3")
# NF4 with double quantisation: 4 bits, an 8-bit scale per 64 weights, an fp32 scale of scales per 256 of those.
BITS = {"nf4": 4 + 8 / 64 + 32 / (64 * 256)}


@dataclass(frozen=True)
class Cluster:
    """Bytes on each of ``gpus`` GPUs. Weights have ``itemsize`` bytes, or in the projections NF4; adapters are fp32."""

    shape: Shape
    adapters: Adapters
    gpus: int
    engine: str
    quant: str | None
    itemsize: int = 2

    @property
    def layer(self) -> float:
        """Bytes of the frozen projections of one layer."""
        return self.shape.layer_weights() * (BITS[self.quant] / 8 if self.quant else self.itemsize)

    @property
    def ends(self) -> float:
        """Bytes of embedding and head."""
        return float(self.itemsize) * self.shape.vocab * self.shape.hidden * (1 if self.shape.tied else 2)

    @property
    def trained(self) -> int:
        """Numbers that train, in all."""
        return self.shape.layers * self.adapters.parameters(self.shape)

    def resident(self) -> dict[str, float]:
        """By kind: weights, adapters, gradients, AdamW's two moments, and weights gathered from other GPUs."""
        norms = float(self.itemsize) * self.shape.hidden * (2 * self.shape.layers + 1)
        weights = self.shape.layers * self.layer + self.ends + norms
        shards = self.gpus if self.engine in _SHARD_WEIGHTS else 1
        states = self.gpus if self.engine in _SHARD_STATE else 1
        # DDP reduces gradients in buckets of its own.
        copies = 2 if self.engine in ("ddp", "zero2") else 1
        parts = {
            "weights": weights / shards,
            "adapters": 4.0 * self.trained / shards,
            "gradients": 4.0 * self.trained / states + 4.0 * self.trained * (copies - 1),
            "optimizer": 8.0 * self.trained / states,
        }
        if shards > 1:  # the layer that computes, the next one, and the ends, which stay gathered
            parts["gathered weights"] = 2 * self.layer + self.ends
        if self.quant:  # one projection, made bf16
            parts["dequantised weight"] = float(self.itemsize) * max(
                n * k for n, k in self.shape.projections().values()
            )
        return parts

    def gathered(self) -> float:
        """Bytes of weights that one step fetches from other GPUs, in forward and again in backward."""
        if self.engine not in _SHARD_WEIGHTS:
            return 0.0
        return (2 * self.shape.layers * self.layer + self.ends) * (self.gpus - 1) / self.gpus

    def reduced(self) -> float:
        """Bytes of gradients that one GPU sends and receives."""
        return 2 * 4.0 * self.trained * (self.gpus - 1) / self.gpus

    def updated(self) -> float:
        """Numbers that one GPU's optimizer updates."""
        return self.trained / (self.gpus if self.engine in _SHARD_STATE else 1)
