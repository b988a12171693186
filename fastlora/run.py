"""Run a training script unedited, with every Llama it builds patched.

    python -m fastlora.run script.py args…            torchrun -m fastlora.run script.py args…
    python -m fastlora.run -m trl.scripts.sft args…   accelerate launch -m fastlora.run script.py args…

What ``fastlora.patch`` takes comes before the script: --memory auto, --ops rms_norm,swiglu, --strict. Adapters come
after the model is built: strict is held against the plan of its first training step.

Each model's plan is printed at its first training step, and with its counters when the script ends; on stderr, by the
first process.

``fastlora.patch`` touches one model and no class. A script without the line has no place to call it from, so here, in a
process that fastlora was asked to start, one method of one class gives way: ``LlamaPreTrainedModel.post_init``, which
ends the construction of a Llama however it is built (from_pretrained, from_config, by hand, by TRL from a name). It is
as if the script called ``patch`` before ``get_peft_model``: early enough for quantisation, adapters, DDP, FSDP and
DeepSpeed. The method goes back when the script ends.

Rejected: a forward pre-hook on every module of torch, which fires when the model is wrapped already, with sharded
weights and replaced forwards that forbid to fuse, and slows every module call of the process; wrapping
``from_pretrained`` and its relatives, which misses models built by hand.

Not seen: models unpickled with ``torch.load``, and those of processes that the script spawns itself.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import runpy
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

import fastlora

LLAMA = "transformers.models.llama.modeling_llama"
USAGE = "[-h] [--ops OPS] [--strict] [--memory MEMORY] (script.py | -m module) [args…]"


class Watch:
    """What ran in one model: its plan at its first training step, and counters that outlive it."""

    def __init__(self, model: Any) -> None:
        self.model, self.name = weakref.ref(model), type(model).__name__
        self.plan: Any = None
        self._states: dict[str, Any] = {}

    def look(self) -> None:
        """Take the plan of the model as it is now, if it is still there."""
        if (model := self.model()) is not None:
            self.plan = fastlora.explain(model)
            self._states = {path: vars(m)["_fastlora"] for path, m in model.named_modules() if "_fastlora" in vars(m)}

    def report(self) -> str:
        """The plan, with the counters of now."""
        from .patching.engine import recount

        if self.plan is None:
            self.look()
        return "" if self.plan is None else f"fastlora: {self.name}\n{recount(self.plan, self._states)}"


# By the backbone: it is called as a module whoever drives it, where PEFT calls the forward of the model around it.
_watches: weakref.WeakKeyDictionary[Any, Watch] = weakref.WeakKeyDictionary()
_all: list[Watch] = []  # those of this run
_options: dict[str, Any] = {}  # of patch; here, where the hooks of copies of a model find them, too


def _watch(backbone: Any) -> Watch:
    if backbone not in _watches:
        _watches[backbone] = Watch(backbone)
        _all.append(_watches[backbone])
    return _watches[backbone]


def _built(model: Any) -> None:
    """Patch a model and watch it, under its outermost name: the backbone is built before what is around it."""
    fastlora.patch(model, **{**_options, "strict": False})
    backbone = model.base_model
    if backbone not in _watches:
        backbone.register_forward_pre_hook(_first_step)
    watch = _watch(backbone)
    watch.model, watch.name = weakref.ref(model), type(model).__name__


def _first_step(backbone: Any, args: Any) -> None:
    """A forward pre-hook: the plan, once. Copies of a model have it, too, and are known by their backbone."""
    import torch

    from .patching.engine import require_fused

    if not backbone.training or torch.compiler.is_compiling():
        return
    for handle, hook in list(backbone._forward_pre_hooks.items()):
        if hook is _first_step:
            del backbone._forward_pre_hooks[handle]
    watch = _watch(backbone)
    watch.look()
    _say(f"fastlora: {watch.name}\n{watch.plan}")
    if _options.get("strict") and (model := watch.model()) is not None:
        require_fused(model, watch.plan, _options["ops"])


def _say(text: str) -> None:
    if text and os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


class _AfterImport(MetaPathFinder):
    """Calls back when a module has been imported, by whoever imports it first: importing it here would be too early
    for a script that sets environment variables before it imports transformers."""

    def __init__(self, name: str, callback: Callable[[ModuleType], None]) -> None:
        self._name, self._callback = name, callback

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_call_back(module: ModuleType) -> None:
                execute(module)
                self._callback(module)

            spec.loader.exec_module = then_call_back  # type: ignore[method-assign]
        return spec


@contextmanager
def patching_what_is_built(**options: Any) -> Iterator[None]:
    """Within it, every Llama is patched when it has been constructed. options: of ``fastlora.patch``."""
    hooked: list[Any] = []

    def hook(module: ModuleType) -> None:
        cls = module.LlamaPreTrainedModel
        original = cls.post_init

        @functools.wraps(original)
        def post_init(self: Any) -> None:
            original(self)
            _built(self)

        cls.post_init = post_init
        hooked.append(cls)

    finder = _AfterImport(LLAMA, hook)
    if LLAMA in sys.modules:
        hook(sys.modules[LLAMA])
    else:
        sys.meta_path.insert(0, finder)
    _options.update(options)
    try:
        yield
    finally:
        _options.clear()
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        for cls in hooked:
            del cls.post_init


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastlora.run", usage=f"%(prog)s {USAGE}", allow_abbrev=False)
    parser.description = "Run a training script unedited, with every Llama it builds patched."
    parser.add_argument("--ops", help="what to fuse, names with commas; all by default")
    parser.add_argument("--strict", action="store_true", help="stop at the first step if anything is not fused")
    parser.add_argument("--memory", default="fast", help="fast, lean, auto, or bytes: 20GB")
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="a module, as python -m, and its arguments")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a script and its arguments")
    found = parser.parse_args(argv)
    if not (found.module or found.script):
        parser.error("a script or -m and a module is needed")
    if not found.module and not os.path.exists(found.script[0]):
        parser.error(f"{found.script[0]}: no such file")
    return found


def main(argv: list[str]) -> None:
    """Run a script, or ``-m`` and a module, with its arguments, as python itself would."""
    given = _parse(argv)
    command: list[str] = (given.module or []) + given.script
    target, *arguments = command
    built = False
    sys.argv = [target, *arguments]
    try:
        with patching_what_is_built(ops=given.ops, strict=given.strict, memory=given.memory):
            if given.module:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
            else:
                if not getattr(sys.flags, "safe_path", False):
                    sys.path[0] = os.path.dirname(os.path.realpath(target))
                runpy.run_path(target, run_name="__main__")
        built = bool(_all)
    finally:
        for watch in _all:
            _say(watch.report())
        if not _all:
            _say("fastlora: the script built no Llama model: nothing was fused")
        _all.clear()
    if given.strict and not built:
        raise SystemExit("fastlora: --strict, and the script built no Llama model")


if __name__ == "__main__":
    # Under its own name: the script becomes __main__.
    from fastlora.run import main as run

    run(sys.argv[1:])
