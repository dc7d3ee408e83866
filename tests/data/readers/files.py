"""Where the real files are, and how the tests write small ones."""

import os
from pathlib import Path

import numpy as np
import pytest

REAL_DATA = Path(os.environ.get("DMC_HUB_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))


def real(name: str) -> Path:
    """A real file; the test is skipped where it is not there."""
    path = REAL_DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not there; DMC_HUB_DATA names the folder of the real files")
    return path


def steps(*shape: int, seed: int = 0) -> np.ndarray:
    """Float32 numbers to tell rows apart."""
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)
