"""No code of this repository unpickles, or asks a library to."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {
    "weights_only=False": r"weights_only\s*=\s*False",
    "torch.load without weights_only": r"torch\.load\((?![^)]*weights_only=True)",
    "torch.save": r"torch\.save\(",
    "pickle": r"\bpickle\.(load|loads|Unpickler|dump|dumps)\b",
    "allow_pickle": r"allow_pickle\s*=\s*True",
    "joblib or dill": r"\b(joblib|dill)\b",
    "yaml.load": r"yaml\.(load|full_load|unsafe_load)\(",
    "eval or exec": r"(?<![\w.])(eval|exec)\(",
    "recover_environment": r"recover_environment|EnvSpec\.from_json",
}


def sources() -> list[Path]:
    return [
        path for folder in ("dmc_hub", "trainers", "pipelines", "scripts") for path in (ROOT / folder).rglob("*.py")
    ]


@pytest.mark.parametrize("name", FORBIDDEN)
def test_nothing_that_runs_what_a_file_says(name: str) -> None:
    found = [str(path) for path in sources() if re.search(FORBIDDEN[name], path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("weights_only=False", "torch.load(x, weights_only = False)"),
        ("torch.load without weights_only", "torch.load(path)"),
        ("pickle", "pickle.loads(b)"),
        ("allow_pickle", "np.load(x, allow_pickle=True)"),
        ("yaml.load", "yaml.load(text)"),
        ("eval or exec", "x = eval(text)"),
    ],
)
def test_it_would_be_found(name: str, text: str) -> None:
    assert re.search(FORBIDDEN[name], text)
    assert not re.search(FORBIDDEN[name], "torch.load(path, map_location='cpu', weights_only=True); model.eval()")
