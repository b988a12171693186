"""The registry of fastlora's operators: PyTorch's own dispatcher, one schema per kernel.

The CUDA key runs the Triton launcher. The CPU key runs the C++ kernel of csrc/ where the extension is built and the
ATen composition where it is not. Under ``TRITON_INTERPRET=1`` the CPU key runs the Triton launcher, so that Triton
code is tested without a GPU. ``FASTLORA_CSRC=0`` leaves the extension unloaded.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shlex
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch.utils.flop_counter import register_flop_formula

from ._tiles import LaunchFailed, NothingLeft, give_up

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

EXTENSION = Path(__file__).resolve().parents[1] / "_C.abi3.so"
_library = torch.library.Library("fastlora", "DEF")


def build_command() -> str:
    """The command that builds csrc where this fastlora came from: its clone, or the folder that pip installed it from.

    Never by name: a package index may know another project under ours.
    """
    how, clone = "pip install --no-build-isolation --no-deps --force-reinstall", EXTENSION.parents[1]
    if (clone / "csrc").is_dir():
        return f"{how} -e {shlex.quote(str(clone))}"
    try:
        came = json.loads(distribution("fastlora").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        came = {}
    if "dir_info" not in came:
        return f"{how} . (in a clone of fastlora)"
    return f"{how} {shlex.quote(url2pathname(urlsplit(came['url']).path))}"


def _load_extension() -> str:
    """Load csrc and return its state in words: "loaded", or why it is not."""
    if INTERPRET:
        return "not loaded: TRITON_INTERPRET=1 runs the Triton code on the CPU"
    if os.environ.get("FASTLORA_CSRC") == "0":
        return "not loaded: FASTLORA_CSRC=0"
    if not EXTENSION.exists():
        reason = f"not built; to build them: {build_command()}"
    else:
        try:
            torch.ops.load_library(str(EXTENSION))
            return "loaded"
        except OSError as error:
            reason = f"not loadable ({error}); to build them: {build_command()}"
    if not torch.cuda.is_available():
        logging.getLogger("fastlora").warning("ATen compositions serve on the CPU, C++ kernels are %s", reason)
    return reason


csrc_state = _load_extension()

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def _outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its own matrix products left in the dtypes it gives them: ops take autocast's dtype before this."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():  # in most backwards
            return function(*args)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return function(*args)

    return run


# By operator: the Triton launcher and the ATen composition, as they were registered.
implementations: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}


def _with_fallback(launcher: Callable[..., Any], aten: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher, outside of autocast; again with the next candidate where a tile does not run here; the composition
    when none is left."""

    @_outside_autocast
    @functools.wraps(launcher)
    def run(*args: Any) -> Any:
        while True:
            try:
                return launcher(*args)
            except LaunchFailed as failure:
                give_up(failure)
            except NothingLeft:
                break
        return aten(*args)  # outside of the except, which keeps alive all that the launcher has made

    return run


def register(
    schema: str,
    *,
    triton: Callable[..., Any],
    aten: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int] | None,
    cuda_graphs: bool = True,
) -> None:
    """Define ``fastlora::<schema>`` with its Triton launcher, its ATen composition, its shape function and its FLOPs.

    Args:
        schema: PyTorch operator schema, such as ``"swiglu_fwd(Tensor gate, Tensor up) -> Tensor"``.
        triton: launcher for the CUDA key (and the CPU key under the Triton interpreter).
        aten: composition for the CPU key where csrc has no kernel of that name.
        fake: returns empty outputs of the right shapes, dtypes and strides, for tracing.
        flops: counts its matrix products, a formula of ``_flops``; None where it makes none.
        cuda_graphs: whether a CUDA graph may hold it: False where it waits for the device or draws on the host.
    """
    tags = [torch.Tag.needs_fixed_stride_order, *([] if cuda_graphs else [torch.Tag.cudagraph_unsafe])]
    name = schema.partition("(")[0]
    implementations[name] = triton, aten
    triton, aten = _with_fallback(triton, aten), _outside_autocast(aten)
    _library.define(schema, tags=tags)
    _library.impl(name, triton, "CUDA")
    if INTERPRET:
        _library.impl(name, triton, "CPU")
    elif not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlora::{name}", "CPU"):
        _library.impl(name, aten, "CPU")
    torch.library.register_fake(f"fastlora::{name}", fake, lib=_library)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.fastlora, name))(flops)


def runs_on_cpu(name: str) -> str:
    """What the CPU key of ``fastlora::name`` runs: "triton (interpreter)", "csrc", or "aten": a composition, in which
    other operators of ours may run."""
    if INTERPRET:
        return "triton (interpreter)"
    python_impls: set[str] = getattr(_library, "_op_impls", set())
    return "aten" if f"fastlora/{name}/CPU" in python_impls else "csrc"
