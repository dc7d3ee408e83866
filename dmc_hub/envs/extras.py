"""Libraries that are not among the base dependencies."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import `module`, which the extra `extra` brings.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'`{module}` cannot be imported ({error}): it comes with an extra, `pip install "dmc_hub[{extra}]"`.'
        ) from error
