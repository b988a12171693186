"""What a training run used: peak memory, bytes saved for backward, tokens per second."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class PeakMemory:
    """The highest memory use since construction: CUDA memory where there is a GPU, else this process's RSS.

    `start` is the use at construction, `what` says what is counted.
    """

    def __init__(self) -> None:
        if torch.cuda.is_available():
            self.what = "GPU memory allocated by PyTorch, peak while training"
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return
        try:
            # 5 sets the high-water mark back to the present RSS, so that loading the model does not count.
            Path("/proc/self/clear_refs").write_text("5")
            self.what = "resident memory of the process, peak while training"
        except OSError:
            self.what = "resident memory of the process, peak since it started"
        self.start = _status("VmRSS") or _max_rss()

    def bytes(self) -> int:
        """The peak so far."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return _status("VmHWM") or _max_rss()


def _status(field: str) -> int:
    """A line of Linux's /proc/self/status in bytes; 0 where there is none."""
    try:
        return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0


def _max_rss() -> int:
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class SavedBytes:
    """Counts what autograd keeps for backward, without the model's own parameters and buffers."""

    def __init__(self, model: nn.Module) -> None:
        self._seen = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        self.bytes = 0

    @contextmanager
    def count(self) -> Iterator[None]:
        """Count every tensor saved inside the block, each storage once and whole."""
        with saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


class Speed:
    """Tokens per second over the logged steps but the first, which warms up; time spent on checkpoints left out."""

    def __init__(self) -> None:
        self.tokens = 0
        self._first: tuple[float, int] | None = None
        self._last = (0.0, 0)
        self._paused = 0.0

    def step(self, tokens: int) -> None:
        """A step has ended; `tokens` have been seen since the start."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.tokens = tokens
        self._last = (time.perf_counter() - self._paused, tokens)
        self._first = self._first or self._last

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of this block out."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def tokens_per_second(self) -> float | None:
        """None until two steps are done."""
        if self._first is None or self._last[0] <= self._first[0]:
            return None
        return (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
