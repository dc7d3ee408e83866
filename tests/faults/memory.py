"""Align, evaluate, save and load in one process, again and again: memory and open files stay what they are."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dmc_hub import checkpoint
from dmc_hub.benchmarks.prompts import resident_bytes
from dmc_hub.hub import load_pipeline
from dmc_hub.task_evaluation import evaluate_on_task
from dmc_hub.tasks import get_task
from tests.faults import kills
from tests.trainers.test_two_processes import make_trainer

WARM_UP = 3
TOLERANCE = 0.05


def soak(minutes: float, output: Path) -> bool:
    """Go through cycles for so long; returns whether memory (± 5 %) and open files were flat and results the same."""
    end, rows, results = time.monotonic() + 60 * minutes, list[dict[str, Any]](), set[tuple[str, float]]()
    start = time.monotonic()
    while time.monotonic() < end or len(rows) < 2 * WARM_UP:
        results.add(cycle())
        gc.collect()
        rows.append({"seconds": time.monotonic() - start, "bytes": resident_bytes(), "files": open_files()})
        if len(rows) % 10 == 0:
            sys.stdout.write(f"cycle {len(rows)}: {rows[-1]}\n")
            sys.stdout.flush()
            _write(output, rows, results)
    return _write(output, rows, results)


def cycle() -> tuple[str, float]:
    """One alignment by all methods, its evaluation, and what saved and loaded parts give."""
    folder = Path(tempfile.mkdtemp(prefix="soak-memory-"))
    try:
        kills.align(folder / "run", folder / "result.safetensors")
        pipeline = make_trainer("iql", kills.episodes()).pipeline
        pipeline.save_pretrained(folder / "pipeline")
        loaded = load_pipeline(folder / "pipeline")
        result = evaluate_on_task(
            get_task("nav1d-full"),
            loaded,
            "policy",
            first_seed=0,
            num_episodes=16,
            num_candidates=2,
            action_selection="greedy",
        )
        assert all(torch.equal(v, loaded.denoiser.state_dict()[k]) for k, v in pipeline.denoiser.state_dict().items())
        return checkpoint.record_of(folder / "result.safetensors").sha256, result.statistics.mean
    finally:
        shutil.rmtree(folder)


def _write(output: Path, rows: list[dict[str, Any]], results: set[tuple[str, float]]) -> bool:
    """Add to the results; the first cycles are left out, in which libraries and allocators fill up."""
    used = rows[WARM_UP:]
    quarter = len(used) // 4 + 1
    first, last = (sum(row["bytes"] for row in part) / quarter for part in (used[:quarter], used[-quarter:]))
    growth, files = last / first - 1, {row["files"] for row in used}
    is_flat = abs(growth) <= TOLERANCE and len(files) == 1 and len(results) == 1
    minutes = rows[-1]["seconds"] / 60
    same = "the same result each time" if len(results) == 1 else f"{len(results)} different results"
    text = (
        f"Memory: {len(rows)} cycles of align, evaluate, save and load in one process in {minutes:.0f} minutes; "
        f"resident memory {growth:+.1%} from the first to the last quarter, open files {min(files)} to {max(files)}, "
        f"{same}."
    )
    content: dict[str, Any] = checkpoint.load_json(output) if output.is_file() else {}
    content["memory"] = {"text": text, "growth": growth, "minutes": minutes, "cycles": len(rows), "ok": is_flat}
    checkpoint.save_json(output, content)
    return is_flat


def open_files() -> int:
    """Of this process."""
    return len(os.listdir("/proc/self/fd"))
