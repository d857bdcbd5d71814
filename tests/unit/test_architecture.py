"""The arrows of docs/architecture.md: who may import whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("services", "ratchet", "examples", "tests", "bench", "scripts")
SERVICES = ("generator", "reward", "trainer", "orchestrator")
# What each part may import of ours, itself included.
ARROWS = {
    "services.contracts": ("services.contracts",),
    "services.platform": ("services.contracts", "services.platform"),
    **{f"services.{name}": ("services.contracts", "services.platform", f"services.{name}") for name in SERVICES},
    "ratchet": ("services.contracts", "services.platform", "ratchet"),
}
MODEL_LIBRARIES = ("torch", "transformers", "vllm", "trl", "datasets", "accelerate", "deepspeed")


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and absolute name of every import of a file, wherever in the file it stands."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*start, *([node.module] if node.module else [])])
            # `from services import trainer` imports services.trainer
            for alias in node.names:
                yield node.lineno, f"{stem}.{alias.name}" if stem == "services" else stem


def python_files(part: str) -> list[Path]:
    return sorted((ROOT / part.replace(".", "/")).rglob("*.py"))


@pytest.mark.parametrize("part", ARROWS)
def test_a_part_imports_only_what_its_arrows_allow(part: str) -> None:
    files = python_files(part)
    assert files, f"{part} has no Python files: was it renamed?"
    forbidden = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imports(path)
        if name.split(".")[0] in OURS and not any(within(name, allowed) for allowed in ARROWS[part])
    ]
    assert forbidden == []


@pytest.mark.parametrize("part", ["services.contracts", "services.platform", "services.orchestrator", "ratchet"])
def test_a_part_without_models_names_no_model_library(part: str) -> None:
    forbidden = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in python_files(part)
        for line, name in imports(path)
        if name.split(".")[0] in MODEL_LIBRARIES
    ]
    assert forbidden == []


@pytest.mark.parametrize("module", ["services.contracts", "services.orchestrator.app", "ratchet.cli.main"])
def test_importing_it_loads_no_model_library(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(sys.modules.keys() & set({MODEL_LIBRARIES!r})))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_the_scan_sees_relative_imports_and_imports_inside_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    file = tmp_path / "services" / "reward" / "app.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from ..trainer import losses\nfrom . import settings\ndef f():\n    from services import generator\n"
    )
    assert list(imports(file)) == [(1, "services.trainer"), (2, "services.reward"), (4, "services.generator")]
