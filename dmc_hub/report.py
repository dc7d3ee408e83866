"""What a run leaves behind: report.json, and what is computed from it: report.md, plots and the model card."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from huggingface_hub import EvalResult, ModelCardData

from dmc_hub import plots


def write_report(folder: Path, report: Mapping[str, Any], *, paths_before: np.ndarray, paths_after: np.ndarray) -> None:
    """Write report.json, report.md, the plots, and the model card as README.md; report.json last.

    Args:
        folder: the run's folder.
        report: JSON-ready; see `dmc_hub.recipes.align_task`.
        paths_before: observations visited by the evaluated episodes, `(episodes, steps + 1, observation_dim)`.
        paths_after: the same after alignment.
    """
    main = report["evaluations"][report["main_evaluation"]]
    stages = [{**row, "label": _label(row)} for row in report["stages"]]
    plots.plot_learning_curve(
        stages, folder / "learning_curve.png", baseline=report["return_data"], optimum=report["return_optimal"]
    )
    plots.plot_diversity_front(stages, folder / "diversity.png", report["min_diversity"])
    plots.plot_nav1d_trajectories(paths_before[..., 0], paths_after[..., 0], folder / "trajectories.png")
    plots.plot_return_histogram(
        np.asarray(main["returns_before"]), np.asarray(main["returns_after"]), folder / "returns.png"
    )
    _write(folder / "report.md", render("report.md.jinja", report))
    _write(folder / "README.md", render("adapter.md.jinja", {**report, "metadata": card_metadata(report)}))
    _write(folder / "report.json", json.dumps(report, indent=2) + "\n")


def card_metadata(report: Mapping[str, Any]) -> str:
    """The YAML header of the model card, validated by huggingface_hub's own classes."""
    data = ModelCardData(
        library_name="diffusers",
        license="apache-2.0",
        pipeline_tag="reinforcement-learning",
        tags=["dmc_hub", "lora", "diffusion", "offline-rl", report["controller"]],
        model_name=f"{report['task']}-{report['controller']}",
        eval_results=[
            EvalResult(
                task_type="reinforcement-learning",
                task_name="Reinforcement learning",
                dataset_type=report["task"],
                dataset_name=report["task"],
                metric_type="mean_reward",
                metric_name="mean return",
                metric_value=f"{report['return_after']:.2f} +/- {report['std_after']:.2f}",
            )
        ],
    )
    return data.to_yaml()


def _label(stage: Mapping[str, Any]) -> str:
    """In brackets on the learning curve: a stage that was rolled back, whose return is that of what was discarded."""
    return f"({stage['name']})" if stage["decision"] == "rolled back" else str(stage["name"])


def render(template: str, values: Mapping[str, Any]) -> str:
    """Fill a template of `dmc_hub/model_cards`; a value that it misses is an error."""
    source = (resources.files("dmc_hub.model_cards") / template).read_text()
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(source).render(**values)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
