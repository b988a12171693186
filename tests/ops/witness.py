"""An op against its witness: the outputs and every gradient, each within the error budget of float64 truth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from budget import Budget
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora import reference
from fastlora.kernels._library import INTERPRET

DEVICE = torch.get_default_device()  # conftest's --device
TRITON = INTERPRET or DEVICE.type == "cuda"  # what runs here: Triton's programs, or csrc and ATen
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Over budget on one draw may be bad luck; over budget on the average of this many is not.
DRAWS = 16
Tensors = dict[str, torch.Tensor | None]
Results = tuple[torch.Tensor, ...]


@contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """Of the device, and of the CPU, where the eager code of an emulated GPU runs."""
    with torch.autocast(DEVICE.type, dtype), torch.autocast("cpu", dtype):
        yield


def _leaves(tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """The same values in the same strides, cut off from other graphs; floats in dtype where it is given."""

    def leaf(t: torch.Tensor | None) -> torch.Tensor | None:
        if t is None:
            return None
        return (t.detach().to(dtype) if dtype and t.is_floating_point() else t.detach()).requires_grad_(t.requires_grad)

    return {name: leaf(t) for name, t in tensors.items()}


def _results(function: Callable, tensors: Tensors, options: dict[str, Any]) -> Results:
    result = function(**tensors, **options)
    return result if isinstance(result, tuple) else (result,)


def _figures(results: Results, leaves: Tensors, incoming: Iterable[torch.Tensor]) -> Tensors:
    """The outputs by number and the gradients by name; None for a tensor that asks for none."""
    pairs = [(r, dy.to(r.dtype)) for r, dy in zip(results, incoming, strict=True) if r.requires_grad]
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))
    named = {f"output {i}": r.detach() for i, r in enumerate(results)}
    return named | {f"d{name}": t.grad for name, t in leaves.items() if t is not None}


def random_incoming(results: Results) -> Results:
    return tuple(torch.randn(r.shape).to(r.dtype) for r in results)


def run(op: Callable, tensors: Tensors, incoming: Callable[[Results], Results] = random_incoming, **options) -> Tensors:
    """One forward and one backward of op, unjudged: its outputs and gradients by name."""
    leaves = _leaves(tensors)
    results = _results(op, leaves, options)
    return _figures(results, leaves, incoming(results))


def check(
    op: Callable,
    make: Callable[[], Tensors],
    *,
    incoming: Callable[[Results], Results] = random_incoming,
    seen: Callable[[Tensors], Tensors] | None = None,
    **options: Any,
) -> Tensors:
    """Assert that op's outputs and gradients are within the budget; return the last ones.

    Args:
        op: a function of fastlora.ops; its witness has the same name.
        make: draws its tensor arguments; the gradients of those that require one are compared.
        incoming: makes the outputs' gradients, random ones unless told.
        seen: makes from tensors what op is given in their place, to show that one draw is enough to notice.
        options: its other arguments.
    """
    witness = getattr(reference, op.__name__)
    budgets: dict[str, Budget] = {}
    for _ in range(1 if seen else DRAWS):
        tensors = make()
        leaves = _leaves(seen(tensors) if seen else tensors)
        results = _results(op, leaves, options)
        gradients = incoming(results)
        ours = _figures(results, leaves, gradients)
        leaves = _leaves(tensors)
        eager = _figures(_results(witness, leaves, options), leaves, gradients)
        leaves = _leaves(tensors, torch.float64)
        truth = _figures(_results(witness, leaves, options), leaves, gradients)
        for name, expected in truth.items():
            assert (ours[name] is None) == (expected is None), f"{name}: {ours[name]}, needs {expected}"
            if expected is not None:
                budgets.setdefault(name, Budget(name)).add(ours[name], eager[name], expected)
        excesses = [excess for budget in budgets.values() if (excess := budget.excess())]
        if not excesses:
            return ours
    raise AssertionError("\n".join(excesses))


def perturbing(operand: str) -> Callable[[Tensors], Tensors]:
    """Changes one operand: each element is off by 16 roundings up or down, labels are moved by one row."""

    def perturb(tensors: Tensors) -> Tensors:
        t = tensors[operand]
        if t.is_floating_point():
            sign = 1.0 - 2.0 * torch.randint(0, 2, t.shape)
            other = (t.detach() * (1 + 16 * torch.finfo(t.dtype).eps * sign)).to(t.dtype)
        else:
            other = t.roll(1)
        return tensors | {operand: other.requires_grad_(t.requires_grad)}

    return perturb


class Calls(TorchDispatchMode):
    """Within it, `calls` collects the name and the arguments of every operator of torch.ops.fastlora that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastlora":
            self.calls.append((func._opname, args))
        return func(*args, **(kwargs or {}))


def called(op: Callable, tensors: Tensors, **options: Any) -> dict[str, int]:
    """How often one forward and one backward of op run each operator of torch.ops.fastlora."""
    with Calls() as calls:
        run(op, tensors, **options)
    return dict(Counter(name for name, _ in calls.calls))
