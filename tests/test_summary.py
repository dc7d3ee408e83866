"""Runs of several training seeds as one table, card and plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from dmc_hub.cli import main
from dmc_hub.summary import summarize_runs

RETURNS = {0: ([1.0, 3.0], [4.0, 6.0], [2.0, 4.0], [5.0, 9.0]), 1: ([2.0, 2.0], [5.0, 5.0], [3.0, 3.0], [7.0, 7.0])}


def report(seed: int) -> dict[str, Any]:
    def evaluation(count: int, before: list[float], after: list[float]) -> dict[str, Any]:
        def statistics(returns: list[float]) -> dict[str, Any]:
            return {"mean": float(np.mean(returns)), "success_rate": seed / 2, "normalized_score": None}

        chosen = {"action_selection": "greedy", "num_candidates": count, "num_upsampling_passes": 0}
        returns = {"returns_before": before, "returns_after": after}
        returns |= {
            f"scores_{when}": [value / 10 for value in returns[f"returns_{when}"]] for when in ("before", "after")
        }
        return {**chosen, **returns, "before": statistics(before), "after": statistics(after)}

    before, after, best_before, best_after = RETURNS[seed]
    stage = {"return_mean": 2.0, "num_steps": 0, "validations": [], "name": "foundation", "decision": "start"}
    trained = {**stage, "name": "sft", "decision": "kept", "num_steps": 8}
    trained["validations"] = [{"step": 8, "return_mean": 5.0}, {"step": 4, "return_mean": 4.0}]
    return {
        "task": "nav1d-full",
        "controller": "policy",
        "sampler": "ddpm",
        "metric": "return",
        "score_name": None,
        "methods": "1 × (sft)",
        "command": f"dmc-hub align --task nav1d-full --seed {seed}",
        "base_fingerprint": "0" * 64,
        "pipeline_folder": "pipeline",
        "num_candidates": 8,
        "episodes": 2,
        "return_before": 3.0,
        "return_after": 7.0,
        "std_before": 1.0,
        "std_after": 1.0,
        "seed": seed,
        "seeds": [7, 8],
        "validation_seeds": [1],
        "acting": {"action_selection": "greedy", "num_candidates": 8, "return_mean": 7.0, "validated": []},
        "evaluations": [evaluation(1, before, after), evaluation(8, best_before, best_after)],
        "stages": [stage, trained],
        "return_data": 1.5,
        "data": ["walks.hdf5"],
        "wall_seconds": 9.0,
        "training_scale": 1.0,
        "machine": "a machine",
    }


def write_runs(folder: Path, *reports: dict[str, Any]) -> list[Path]:
    runs = [folder / str(index) for index in range(len(reports))]
    for run, content in zip(runs, reports, strict=True):
        run.mkdir()
        (run / "report.json").write_text(json.dumps(content))
    return runs


def test_the_episodes_of_all_seeds_are_pooled(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, report(0), report(1))
    assert main(["summarize", "--runs", *map(str, runs), "--output-dir", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "nav1d-full-policy.json").read_text())
    assert (summary["return_before"], summary["return_after"], summary["gain"]) == (2.0, 5.0, 1.5)
    assert summary["std_before"] == pytest.approx(np.std([1, 3, 2, 2]))
    assert summary["return_before_ci"][0] < 2.0 < summary["return_before_ci"][1]
    assert (summary["best_of_n_control"]["mean"], summary["best_of_n_after"]["mean"]) == (3.0, 7.0)
    assert summary["best_of_n_after"]["by_seed"] == [7.0, 7.0]
    assert (summary["success_after"], summary["normalized_score_after"]) == (0.25, None)
    assert summary["returns_before"] == [[1.0, 3.0], [2.0, 2.0]]
    assert summary["scores_after"] == [[0.4, 0.6], [0.5, 0.5]]
    assert summary["best_of_n_control"]["returns"] == [[2.0, 4.0], [3.0, 3.0]]
    assert summary["command"] == "dmc-hub align --task nav1d-full"
    assert (tmp_path / "nav1d-full-policy.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "nav1d-full-policy.md").read_text()
    assert "| one candidate | 2.00 ± 0.71 [" in card
    assert "| one candidate: success rate | 0.250 | 0.250 |\n| best of 8 by the critic: success rate | 0.250 |" in card
    assert "| 0 | 2.00 | 3.00 | 5.00 | 7.00 |\n| 1 | 2.00 | 3.00 | 5.00 | 7.00 |" in card
    assert ModelCard(card).data.get("license") == "apache-2.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"controller": "planner"}, "differ in controller"), ({"seed": 0}, "has a training seed twice")],
)
def test_runs_that_cannot_be_pooled_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        summarize_runs(write_runs(tmp_path, report(0), {**report(1), **change}), tmp_path)


def test_no_runs_and_no_report_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`runs` is empty"):
        summarize_runs([], tmp_path)
    with pytest.raises(FileNotFoundError):
        summarize_runs([tmp_path], tmp_path)
