"""`fastlora demo`: the same small training with and without fastlora, side by side."""

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from .data import Rows, read_rows
from .demo_base import SEED, make_base
from .errors import CommandError
from .files import write_json
from .report import Curve, loss_differences, plot_comparison
from .train import quiet

# As many rows as a model this small learns in these steps.
ROWS = 64
BASE_STEPS = 200
BATCH = 4
FLAGS = ["--rank", "32", "--alpha", "64", "--lr", "2e-3", "--batch-size", str(BATCH), "--grad-accum", "1"]


class Run(NamedTuple):
    name: str
    base: str
    flags: list[str]
    environment: dict[str, str]

    @property
    def directory(self) -> str:
        return self.name.replace(", ", "-").replace(" ", "-")


# The same sums in other orders: the eager attention of transformers instead of PyTorch's, and matrix products by MKL's
# portable code. How far the unpatched curves part is what float32 itself leaves open.
RUNS = (
    Run("unpatched", "base", ["--no-patch"], {}),
    Run("unpatched, eager attention", "base-eager", ["--no-patch"], {}),
    Run("unpatched, eager attention, portable BLAS", "base-eager", ["--no-patch"], {"MKL_CBWR": "COMPATIBLE"}),
    Run("patched", "base", [], {}),
)


def demo(out: str | None, steps: int, console: Console) -> None:
    """Make a base model, train on it four times, compare the runs, and let the adapter answer a question."""
    began = time.perf_counter()
    # Threads that spin at every barrier make a machine with something else to do many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    directory = _directory(out)
    data = directory / "rows.jsonl"
    bundled = (files("fastlora.cli") / "data" / "llama2_lora.jsonl").read_text(encoding="utf-8")
    data.write_text("".join(bundled.splitlines(keepends=True)[:ROWS]), encoding="utf-8")
    rows = read_rows(data)
    base = directory / "base"
    quiet(bars=False)
    console.print(f"[1/6] A small Llama with random weights first reads {ROWS} questions and answers as plain text:")
    console.print("      a frozen model that knows no language has nothing to adapt. Outside the comparison.")
    _make_base(rows, base, console)

    reports = {}
    for number, one in enumerate(RUNS, start=2):
        target = directory / one.directory
        run = ["train", "--model", str(directory / one.base), "--data", str(data), "--out", str(target)]
        run += ["--max-steps", str(steps), "--seed", str(SEED)]
        variables = "".join(f"{name}={value} " for name, value in one.environment.items())
        command = f"{variables}fastlora {shlex.join([*run, *FLAGS, *one.flags])}"
        console.print(f"\n[{number}/6] LoRA, {one.name}:\n      {command}")
        # A process of its own: peak memory is a figure of the process, and no run profits from an earlier one.
        status = subprocess.run(
            [sys.executable, "-m", "fastlora.cli", *run, *FLAGS, *one.flags], env={**os.environ, **one.environment}
        ).returncode
        if status:
            raise CommandError(f"the {one.name} run ended with status {status}; what it wrote is in {target}")
        reports[one.name] = json.loads((target / "report.json").read_text(encoding="utf-8"))

    console.print("\n[6/6] The patched run's adapter, loaded into an unpatched and into a patched model")
    used = _use_adapter(base, directory / "patched", rows)
    console.print()
    console.print(_table(reports), markup=True)
    curves = {name: report["loss"] for name, report in reports.items()}
    image = directory / "demo.png"
    plot_comparison(curves, "unpatched", "patched", image)
    ours = _largest_difference(curves["unpatched"], curves.pop("patched"))
    noise = max(_largest_difference(one, other) for one, other in itertools.combinations(curves.values(), 2))
    console.print(f"\nLargest difference of the loss at a step, patched and unpatched: {ours:.1e}")
    console.print(f"  among {len(curves)} unpatched runs that differ in nothing but summation order: {noise:.1e}")
    console.print(
        f"Largest difference of a logit, one adapter in both models:       {used.difference:.1e}, of {used.largest:.1f}"
    )
    console.print(f"\nQuestion   {used.question}\nAnswer     {used.answer}\nIn the set {used.wanted}")
    console.print(f"Answered word for word: {used.right} of {ROWS}; without the adapter {used.right_without}")
    console.print(f"\nLoss curves: {image}\nEverything else: {directory}   ({time.perf_counter() - began:.0f} s)")


def _directory(out: str | None) -> Path:
    if out is None:
        return Path(tempfile.mkdtemp(prefix="fastlora-demo-"))
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CommandError(f"--out {path} is not an empty directory; choose another one")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _make_base(rows: Rows, path: Path, console: Console) -> None:
    texts = ["\n".join(message["content"] for message in row["messages"]) for row in rows.rows]
    columns = (BarColumn(), TextColumn("step {task.completed}/{task.total}  {task.fields[note]}"))
    last = 0.0
    with Progress("     ", *columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=BASE_STEPS, note="")

        def on_step(step: int, loss: float) -> None:
            nonlocal last
            last = loss
            bar.update(task, completed=step, note=f"loss {loss:.3f}")

        make_base(texts, BASE_STEPS, path, on_step)
    other = path.with_name("base-eager")
    shutil.copytree(path, other)
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    write_json(other / "config.json", {**config, "attn_implementation": "eager"})
    console.print(f"      {BASE_STEPS} steps, all weights, loss {last:.3f}")


def _largest_difference(reference: Curve, other: Curve) -> float:
    return max(abs(distance) for _, distance in loss_differences(reference, other))


def _table(reports: dict[str, dict[str, Any]]) -> Table:
    """The unpatched and the patched run side by side."""
    before, after = reports["unpatched"], reports["patched"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, side in (("", "left"), ("unpatched", "right"), ("patched", "right"), ("", "right")):
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]

    def row(name: str, pick: Any, form: str, scale: float = 1) -> None:
        left, right = pick(before) / scale, pick(after) / scale
        table.add_row(name, format(left, form), format(right, form), f"× {right / left:.2f}" if left else "")

    steps = before["steps"]
    table.add_row(f"loss at step {steps}", *(f"{r['loss'][-1]['loss']:.6f}" for r in (before, after)), "")
    row("tokens/s", lambda r: r["tokens_per_second"], ",.0f")
    row("saved for backward, KiB per token", lambda r: r["saved_for_backward"]["bytes_per_token"], ",.1f", 2**10)
    row("peak resident memory of the process, MiB", lambda r: r["peak_memory"]["bytes"], ",.0f", 2**20)
    row(
        "  of it grown while training, MiB",
        lambda r: r["peak_memory"]["bytes"] - r["peak_memory"]["at_start"],
        ",.0f",
        2**20,
    )
    return table


class _Use(NamedTuple):
    difference: float  # the largest of a logit, between an unpatched and a patched model
    largest: float  # the largest logit
    question: str
    answer: str  # of the unpatched model
    wanted: str  # the set's answer
    right: int  # answers of the unpatched model that are the set's, word for word
    right_without: int  # the same of the base model, without the adapter


def _use_adapter(base: Path, adapter: Path, rows: Rows) -> _Use:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import fastlora

    tokenizer: Any = AutoTokenizer.from_pretrained(adapter)
    tokenizer.pad_token = tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).to(device).eval()
    chats = [row["messages"] for row in rows.rows]

    def encode(chats: list[Any]) -> Any:
        return tokenizer.apply_chat_template(chats, return_dict=True, return_tensors="pt", padding=True).to(device)

    def answers() -> list[str]:
        asked = encode([chat[:-1] for chat in chats])
        said = model.generate(**asked, max_new_tokens=96, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(said[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def right(answers: list[str]) -> int:
        return sum(answer == chat[-1]["content"] for answer, chat in zip(answers, chats, strict=True))

    batch = encode(chats)
    with torch.no_grad():
        plain = model(**batch).logits
        with fastlora.patched(model):
            ours = model(**batch).logits
        real = batch["attention_mask"].bool()
        said = answers()
        with model.disable_adapter():
            without = right(answers())
    difference, largest = (plain - ours)[real].abs().max().item(), plain[real].abs().max().item()
    question, wanted = chats[0][-2]["content"], chats[0][-1]["content"]
    return _Use(difference, largest, question, said[0], wanted, right(said), without)
