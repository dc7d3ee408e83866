"""What each alignment method adds: alone, in pairs, in sequence, with a cascade, and all at once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmc_hub import checkpoint, plots
from dmc_hub.cards import results_card
from dmc_hub.foundations import shared_foundation
from dmc_hub.presets import PRESETS, Preset
from dmc_hub.recipes import align_task, finished_report
from dmc_hub.report import learning_curve
from dmc_hub.run_settings import OnlineSettings, RunSettings, run_environment

MAX_PASSES = 10
VARIANTS = (
    "rl",
    "dpo",
    "sft",
    "rl+dpo",
    "rl+sft",
    "dpo+sft",
    "sequence",
    "sequence+cascade",
    "sequence+online",
    "joint",
)
CONTROLLERS = ("planner", "policy")
ONLINE = OnlineSettings(
    num_episodes=64,
    buffer_size=4096,
    num_candidates=1,
    action_selection="greedy",
    critic_steps=1000,
    num_workers=0,
    worker_timeout=60.0,
)


def ablate_alignment(
    output_dir: Path,
    *,
    controllers: Sequence[str] = CONTROLLERS,
    variants: Sequence[str] = VARIANTS,
    seeds: Sequence[int],
    training_scale: float,
    num_episodes: int,
    task: str = "nav1d-full",
) -> list[dict[str, Any]]:
    """Align one foundation in every way and write nav1d-ablation.{json,png} and a card, nav1d-ablation.md.

    Every variant goes on until a pass gains less than one per cent. `rl` is the preset's method of reinforcement
    learning, `joint` the sum of the three losses (`JointTrainer`), one stage of it as long as a pass of the sequence.
    Finished runs are found again; processes that work on different controllers or seeds may share the folder.

    Args:
        output_dir: one folder per run, and the results.
        controllers: of `CONTROLLERS`.
        variants: of `VARIANTS`.
        seeds: training seeds.
        training_scale: factor on all numbers of training steps.
        num_episodes: evaluation episodes of each run.
        task: id of the task.

    Returns:
        One row per controller and variant, means over the seeds.
    """
    for name, values, known in (("controllers", controllers, CONTROLLERS), ("variants", variants, VARIANTS)):
        if not values or set(values) - set(known):
            raise ValueError(f"`{name}` must be among {', '.join(known)}; got {', '.join(values) or 'none'}.")
    rows: list[dict[str, Any]] = []
    for controller in controllers:
        preset = PRESETS[task](controller, "ddpm")
        for variant in variants:
            reports = []
            for seed in seeds:
                settings = _settings(task, controller, preset, variant, seed, training_scale, num_episodes)
                reports.append(_report(settings, output_dir, variant))
            rows.append(_row(controller, variant, reports, seeds))
            _write(output_dir, rows, task, training_scale, num_episodes)
    return rows


def variant_methods(variant: str, preset: Preset) -> tuple[str, ...]:
    """The methods of one pass."""
    if variant.startswith("sequence"):
        return preset.methods
    return tuple(preset.methods[0] if name == "rl" else name for name in variant.split("+"))


def _settings(
    task: str, controller: str, preset: Preset, variant: str, seed: int, training_scale: float, num_episodes: int
) -> RunSettings:
    return RunSettings(
        task=task,
        controller=controller,
        sampler="ddpm",
        seed=seed,
        methods=variant_methods(variant, preset),
        max_passes=MAX_PASSES,
        min_gain=0.01,
        validations_per_stage=4,
        num_retries=1,
        max_coherency_drop=preset.max_coherency_drop,
        num_candidates=preset.num_candidates,
        num_validation_episodes=64,
        num_evaluation_episodes=num_episodes,
        training_scale=training_scale,
        num_upsampling_passes=int(variant in ("sequence", "sequence+cascade")),  # one run serves both rows
        online=ONLINE if variant.endswith("+online") else None,
    )


def _report(settings: RunSettings, output_dir: Path, variant: str) -> dict[str, Any]:
    name = variant.partition("+cascade")[0]
    folder = output_dir / f"{settings.controller}-{name}-{settings.seed}"
    finished = finished_report(settings, folder)
    if finished is not None:
        return finished
    settings = dataclasses.replace(settings, foundation=str(shared_foundation(settings, output_dir)))
    quick = "" if settings.training_scale == 1.0 else " --quick"
    words = f"--controllers {settings.controller} --variants {variant} --seeds {settings.seed}{quick}"
    return align_task(settings, folder, command=f"dmc-hub ablate-alignment --output-dir runs/ablation {words}")


def _row(controller: str, variant: str, reports: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    passes = int(variant.endswith("+cascade"))
    many = reports[0]["num_candidates"]
    one, best = ([_evaluation(report, candidates, passes) for report in reports] for candidates in (1, many))
    stages = [[row for row in report["stages"] if row["stage"] > 0] for report in reports]
    ends = [_final_stage(report["stages"]) for report in reports]

    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    return {
        "controller": controller,
        "variant": variant,
        "return_before": mean(row["before"]["mean"] for row in one),
        "return_after": mean(row["after"]["mean"] for row in one),
        "std_before": mean(row["before"]["std"] for row in one),
        "std_after": mean(row["after"]["std"] for row in one),
        "returns_after_by_seed": [row["after"]["mean"] for row in one],
        "gain": mean(row["after"]["mean"] / row["before"]["mean"] - 1 for row in one),
        "num_candidates": many,
        "best_of_many_before": mean(row["before"]["mean"] for row in best),
        "best_of_many_after": mean(row["after"]["mean"] for row in best),
        "coherency_before": mean(row["coherency_before"] for row in one),
        "coherency_after": mean(row["coherency_after"] for row in one),
        "diversity_before": mean(row["diversity_before"] for row in best),
        "diversity_after": mean(row["diversity_after"] for row in best),
        "divergence": mean(stage["divergence"] for stage in ends),
        "num_steps": mean(sum(stage["num_steps"] for stage in rows) for rows in stages),
        "seconds": mean(sum(stage["wall_seconds"] for stage in rows) for rows in stages),
        "seeds": list(seeds),
        "curves": [learning_curve(report["stages"]) for report in reports],
    }


def _evaluation(report: Mapping[str, Any], num_candidates: int, passes: int) -> Mapping[str, Any]:
    rows: list[Mapping[str, Any]] = report["evaluations"]
    return next(
        row
        for row in rows
        if (row["action_selection"], row["num_candidates"], row["num_upsampling_passes"])
        == ("greedy", num_candidates, passes)
    )


def _final_stage(stages: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The stage whose state the aligner ended with."""
    return max((row for row in stages if row["decision"] != "rolled back"), key=lambda row: row["return_mean"])


def _write(output_dir: Path, rows: list[dict[str, Any]], task: str, training_scale: float, num_episodes: int) -> None:
    results = {"task": task, "training_scale": training_scale, "episodes": num_episodes, "rows": rows}
    checkpoint.write_text(output_dir / "nav1d-ablation.json", json.dumps(results, indent=2) + "\n")
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    choice = "" if variants == list(VARIANTS) else f" --variants {' '.join(variants)}"
    plots.plot_ablation(rows, output_dir / "nav1d-ablation.png")
    lines = [
        "| controller | variant | one candidate | gain | best of many | coherency | diversity | KL | steps |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in rows),
    ]
    card: dict[str, Any] = {
        "title": "Nav1D: what each alignment method adds",
        "introduction": f"Every variant aligns the same foundations on {task}, {len(rows[0]['seeds'])} training "
        f"seed(s), {num_episodes} evaluation episodes each, and stops by itself when a pass gains less than 1 % (a "
        "stage of `joint` is as long as a pass of the sequence). ± is the standard deviation over episodes, mean over "
        "the training seeds.",
        "command": f"dmc-hub ablate-alignment --output-dir runs/nav1d-ablation --num-episodes {num_episodes}"
        f"{choice}{'' if training_scale == 1 else ' --quick'}",
        "table": "\n".join(lines),
        "notes": [
            "`best of many`: 16 candidates of a planner, 8 of a policy, the best by the critic.",
            "`diversity`: standard deviation of the candidates; `KL`: of the denoising path to the foundation's, nats "
            "per entry.",
        ],
        "picture": "nav1d-ablation.png",
    }
    checkpoint.write_text(output_dir / "nav1d-ablation.md", results_card(**card, **run_environment()))


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"| {row['controller']} | {row['variant']} | {row['return_before']:.2f} ± {row['std_before']:.2f} → "
        f"**{row['return_after']:.2f}** ± {row['std_after']:.2f} | {row['gain']:+.0%} | "
        f"{row['best_of_many_before']:.2f} → {row['best_of_many_after']:.2f} | "
        f"{row['coherency_before']:.3f} → {row['coherency_after']:.3f} | "
        f"{row['diversity_before']:.2f} → {row['diversity_after']:.2f} | "
        f"{row['divergence']:.2f} | {row['num_steps']:.0f} |"
    )
