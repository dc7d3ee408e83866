"""The wheel holds what the tree holds, and the package's surface is what it says it is."""

import ast
import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dmc_hub

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"": "dmc_hub", "model_cards/": "model_cards", "pipelines/": "pipelines", "trainers/": "trainers"}


def _files_of_tree() -> dict[str, Path]:
    """Path inside the wheel -> file of the tree, for every file in the package's folders."""
    files = {}
    for prefix, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT / folder)
            below_symlink = (ROOT / folder / relative.parts[0]).is_symlink()
            hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
            if path.is_file() and not below_symlink and not hidden:
                files[f"dmc_hub/{prefix}{relative.as_posix()}"] = path
    return files


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built offline, from a copy of the tree so that no build/ is reused or left behind."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    target = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(target)]
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(source)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = target.glob("*.whl")
    return path


def test_wheel_holds_every_file_of_the_tree_once(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(_files_of_tree())


def test_wheel_holds_the_files_themselves(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    changed = [name for name, path in _files_of_tree().items() if archive.read(name) != path.read_bytes()]
    assert changed == []


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    information = f"dmc_hub-{dmc_hub.__version__}.dist-info"
    metadata = archive.read(f"{information}/METADATA").decode()
    assert f"\nVersion: {dmc_hub.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "dmc-hub = dmc_hub.cli:main" in archive.read(f"{information}/entry_points.txt").decode()
    assert "Apache License" in archive.read(f"{information}/licenses/LICENSE").decode()


@pytest.mark.parametrize("folder", ["model_cards", "pipelines", "trainers"])
def test_symlinks_are_relative_and_point_to_the_top_level(folder: str) -> None:
    link = ROOT / "dmc_hub" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder


@pytest.mark.parametrize("name", [name for name in dmc_hub.__all__ if name != "__version__"])
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(dmc_hub, name)
    assert value.__name__ == name
    assert value.__module__ == dmc_hub._MODULE_OF_NAME[name]


def test_public_names_are_the_same_for_users_and_for_type_checkers() -> None:
    tree = ast.parse((ROOT / "dmc_hub/__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imported = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dmc_hub.")
        for alias in node.names
    }
    assert imported == dmc_hub._MODULE_OF_NAME
    assert dmc_hub.__all__ == sorted([*imported, "__version__"])
    assert set(dmc_hub.__all__) <= set(dir(dmc_hub))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'dmc_hub' has no attribute 'DiffuserPlaner'"):
        importlib.import_module("dmc_hub").DiffuserPlaner  # noqa: B018


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["dmc_hub", "dmc_hub.cli"])
def test_import_is_light(module: str) -> None:
    heavy = {"datasets", "diffusers", "matplotlib", "torch", "transformers", "yaml"}
    assert _run(f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))") == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import dmc_hub, gymnasium",
        "import gymnasium, dmc_hub",
        "import dmc_hub.envs.nav1d, gymnasium",
        "from gymnasium.envs.registration import register; import dmc_hub; import gymnasium",
    ],
)
def test_environment_is_registered_whatever_is_imported_first(imports: str) -> None:
    assert _run(f"{imports}; print(gymnasium.spec('dmc_hub/Nav1D-v0').id)") == "dmc_hub/Nav1D-v0"
