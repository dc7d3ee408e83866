"""The Nav1D rows of the paper's Tables 2 and 3, run cell by cell and set beside the published figures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import gymnasium
import numpy as np

from dmc_hub import checkpoint, plots
from dmc_hub.cards import results_card
from dmc_hub.envs import NAV1D_ID, nav1d
from dmc_hub.foundations import shared_foundation
from dmc_hub.presets import PRESETS
from dmc_hub.recipes import align_task, finished_report
from dmc_hub.run_settings import RunSettings, run_environment

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


def reproduce_nav1d(
    output_dir: Path,
    *,
    datasets: Sequence[str] = DATASETS,
    seeds: Sequence[int],
    training_scale: float,
    num_episodes: int,
) -> list[dict[str, Any]]:
    """Run every cell with every seed and write nav1d-table.{json,png} and a card, nav1d-table.md.

    Finished runs are found again.

    Samplers that train the same network share it (DDPM and DDIM), and all controllers share one critic per dataset and
    seed, the one of the DDPM planner. Processes that work on different datasets or seeds may share the folder; a last
    call for all of them finds their runs and writes the whole table.

    Args:
        output_dir: one folder per run, and the table.
        datasets: of `DATASETS`.
        seeds: training seeds.
        training_scale: factor on all numbers of training steps.
        num_episodes: evaluation episodes of each run.

    Returns:
        One row per cell: the means over the training seeds, and the paper's figures.
    """
    unknown = set(datasets) - set(DATASETS)
    if unknown or not datasets:
        raise ValueError(f"`datasets` must be among {', '.join(DATASETS)}; got {', '.join(datasets) or 'none'}.")
    rows = []
    for dataset in datasets:
        cells = [cell for cell in table_cells() if cell.dataset == dataset]
        reports = {
            (cell, seed): _report(cell, output_dir, seed, training_scale, num_episodes)
            for seed in seeds
            for cell in cells
        }
        rows += [_row(cell, [reports[cell, seed] for seed in seeds], seeds) for cell in cells]
        if rows:
            _write(output_dir, rows, training_scale, num_episodes)
    return rows


def _report(cell: Cell, output_dir: Path, seed: int, training_scale: float, num_episodes: int) -> dict[str, Any]:
    settings = _settings(cell, seed, training_scale, num_episodes)
    folder = output_dir / f"{cell.controller}-{cell.sampler}-{cell.dataset}-{seed}"
    finished = finished_report(settings, folder)
    if finished is not None:
        return finished
    settings = dataclasses.replace(settings, foundation=str(shared_foundation(settings, output_dir)))
    quick = "" if training_scale == 1.0 else " --quick"
    command = f"dmc-hub reproduce-nav1d --output-dir runs/nav1d-table --datasets {cell.dataset} --seeds {seed}{quick}"
    return align_task(settings, folder, command=command)


def _settings(cell: Cell, seed: int, training_scale: float, num_episodes: int) -> RunSettings:
    task = f"nav1d-{cell.dataset}"
    preset = PRESETS[task](cell.controller, cell.sampler)
    return RunSettings(
        task=task,
        controller=cell.controller,
        sampler=cell.sampler,
        seed=seed,
        methods=preset.methods,
        max_passes=1,
        min_gain=0.0,
        validations_per_stage=4,
        num_retries=1,
        max_coherency_drop=preset.max_coherency_drop,
        num_candidates=preset.num_candidates,
        num_validation_episodes=64,
        num_evaluation_episodes=num_episodes,
        training_scale=training_scale,
    )


def _row(cell: Cell, reports: list[dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    evaluations = [
        next(
            row
            for row in report["evaluations"]
            if row["action_selection"] == cell.selection and row["num_candidates"] == report["num_candidates"]
        )
        for report in reports
    ]
    optimal = [_optimal_returns(report["seeds"]) for report in reports]

    def mean(when: str, statistic: str) -> float:
        return float(np.mean([row[when][statistic] for row in evaluations]))

    def regret_std(when: str) -> float:
        pairs = zip(optimal, evaluations, strict=True)
        return float(np.mean([np.std(best - np.asarray(row[f"returns_{when}"])) for best, row in pairs]))

    return {
        **dataclasses.asdict(cell),
        "return_before": mean("before", "mean"),
        "return_after": mean("after", "mean"),
        "std_before": mean("before", "std"),
        "std_after": mean("after", "std"),
        "regret_std_before": regret_std("before"),
        "regret_std_after": regret_std("after"),
        "one_candidate_before": float(np.mean([report["evaluations"][0]["before"]["mean"] for report in reports])),
        "one_candidate_after": float(np.mean([report["evaluations"][0]["after"]["mean"] for report in reports])),
        "one_candidate_std_before": float(np.mean([report["evaluations"][0]["before"]["std"] for report in reports])),
        "one_candidate_std_after": float(np.mean([report["evaluations"][0]["after"]["std"] for report in reports])),
        "returns_after_by_seed": [row["after"]["mean"] for row in evaluations],
        "share_of_optimum": mean("after", "share_of_optimum"),
        "optimal_return": float(np.mean(optimal)),
        "optimal_std": float(np.mean([returns.std() for returns in optimal])),
        "seeds": list(seeds),
    }


def _optimal_returns(seeds: Iterable[int]) -> np.ndarray:
    """The best return that each episode's start permits: what is left of the spread of returns when it is taken off
    them is the controller's own doing."""
    env = gymnasium.make(NAV1D_ID)
    starts = [float(env.reset(seed=seed)[0][0]) for seed in seeds]
    solution = nav1d.optimal_value_function()
    return cast(np.ndarray, np.interp(starts, solution.positions, solution.values[0]))


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the cells come to: how many reach the paper's figure, share of the optimum, spread of the returns.

    The spread is the standard deviation over the mean return, averaged over the planning cells (in the paper's abstract
    it falls from 38.1 % to 5.3 % over its tasks).
    """
    planners = [row for row in rows if row["controller"] != "policy"]
    policies = [row for row in rows if row["controller"] == "policy"]
    covered = [row["share_of_optimum"] for row in planners if row["dataset"] != "partial"]

    def spread(std: str, mean: str, when: str) -> float | None:
        return _mean([row[f"{std}_{when}"] / row[f"{mean}_{when}"] for row in planners])

    return {
        "planning_cells": len(planners),
        "planning_cells_at_paper": sum(row["return_after"] >= row["paper_after"] for row in planners),
        "policy_cells": len(policies),
        "policy_cells_at_paper": sum(row["return_after"] >= row["paper_after"] for row in policies),
        "share_of_optimum_full_expert": _mean(covered),
        "spread_of_optimum": _mean([row["optimal_std"] / row["optimal_return"] for row in planners]),
        **{
            f"{name}_{when}": spread(std, mean, when)
            for when in ("before", "after")
            for name, std, mean in (
                ("spread", "std", "return"),
                ("spread_one_candidate", "one_candidate_std", "one_candidate"),
                ("spread_of_regret", "regret_std", "return"),
            )
        },
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _write(output_dir: Path, rows: list[dict[str, Any]], training_scale: float, num_episodes: int) -> None:
    results = {"training_scale": training_scale, "episodes": num_episodes, "summary": summary(rows), "cells": rows}
    checkpoint.write_text(output_dir / "nav1d-table.json", json.dumps(results, indent=2) + "\n")
    plots.plot_table(rows, output_dir / "nav1d-table.png", optimum=nav1d.optimal_return())
    card: dict[str, Any] = {
        "title": "Nav1D: planners and policies before and after alignment",
        "introduction": f"The Nav1D cells of Tables 2 and 3 of arXiv:2502.12198, {len(rows[0]['seeds'])} training "
        f"seed(s), {num_episodes} evaluation episodes each: 16 candidates for planners, 8 for policies, before and "
        "after one pass of alignment. ± is the standard deviation over episodes, mean over the training seeds.",
        "command": "dmc-hub reproduce-nav1d --output-dir runs/nav1d-table"
        + ("" if training_scale == 1 else " --quick"),
        "table": _table(rows),
        "notes": _notes(summary(rows)),
        "picture": "nav1d-table.png",
    }
    checkpoint.write_text(output_dir / "nav1d-table.md", results_card(**card, **run_environment()))


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| controller | sampler | selection | data | before | after | one candidate | std of regret | paper |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in rows),
    ]
    return "\n".join(lines)


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"| {row['controller']} | {row['sampler']} | {row['selection']} | {row['dataset']} | "
        f"{row['return_before']:.2f} ± {row['std_before']:.2f} | "
        f"**{row['return_after']:.2f}** ± {row['std_after']:.2f} | "
        f"{row['one_candidate_before']:.2f} → {row['one_candidate_after']:.2f} | "
        f"{row['regret_std_before']:.2f} → {row['regret_std_after']:.2f} | "
        f"{row['paper_before']} → {row['paper_after']} |"
    )


def _notes(figures: Mapping[str, Any]) -> list[str]:
    notes = [
        f"At the paper's figure or above: {figures['planning_cells_at_paper']} of {figures['planning_cells']} planning "
        f"cells, {figures['policy_cells_at_paper']} of {figures['policy_cells']} policy cells."
    ]
    if figures["share_of_optimum_full_expert"] is not None:
        notes.append(
            f"Planners on full and expert data earn {figures['share_of_optimum_full_expert']:.1%} of the optimum."
        )
    if figures["spread_before"] is not None:
        notes += [
            f"Standard deviation of the return over its mean, planners: {figures['spread_before']:.1%} → "
            f"{figures['spread_after']:.1%}, with one candidate {figures['spread_one_candidate_before']:.1%} → "
            f"{figures['spread_one_candidate_after']:.1%}; of the optimum, by the start alone: "
            f"{figures['spread_of_optimum']:.1%}.",
            f"What is left when the best return that each start permits is taken off (regret): "
            f"{figures['spread_of_regret_before']:.1%} → {figures['spread_of_regret_after']:.1%}.",
        ]
    return notes
