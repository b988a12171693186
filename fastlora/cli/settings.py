"""The choices of a training run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The choices of one run. `max_length` None: the model's context, at most 4096. `answers_only` None: by kind."""

    model: str
    data: str
    out: str
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str = "all-linear"
    lr: float = 2e-4
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 2
    grad_accum: int = 8
    max_length: int | None = None
    packing: bool = False
    answers_only: bool | None = None
    gradient_checkpointing: bool = False
    ops: str | None = None
    strict: bool = False
    memory: str = "fast"
    dtype: str = "auto"
    seed: int = 0
    save_steps: int = 100
    patch: bool = True
