"""How far the training is: a bar on a terminal, about ten lines elsewhere."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from .measure import Speed


class ShowProgress(TrainerCallback):
    """Prints step, loss and tokens per second. Comes after `Measure`, which feeds `speed`."""

    def __init__(self, console: Console, speed: Speed) -> None:
        self._console = console
        self._speed = speed
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
        self._bar = Progress("training", *columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", note="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar where the run starts, which is not 0 after a resume."""
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the step just logged."""
        if "loss" not in logs:
            return
        rate = self._speed.tokens_per_second()
        note = f"loss {logs['loss']:.4f}" + (f"  {rate:,.0f} tokens/s" if rate else "")
        self._bar.update(self._task, completed=state.global_step, note=note)
        every = -(-state.max_steps // 10)
        if not self._console.is_terminal and (state.global_step % every == 0 or state.global_step == state.max_steps):
            self._console.print(f"step {state.global_step}/{state.max_steps}  {note}")

    def close(self) -> None:
        """Stop the bar, also after an error."""
        self._bar.stop()
