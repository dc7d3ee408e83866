"""The Nav1D rows of the paper's Tables 2 and 3, run cell by cell and set beside the published figures."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmc_hub import checkpoint
from dmc_hub.presets import PRESETS
from dmc_hub.recipes import RunSettings, align_task

DATASETS = ("partial", "full", "expert")
PAPER_PLANNERS: dict[tuple[str, str], tuple[tuple[float, float], ...]] = {
    ("planner", "ddpm"): ((2.1, 4.3), (3.2, 6.9), (6.2, 7.3)),
    ("planner", "ddim"): ((1.9, 3.3), (4.3, 7.3), (5.9, 7.2)),
    ("planner", "sm"): ((2.5, 4.1), (2.9, 6.9), (5.9, 7.2)),
    ("planner", "fm"): ((2.3, 5.2), (3.9, 6.8), (6.4, 7.1)),
    ("decision_diffuser", "ddpm"): ((2.0, 3.9), (3.3, 6.9), (6.2, 7.2)),
}
"""Table 2 of arXiv:2502.12198, Nav1D: return before and after for each dataset; 16 roll-outs, greedy."""
PAPER_POLICY: dict[str, tuple[tuple[float, float], ...]] = {
    "expectation": ((1.10, 3.91), (1.32, 5.98), (5.43, 5.80)),
    "greedy": ((2.69, 4.42), (4.61, 6.24), (6.89, 7.06)),
}
"""Table 3, Nav1D, 8 candidates; the paper's IDQL column is greedy in Q (its section 4.2)."""


@dataclass(frozen=True)
class Cell:
    """One cell of the tables: a controller on a dataset, before and after alignment."""

    controller: str
    sampler: str
    selection: str
    dataset: str
    paper_before: float
    paper_after: float


def table_cells() -> Iterator[Cell]:
    """The 15 cells of the planning table, then the 6 of the policy table."""
    for (controller, sampler), row in PAPER_PLANNERS.items():
        for dataset, figures in zip(DATASETS, row, strict=True):
            yield Cell(controller, sampler, "greedy", dataset, *figures)
    for selection, row in PAPER_POLICY.items():
        for dataset, figures in zip(DATASETS, row, strict=True):
            yield Cell("policy", "ddpm", selection, dataset, *figures)


def reproduce_nav1d(output_dir: Path, *, seeds: Sequence[int], training_scale: float, num_episodes: int) -> list[dict]:
    """Run every cell with every seed and write table.json and table.md; finished runs are found again.

    Args:
        output_dir: one folder per run, and the table.
        seeds: training seeds.
        training_scale: factor on all numbers of training steps.
        num_episodes: evaluation episodes of each run.

    Returns:
        One row per cell: the means over the training seeds, and the paper's figures.
    """
    rows = []
    for cell in table_cells():
        reports = [_report(cell, output_dir, seed, training_scale, num_episodes) for seed in seeds]
        rows.append(_row(cell, reports, seeds))
        _write(output_dir, rows, training_scale, num_episodes)
    return rows


def _report(cell: Cell, output_dir: Path, seed: int, training_scale: float, num_episodes: int) -> dict[str, Any]:
    task = f"nav1d-{cell.dataset}"
    folder = output_dir / f"{cell.controller}-{cell.sampler}-{cell.dataset}-{seed}"
    preset = PRESETS[task](cell.controller, cell.sampler)
    settings = RunSettings(
        task=task,
        controller=cell.controller,
        sampler=cell.sampler,
        seed=seed,
        methods=preset.methods,
        num_passes=2,
        num_candidates=preset.num_candidates,
        num_validation_episodes=64,
        num_evaluation_episodes=num_episodes,
        training_scale=training_scale,
    )
    finished = folder / "report.json"
    if finished.is_file() and checkpoint.load_json(folder / "settings.json") == json.loads(json.dumps(vars(settings))):
        return checkpoint.load_json(finished)
    return align_task(settings, folder)


def _row(cell: Cell, reports: list[dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    evaluations = [
        next(
            row
            for row in report["evaluations"]
            if row["action_selection"] == cell.selection and row["num_candidates"] == report["num_candidates"]
        )
        for report in reports
    ]

    def mean(when: str, statistic: str) -> float:
        return float(np.mean([row[when][statistic] for row in evaluations]))

    return {
        **dataclasses.asdict(cell),
        "return_before": mean("before", "mean"),
        "return_after": mean("after", "mean"),
        "std_before": mean("before", "std"),
        "std_after": mean("after", "std"),
        "returns_after_by_seed": [row["after"]["mean"] for row in evaluations],
        "share_of_optimum": mean("after", "share_of_optimum"),
        "seeds": list(seeds),
    }


def _write(output_dir: Path, rows: list[dict[str, Any]], training_scale: float, num_episodes: int) -> None:
    table = {"training_scale": training_scale, "episodes": num_episodes, "cells": rows}
    lines = [
        "| controller | sampler | selection | data | before | after | paper |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['controller']} | {row['sampler']} | {row['selection']} | {row['dataset']} | "
            f"{row['return_before']:.2f} ± {row['std_before']:.2f} | "
            f"**{row['return_after']:.2f}** ± {row['std_after']:.2f} | {row['paper_before']} → {row['paper_after']} |"
            for row in rows
        ),
    ]
    for name, text in (("table.json", json.dumps(table, indent=2)), ("table.md", "\n".join(lines))):
        temporary = output_dir / f".{name}.{os.getpid()}"
        temporary.write_text(text + "\n")
        os.replace(temporary, output_dir / name)
