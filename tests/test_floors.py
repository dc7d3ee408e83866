"""Imports only go down from floor to floor, and what travels to the Hub is self-contained."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("dmc_hub", "model_cards", "pipelines", "trainers")
TRAVELLERS = [
    "dmc_hub/scheduler.py",
    *sorted(f"dmc_hub/models/{path.name}" for path in (ROOT / "dmc_hub/models").glob("[!_]*.py")),
    *sorted(f"pipelines/{path.name}" for path in (ROOT / "pipelines").glob("[!_]*.py")),
]
TRAVEL_LIGHT = {"diffusers", "numpy", "torch", *sys.stdlib_module_names}


def _lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_floors_hold() -> None:
    report = _lint_imports(ROOT)
    assert report.returncode == 0, report.stdout


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("dmc_hub/losses.py", "import dmc_hub.scheduler"),
        ("dmc_hub/models/normalizer.py", "from dmc_hub.data.episodes import Episodes"),
        ("dmc_hub/envs/nav1d.py", "from dmc_hub import scheduler"),
        ("pipelines/diffuser_planner.py", "def late():\n    from dmc_hub.trainers import denoising"),
        ("trainers/denoising.py", "from dmc_hub.cli import main"),
        ("dmc_hub/scheduler.py", "from dmc_hub import DenoisingTrainer"),
        ("dmc_hub/without_a_floor.py", "import torch"),
    ],
)
def test_an_import_that_goes_up_is_found(copy: Path, file: str, statement: str) -> None:
    with (copy / file).open("a") as source:
        source.write(f"\n{statement}\n")
    report = _lint_imports(copy)
    assert report.returncode == 1
    assert "BROKEN" in report.stdout
    assert Path(file).stem in report.stdout


def _imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def _without_guarded_imports(source: str) -> ast.Module:
    """The module without the bodies of its top-level `try: ... except ImportError`."""
    module = ast.parse(source)
    for node in module.body:
        if isinstance(node, ast.Try) and [ast.unparse(h.type) for h in node.handlers if h.type] == ["ImportError"]:
            assert set(_imported_modules(ast.Module(node.body, []))) == {"dmc_hub.control_pipeline"}
            node.body = []
    return module


@pytest.mark.parametrize("file", TRAVELLERS)
def test_what_travels_imports_only_torch_numpy_and_diffusers(file: str) -> None:
    imported = set(_imported_modules(_without_guarded_imports((ROOT / file).read_text())))
    assert {name for name in imported if name.partition(".")[0] not in TRAVEL_LIGHT} == set()


@pytest.mark.parametrize("name", ["model_cards", "pipelines", "scripts", "trainers"])
def test_ruff_refuses_the_bare_names_of_the_top_level_folders(name: str) -> None:
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--select",
        "TID251",
        "--stdin-filename",
        "tests/bare.py",
        "-",
    ]
    for statement in (f"import {name}", f"from {name} import anything", f"import {name}.anything"):
        report = subprocess.run(command, input=f"{statement}\n", cwd=ROOT, capture_output=True, text=True)
        assert report.returncode == 1, report.stdout + report.stderr
        assert f"`{name}" in report.stdout
