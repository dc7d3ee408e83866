"""Where the real files are, and how the tests write small ones."""

import numpy as np


def steps(*shape: int, seed: int = 0) -> np.ndarray:
    """Float32 numbers to tell rows apart."""
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)
