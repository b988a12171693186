"""The rules of the house that import-linter does not know: which word is at home on which floor."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastlora"
FLOORS = ("cli", "integrations", "patching", "tuning", "modules", "ops", "planning", "kernels", "reference")
LINES = 420


def sources(*floors: str) -> list[Path]:
    return sorted(path for floor in floors for path in (PACKAGE / floor).rglob("*.py"))


def others(*floors: str) -> list[Path]:
    """Every source file of fastlora that is on none of these floors."""
    return sorted(set(PACKAGE.rglob("*.py")) - set(sources(*floors)))


def imports(path: Path) -> set[str]:
    """Full names of the modules a file imports, at its top or inside a function."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1]] if node.level else [])
            module = ".".join(filter(None, [base, node.module]))
            found |= {module} | {f"{module}.{name.name}" for name in node.names}
    return found


def importing(paths: list[Path], *modules: str) -> list[str]:
    def within(name: str) -> bool:
        return any(name == module or name.startswith(module + ".") for module in modules)

    return [str(path.relative_to(ROOT)) for path in paths if any(map(within, imports(path)))]


def naming(paths: list[Path], word: str) -> list[str]:
    def named(node: ast.AST) -> bool:
        return (isinstance(node, ast.Name) and node.id == word) or (isinstance(node, ast.arg) and node.arg == word)

    return [str(p.relative_to(ROOT)) for p in paths if any(map(named, ast.walk(ast.parse(p.read_text()))))]


def test_every_folder_is_a_floor():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(FLOORS)


def test_transformers_and_peft_are_known_from_modules_up():
    at_home = ("modules", "patching", "cli", "integrations")
    assert importing(sources(*at_home), "transformers", "peft"), "the rule looks in the wrong place"
    assert not importing(others(*at_home), "transformers", "peft")


@pytest.mark.parametrize(("word", "floor"), [("ctx", "ops"), ("tl", "kernels")])
def test_a_word_has_one_home(word, floor):
    assert naming(sources(floor), word), "the rule looks in the wrong place"
    assert not naming(others(floor), word)


def test_triton_is_imported_in_one_file():
    assert importing(others(), "triton") == ["fastlora/kernels/_tl.py"]


def test_every_launch_passes_the_one_launch_function():
    """kernel[grid](...) stands in one file; elsewhere a kernel is an argument of launch."""

    def launches(path: Path) -> bool:
        calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        return any(
            isinstance(f, ast.Subscript) and isinstance(f.value, ast.Name) and "kernel" in f.value.id for f in calls
        )

    assert [path.name for path in sources("kernels") if launches(path)] == ["_tl.py"]


def test_the_witness_knows_nobody_and_judges_from_outside():
    """If an op could reach its witness, the op's test could pass with the kernel deleted."""
    ours = {f"fastlora.{floor}" for floor in FLOORS if floor != "reference"}
    assert not importing(sources("reference"), *ours)
    assert not importing(others("reference"), "fastlora.reference")


@pytest.mark.parametrize("folder", ["fastlora", "csrc"])
def test_no_file_outgrows_its_room(folder):
    files = [path for ending in ("py", "cpp", "h") for path in (ROOT / folder).rglob(f"*.{ending}")]
    assert files
    large = {
        str(path.relative_to(ROOT)): lines for path in files if (lines := len(path.read_text().splitlines())) > LINES
    }
    assert not large


def run(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_importing_fastlora_imports_no_heavy_library():
    script = "import sys, fastlora, fastlora.integrations, fastlora.run; print(sorted({%s} & set(sys.modules)))"
    heavy = run(script % "'torch', 'transformers', 'peft', 'triton', 'lightning'")
    assert heavy.strip() == "[]"


def test_importing_fastlora_is_cheap_beside_torch():
    script = "import time, torch; t = time.perf_counter(); import fastlora; print(time.perf_counter() - t)"
    assert min(float(run(script)) for _ in range(3)) < 0.3
