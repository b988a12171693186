"""A pytest plugin: CUDA without a GPU, strict about devices. Triton programs run through Triton's interpreter.

    TRITON_INTERPRET=1 python -m pytest -p cuda_emulator --device cuda tests/ops

Tensors "on cuda:0" are `OnCuda`, which hold a CPU tensor. A mode sees every operator: it refuses those that mix
devices as PyTorch does, gives results their device, keeps CUDA's random numbers apart, and runs fastlora's
operators through the launchers of their CUDA key. So the host code of the CUDA path runs, with the mistakes that
only two devices show: a tensor made on the default device, a mask or a seed left on the CPU. It knows no streams,
no memory, no speed, and nothing of tensors without storage: `make test-emulated` leaves out torch.compile, fake
tensors and opcheck.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
_aten = torch.ops.aten
# What PyTorch itself lets read from one device and write to another, or index with a CPU tensor.
_MAY_MIX = {
    _aten.copy_.default, _aten._to_copy.default, _aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default,
    _aten._index_put_impl_.default,
}  # fmt: skip


class OnCuda(torch.Tensor):
    """A tensor that says it is on cuda:0; ``held`` is where its numbers are."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        made = torch.Tensor._make_subclass(cls, held, False)
        made.held = held
        return made

    def __init__(self, held: torch.Tensor) -> None: ...

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with EMULATOR:
            return function(*args, **(kwargs or {}))

    def get_device(self) -> int:
        return 0

    def cpu(self) -> torch.Tensor:
        return self.held.detach().clone()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def __repr__(self) -> str:
        return f"OnCuda({self.held!r})"

    def __format__(self, spec: str) -> str:
        return format(self.held.item() if self.dim() == 0 else self.held, spec)

    def __deepcopy__(self, memo: dict) -> OnCuda:
        return OnCuda(self.held.clone())


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, OnCuda) else leaf


class Emulator(TorchDispatchMode):
    """Two devices, where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.random: torch.Tensor | None = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_cuda = [t for t in tensors if isinstance(t, OnCuda)]
        others = [t for t in tensors if not isinstance(t, OnCuda)]
        if function is torch.ops.prim.device.default:
            return CUDA if on_cuda else function(*args)
        if any(t.device.type == "meta" for t in tensors) or any(type(t).__name__ == "FakeTensor" for t in others):
            return function(*args, **kwargs)
        if function.namespace == "fastlora" and on_cuda:
            return self._launched(function, args, kwargs)
        target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if target == CPU and (on_cuda or _in_backward()):
            target = CUDA  # autograd asks for the device of a tensor's storage, which is the CPU's
        to_cuda = target is not None and target.type == "cuda"
        self._refuse(function, args, kwargs, on_cuda, others, to_cuda)
        if to_cuda:
            kwargs["device"] = CPU
        moved = function is _aten._to_copy.default and target is not None
        if function is _aten.copy_.default:
            result_on_cuda = isinstance(args[0], OnCuda)
        else:
            result_on_cuda = to_cuda or (bool(on_cuda) and target is None)
        plain = tree_map(_held, args)
        draws = torch.Tag.nondeterministic_seeded in function.tags and (on_cuda or to_cuda)
        with self._generator() if draws else contextlib.nullcontext():
            if function is _aten.mm.dtype:  # which a CPU has not
                out = _aten.mm(plain[0].to(plain[2]), plain[1].to(plain[2]))
            else:
                out = function(*plain, **tree_map(_held, kwargs))
        if moved and not to_cuda and on_cuda:
            return out.clone() if out is plain[0] else out
        # What is written to, or returned whole, comes back as itself.
        same = {id(_held(t)): t for t in tensors}

        def back(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return same.get(id(leaf)) if id(leaf) in same else OnCuda(leaf) if result_on_cuda else leaf

        return tree_map(back, out)

    def _launched(self, function, args, kwargs):
        """A fastlora operator through its CUDA key."""
        from fastlora.kernels import _library

        launcher = _library._with_fallback(*_library.implementations[function._opname])
        with self, torch._C.DisableTorchFunction():
            out = launcher(*args, **kwargs)
        assert all(isinstance(t, OnCuda) for t in tree_leaves(out) if isinstance(t, torch.Tensor)), (
            f"{function}: a CPU tensor came out"
        )
        return out

    def _refuse(self, function, args, kwargs, on_cuda, others, to_cuda) -> None:
        """Raise what PyTorch raises for tensors, indices and generators of two devices."""
        if on_cuda and function not in _MAY_MIX and any(t.dim() > 0 for t in others):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({function})")
        indexed = function in (_aten.index.Tensor, _aten.index_put_.default)
        if indexed and on_cuda and not isinstance(args[0], OnCuda):
            raise RuntimeError(f"indices should be on cpu ({function})")
        if kwargs.get("generator") is not None and (on_cuda or to_cuda):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")

    @contextlib.contextmanager
    def _generator(self):
        """CUDA's own random numbers, in the place of the CPU's."""
        before = torch.get_rng_state()
        torch.set_rng_state(get_rng_state())
        try:
            yield
        finally:
            self.random = torch.get_rng_state()
            torch.set_rng_state(before)


EMULATOR = Emulator()


def _in_backward() -> bool:
    """Whether it is autograd's engine that asks, and not Python code of somebody's."""
    frame = sys._getframe(2)
    passing = ("cuda_emulator.py", "_compile.py", "eval_frame.py", "contextlib.py", "_python_dispatch.py")
    while frame is not None and frame.f_code.co_filename.endswith(passing):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


def get_rng_state(device: Any = "cuda") -> torch.Tensor:
    if EMULATOR.random is None:
        manual_seed_all(0)
    return EMULATOR.random.clone()


def set_rng_state(state: torch.Tensor, device: Any = "cuda") -> None:
    EMULATOR.random = state.clone()


def manual_seed_all(seed: int) -> None:
    before = torch.get_rng_state()
    torch._C.default_generator.manual_seed(seed)
    EMULATOR.random = torch.get_rng_state()
    torch.set_rng_state(before)


class _Device(contextlib.nullcontext):
    def __init__(self, device: Any) -> None:
        super().__init__()
        assert torch.device(device).type == "cuda", device


def _tensor(data: Any, *, device: Any = None, requires_grad: bool = False, **options: Any) -> torch.Tensor:
    """torch.tensor, which makes its CPU tensor before any mode sees it."""
    modes = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)]
    device = modes[-1].device if device is None and modes else device
    with torch._C.DisableTorchFunction():
        if device is None or torch.device(device).type != "cuda":
            return _make_tensor(data, device=device, requires_grad=requires_grad, **options)
        made = _make_tensor(_held(data), device="cpu", **options)
        return OnCuda(made).requires_grad_(requires_grad)


_make_tensor = torch.tensor


def install() -> None:
    """Put an emulated GPU in the place of torch.cuda's, for good."""
    import peft  # noqa: F401  and with it bitsandbytes, which would bind to the GPU it sees

    torch.tensor = _tensor
    torch.autograd.set_multithreading_enabled(False)
    instead = {
        "is_available": lambda: True, "_lazy_init": lambda: None, "_is_in_bad_fork": lambda: False,
        "is_initialized": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_name": lambda *device: "an emulated GPU", "get_device_capability": lambda *device: (9, 0),
        "is_bf16_supported": lambda *options: True, "synchronize": lambda *device: None, "device": _Device,
        "is_current_stream_capturing": lambda: False, "empty_cache": lambda: None, "manual_seed": manual_seed_all,
        "manual_seed_all": manual_seed_all, "get_rng_state": get_rng_state, "set_rng_state": set_rng_state,
    }  # fmt: skip
    for name, function in instead.items():
        setattr(torch.cuda, name, function)


def _seal_launches() -> None:
    """Every launch takes tensors on CUDA alone, and hands what they hold to the interpreter."""
    import fastlora.ops  # noqa: F401  imports every kernel
    from fastlora.kernels import _tl

    real = _tl.launch

    def launch(kernel, grid, *args, choice=None, **meta):
        tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        assert all(isinstance(t, OnCuda) for t in tensors), f"{kernel.fn.__name__}: {[t.device for t in tensors]}"
        return real(kernel, grid, *tree_map(_held, args), choice=choice, **meta)

    for path, module in list(sys.modules.items()):
        if path.startswith("fastlora.kernels.") and getattr(module, "launch", None) is real:
            module.launch = launch


install()


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    _seal_launches()
    EMULATOR.__enter__()
