"""What a run leaves behind: report.json, and what is computed from it: report.md, plots and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmc_hub import cards, checkpoint, plots
from dmc_hub.critic_diagnostics import CriticDiagnostics


def write_report(
    folder: Path,
    report: Mapping[str, Any],
    *,
    paths_before: np.ndarray,
    paths_after: np.ndarray,
    critic: CriticDiagnostics,
) -> None:
    """Write report.json, report.md, the plots, and the model card as README.md; report.json last.

    Args:
        folder: the run's folder.
        report: JSON-ready; see `dmc_hub.recipes.align_task`.
        paths_before: observations visited by the evaluated episodes, `(episodes, steps + 1, observation_dim)`.
        paths_after: the same after alignment.
        critic: its values and the data's returns.
    """
    main = report["evaluations"][report["main_evaluation"]]
    stages = [{**row, "label": _label(row)} for row in report["stages"]]
    plots.plot_learning_curve(
        stages,
        folder / "learning_curve.png",
        baseline=report["return_data"] if report["metric"] == "return" else None,
        optimum=report["return_optimal"],
    )
    plots.plot_diversity_front(stages, folder / "diversity.png", report["min_diversity"])
    if report["task"].startswith("nav1d-"):
        plots.plot_nav1d_trajectories(paths_before[..., 0], paths_after[..., 0], folder / "trajectories.png")
    plots.plot_return_histogram(
        np.asarray(main["returns_before"]), np.asarray(main["returns_after"]), folder / "returns.png"
    )
    plots.plot_critic(critic.returns_to_go, critic.q, folder / "critic.png")
    checkpoint.write_text(folder / "report.md", cards.render("report.md.jinja", report))
    checkpoint.write_text(folder / "README.md", cards.adapter_card(report, pictures=list(cards.pictures_in(folder))))
    checkpoint.write_text(folder / cards.REPORT_NAME, json.dumps(report, indent=2) + "\n")


def learning_curve(stages: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Validated return over the optimizer steps of all stages, `(step, return)`."""
    curve, start = [(0, float(stages[0]["return_mean"]))], 0
    for stage in stages[1:]:
        validated = sorted(stage["validations"], key=lambda row: row["step"])  # those of a bisection come last
        curve += [(start + row["step"], float(row["return_mean"])) for row in validated]
        start += stage["num_steps"]
    return curve


def _label(stage: Mapping[str, Any]) -> str:
    """In brackets on the learning curve: a stage that was rolled back, whose return is that of what was discarded, or
    skipped."""
    return f"({stage['name']})" if stage["decision"] in ("rolled back", "skipped") else str(stage["name"])
