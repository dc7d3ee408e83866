"""How long `import dmc_hub` takes beyond `import torch`, and `dmc-hub --help`."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

TORCH, BOTH, HELP = "import torch", "import torch, dmc_hub", "dmc-hub --help"
COMMANDS = {TORCH: ["-c", TORCH], BOTH: ["-c", BOTH], HELP: ["-m", "dmc_hub.cli", "--help"]}
LIMITS = {"import dmc_hub": 0.3, HELP: 1.0}
"""Seconds."""


def measure_startup(*, repeats: int) -> dict[str, Any]:
    """Seconds of new processes, which take turns.

    Returns:
        `startup`: by what is started `seconds`, the median, `at_most` and `repeats`; an import is what it adds to that
        of torch in the same turn.
    """
    turns = [{name: _seconds(command) for name, command in COMMANDS.items()} for _ in range(repeats)]
    taken = {"import dmc_hub": [turn[BOTH] - turn[TORCH] for turn in turns], HELP: [turn[HELP] for turn in turns]}
    return {
        "startup": {
            name: {"seconds": statistics.median(seconds), "at_most": LIMITS[name], "repeats": repeats}
            for name, seconds in taken.items()
        }
    }


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return time.perf_counter() - start
