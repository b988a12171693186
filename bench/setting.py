"""The setting of a training step: model, batch and options; the batch itself and the useful work in it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from . import memory, models
from .record import Record

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Setting:
    """One row group of the table."""

    model: str
    dtype: torch.dtype
    device: str
    rows: int
    sequence: int
    layers: int
    rank: int = 16
    dropout: float = 0.0
    batch: str = "dense"
    checkpointing: bool = False
    autocast: bool = True
    base: str = "dense"

    @property
    def shape(self) -> models.Shape:
        return models.shape(self.model, self.layers)

    @property
    def mode(self) -> str:
        """What differs from the default, in words."""
        words = (
            "" if self.base == "dense" else self.base,
            "" if self.batch == "dense" else self.batch,
            f"dropout={self.dropout:g}" if self.dropout else "",
            "checkpointing" if self.checkpointing else "",
            "" if self.autocast or self.dtype == torch.float32 else "no autocast",
            "" if memory.allocator() == "default" else f"allocator={memory.allocator()}",
        )
        return " ".join(filter(None, words))

    def record(self) -> Record:
        return {
            "bench": "train_step",
            "op": self.model,
            "shape": {"B": self.rows, "T": self.sequence, "layers": self.layers, "r": self.rank},
            "dtype": str(self.dtype).removeprefix("torch."),
            "mode": self.mode,
        }

    def context(self) -> AbstractContextManager:
        """Autocast in the model's dtype, as transformers' Trainer(bf16=True) trains; nothing for fp32."""
        if self.autocast and self.dtype != torch.float32:
            return torch.autocast(self.device, self.dtype)
        return nullcontext()

    def base_model(self) -> nn.Module:
        """The frozen model, its projections in 4 bits where the setting says so."""
        model = models.base_model(self.shape, self.dtype, self.device)
        return models.in_4_bits(model, self.base) if self.base != "dense" else model


def batch(setting: Setting, seed: int = 2) -> Batch:
    """Random tokens: dense rows of T; or documents of T/20 to T/2 tokens, B·T in all: "packed" into one row, or
    "padded", a row each."""
    g = torch.Generator().manual_seed(seed)
    B, T = setting.rows, setting.sequence
    ids = torch.randint(setting.shape.vocab, (B * T,), generator=g)
    if setting.batch == "dense":
        made = {"input_ids": ids.view(B, T), "labels": ids.view(B, T).clone()}
    else:
        made = (_packed if setting.batch == "packed" else _padded)(ids, _lengths(B * T, T, g))
    return {name: t.to(setting.device) for name, t in made.items()}


def _lengths(total: int, T: int, g: torch.Generator) -> list[int]:
    lengths: list[int] = []
    while total:
        drawn = int(torch.randint(max(1, T // 20), T // 2 + 1, (1,), generator=g))
        lengths.append(min(drawn, total))
        total -= lengths[-1]
    return lengths


def _packed(ids: torch.Tensor, lengths: list[int]) -> Batch:
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids[None].clone()
    labels[positions == 0] = -100
    return {"input_ids": ids[None], "labels": labels, "position_ids": positions}


def _padded(ids: torch.Tensor, lengths: list[int]) -> Batch:
    rows = nn.utils.rnn.pad_sequence(ids.split(lengths), batch_first=True)
    mask = (torch.arange(rows.shape[1]) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": rows, "labels": rows.masked_fill(mask == 0, -100), "attention_mask": mask}


def work(made: Batch) -> tuple[int, float]:
    """Real tokens of a batch, and the sequence length at which so many dense tokens take the same attention."""
    if (mask := made.get("attention_mask")) is not None:
        lengths = mask.sum(1)
    elif (positions := made.get("position_ids")) is not None:
        starts = (positions[0] == 0).nonzero().flatten()
        lengths = nn.functional.pad(starts, (0, 1), value=positions.shape[1]).diff()
    else:
        lengths = torch.tensor(made["input_ids"].shape[1]).expand(made["input_ids"].shape[0])
    total = int(lengths.sum())
    return total, float((lengths.double() ** 2).sum() / total)
