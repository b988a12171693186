"""TRL's SFTTrainer with whole checkpoints, a clean stop on a signal, and measurements."""

import signal
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback
from trl import SFTTrainer

from . import ranks
from .checkpoints import staged
from .measure import SavedBytes, Speed


class LoRATrainer(SFTTrainer):
    """SFTTrainer whose checkpoints appear whole or not at all. Counts what the first batch saves for backward."""

    speed: Speed
    saved_bytes_per_token: float | None = None
    _measured = False
    _staging: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        out = Path(str(self.args.output_dir))
        with self.speed.pause(), staged(out, f"checkpoint-{self.state.global_step}") as self._staging:
            # Not SFTTrainer's own: that one adds a model card of TRL to the run.
            super(SFTTrainer, self)._save_checkpoint(model, trial)
        self._staging = None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss; on the first batch with a count of what it saves for backward."""
        # Under gradient checkpointing the layers hold their inputs where the count cannot see them, and of sharded
        # weights it would count the gathered ones.
        uncountable = self.args.gradient_checkpointing or ranks.engine() is not None
        counted = SavedBytes(model) if not (self._measured or uncountable) else None
        self._measured = True
        with counted.count() if counted else nullcontext():
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        if counted:
            self.saved_bytes_per_token = counted.bytes / inputs["input_ids"].numel()
        return loss


class Complete(Exception):
    """The checkpoint to resume from is that of the last step."""


class StopIfComplete(TrainerCallback):
    """Raises `Complete` where no step is left: in the middle of an epoch the Trainer would train one more."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the step with the last one."""
        if state.global_step >= state.max_steps:
            raise Complete


class StopOnSignal(TrainerCallback):
    """A context in which SIGINT and SIGTERM end the training after the present step, with a checkpoint.

    The second signal of a kind does what it does elsewhere. `signum` is the signal that came, or None. A launcher
    signals its processes one after another: they end after the step in which the first of them was reached.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        signal.signal(signum, self._before[signum])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end, if a signal came."""
        if signum := ranks.largest(self.signum or 0, args.device):
            self.signum = signum
            control.should_save = True
            control.should_training_stop = True


class Measure(TrainerCallback):
    """Feeds `speed` with the tokens TRL has counted."""

    def __init__(self, speed: Speed) -> None:
        self.speed = speed

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """A step has been logged."""
        if "loss" in logs:
            self.speed.step(int(logs["num_tokens"]))
