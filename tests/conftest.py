"""What holds for every test: no network, no telemetry, no window. Set before the libraries are imported."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REAL_DATA = Path(os.environ.get("DMC_HUB_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real_file() -> Callable[[str], Path]:
    """`real_file(name)`: recorded data of others; the test is skipped where it is not there."""

    def find(name: str) -> Path:
        if not (REAL_DATA / name).exists():
            pytest.skip(f"{REAL_DATA / name} is not there; DMC_HUB_DATA names the folder of the real files")
        return REAL_DATA / name

    return find
