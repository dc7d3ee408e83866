"""Aggregates over tasks against figures by hand, against scipy, and from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from huggingface_hub import ModelCard

from dmc_hub.aggregation import (
    SETTINGS,
    TaskResults,
    aggregate,
    iqm_score,
    mean_score,
    median_score,
    optimality_gap,
    probability_of_improvement,
    relative_gain,
    share_of_std,
)
from dmc_hub.cli import main

# runs × tasks
SCORES = np.array([[0.0, 0.5, 2.0, 0.75], [0.25, 0.5, 1.0, 0.25]])


def results(name: str, means: dict[str, list[float]], num_episodes: int = 8, spread: float = 0.0) -> TaskResults:
    """Runs of given mean scores, whose episodes lie `spread` above and below; returns are 10 times the scores."""
    around = spread * np.resize([1.0, -1.0], num_episodes)
    scores = {setting: [mean + around for mean in means[setting]] for setting in SETTINGS}
    return TaskResults(name, scores, {s: [10 * run for run in runs] for s, runs in scores.items()})


def constant(
    before: float, control: float, after: float, best_after: float, num_runs: int = 2
) -> dict[str, list[float]]:
    return {s: [m] * num_runs for s, m in zip(SETTINGS, (before, control, after, best_after), strict=True)}


def test_aggregates_by_hand() -> None:
    assert mean_score(SCORES) == pytest.approx(5.25 / 8)
    assert median_score(SCORES) == pytest.approx(0.5)  # of 0.125, 0.5, 1.5, 0.5
    # sorted 0, .25, .25, .5, .5, .75, 1, 2: the middle half is .25, .5, .5, .75
    assert iqm_score(SCORES) == pytest.approx(0.5)
    assert optimality_gap(SCORES) == pytest.approx((1 + 0.5 + 0 + 0.25 + 0.75 + 0.5 + 0 + 0.75) / 8)
    assert optimality_gap(SCORES, gamma=2.0) == pytest.approx(2 - 5.25 / 8)
    batched = np.stack([SCORES, 2 * SCORES])
    for measure in (mean_score, median_score, iqm_score):
        np.testing.assert_allclose(measure(batched), [measure(SCORES), 2 * measure(SCORES)])


def test_probability_of_improvement_is_that_of_mann_and_whitney() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 5, (4, 3)).astype(float), rng.integers(0, 5, (6, 3)).astype(float)
    expected = [scipy.stats.mannwhitneyu(ours[:, i], theirs[:, i]).statistic / 24 for i in range(3)]
    assert probability_of_improvement(ours, theirs) == pytest.approx(np.mean(expected))
    both = probability_of_improvement(np.stack([ours, ours + 9]), np.stack([theirs, theirs]))
    np.testing.assert_allclose(both, [np.mean(expected), 1.0])


def test_gain_and_spread_by_hand() -> None:
    assert relative_gain(np.array([[3.0, 8.0], [1.0, 8.0]]), np.array([[1.0, 4.0], [1.0, 6.0]])) == pytest.approx(
        ((2 / 1 - 1) + (8 / 5 - 1)) / 2
    )
    runs = np.array([[1.0, 3.0, 3.0], [5.0, 5.0, 7.0]])
    found = share_of_std(runs.mean(1)[:, None], np.square(runs).mean(1)[:, None])
    assert found == pytest.approx(runs.std() / runs.mean())


def test_all_settings_are_aggregated() -> None:
    tasks = [
        results("a", constant(0.2, 0.4, 0.6, 0.9), spread=0.1),
        results("b", constant(0.4, 0.4, 0.8, 0.3)),
        results("c", constant(-0.1, 0.1, 0.4, 0.3)),
    ]
    found = aggregate(tasks, num_resamples=500)
    assert (found["num_tasks"], found["num_runs"]) == (3, 2)
    mean = found["aggregates"]["mean"]
    assert [mean[setting]["value"] for setting in SETTINGS] == pytest.approx([0.5 / 3, 0.3, 0.6, 0.5])
    assert found["aggregates"]["optimality gap"]["after"]["value"] == pytest.approx(0.4)
    improved = found["probability_of_improvement"]
    assert (improved["after"]["value"], improved["best_after"]["value"]) == pytest.approx((1.0, 2 / 3))
    assert found["tasks_with_gain"] == ["a", "b"]  # where all means are positive
    assert found["relative_gain"]["after"]["value"] == pytest.approx((2 + 1) / 2)
    assert found["relative_gain"]["control"]["value"] == pytest.approx((1 + 0) / 2)
    assert found["share_of_std"]["before"]["value"] == pytest.approx((0.1 / 0.2 + 0) / 2)
    for setting in SETTINGS:
        assert mean[setting]["low"] < mean[setting]["value"] < mean[setting]["high"]
    assert found == aggregate(tasks, num_resamples=500)


def test_intervals_are_those_of_episodes_with_one_seed() -> None:
    """The mean of 100 episodes of standard deviation 0.5: 1.96 * 0.05."""
    one = aggregate([results("a", constant(1, 1, 1, 1, num_runs=1), num_episodes=100, spread=0.5)], num_resamples=4000)
    interval = one["aggregates"]["mean"]["after"]
    assert (interval["low"], interval["high"]) == pytest.approx((1 - 0.098, 1 + 0.098), abs=0.012)


def test_intervals_are_stratified_and_draw_training_seeds() -> None:
    """Two runs at 0 and 1: the mean of two draws is 0, 1/2, 1 with chances 1/4, 1/2, 1/4; tasks never mix."""
    apart = constant(1, 1, 1, 1) | {"after": [0.0, 1.0]}
    found = aggregate([results("a", apart), results("b", constant(5, 5, 5, 5))], num_resamples=4000)
    interval = found["aggregates"]["mean"]["after"]
    assert (interval["low"], interval["value"], interval["high"]) == pytest.approx((2.5, 2.75, 3.0))
    assert found["aggregates"]["mean"]["before"]["low"] == pytest.approx(3.0)
    assert found["tasks_with_gain"] == ["b"]  # the mean of a may be 0


def test_settings_are_drawn_alike() -> None:
    """After is before and 1 more in every episode: the difference has no spread, whatever is drawn."""
    rng = np.random.default_rng(0)
    before = [rng.normal(10, 3, 20) for _ in range(3)]
    scores = {"before": before, "control": before, "after": [2 * run for run in before], "best_after": before}
    gain = aggregate([TaskResults("a", scores, scores)], num_resamples=200)["relative_gain"]["after"]
    assert (gain["low"], gain["high"]) == pytest.approx((1.0, 1.0))


def test_what_cannot_be_aggregated_is_refused() -> None:
    two, three = constant(1, 1, 1, 1), constant(1, 1, 1, 1, num_runs=3)
    with pytest.raises(ValueError, match="`results` is empty"):
        aggregate([])
    with pytest.raises(ValueError, match=r"holds \['a'\] twice"):
        aggregate([results("a", two), results("a", two)])
    with pytest.raises(ValueError, match=r"as many training seeds for every task, got \{'a': 2, 'b': 3\}"):
        aggregate([results("a", two), results("b", three)])
    short = results("a", two)
    uneven = {**short.scores, "after": [run[:-1] for run in short.scores["after"]]}
    with pytest.raises(ValueError, match="of a: the settings differ in the episodes"):
        aggregate([TaskResults("a", uneven, short.returns)])


def summary(task: str, scale: float) -> dict[str, Any]:
    lists = {name: [[scale * v for v in row] for row in rows] for name, rows in VALUES.items()}
    scores = {name: [[v / 10 for v in row] for row in rows] for name, rows in VALUES.items()}

    def part(name: str) -> dict[str, Any]:
        return {
            "num_candidates": 4,
            "mean": float(np.mean(lists[name])),
            "returns": lists[name],
            "scores": scores[name],
        }

    return {
        "task": task,
        "controller": "planner",
        "metric": "return",
        "return_before": part("before")["mean"],
        "return_after": part("after")["mean"],
        "returns_before": lists["before"],
        "returns_after": lists["after"],
        "scores_before": scores["before"],
        "scores_after": scores["after"],
        "best_of_n_control": part("control"),
        "best_of_n_after": part("best_after"),
    }


VALUES = {"before": [[1.0, 3.0]], "control": [[2.0, 4.0]], "after": [[4.0, 6.0]], "best_after": [[6.0, 8.0]]}


def test_the_command_writes_table_card_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, scale in zip(paths, (1.0, 100.0), strict=True):
        path.write_text(json.dumps(summary(path.stem, scale)))
    command = ["aggregate", "--results", *map(str, paths), "--output-dir", str(tmp_path / "out")]
    assert main(command) == 0
    assert "2 tasks, IQM of the score: 0.200 → 0.500, control 0.300" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "aggregate.json").read_text())
    assert found["tasks"] == ["a planner", "b planner"]
    assert found["relative_gain"]["after"]["value"] == pytest.approx(1.5)
    card = (tmp_path / "out" / "aggregate.md").read_text()
    assert ModelCard(card).data.get("license") == "apache-2.0"
    assert "| IQM score | 0.200 [" in card
    assert "| relative gain over before |  | 50.0% [" in card
    assert "| b | planner | return | 200.00 | 300.00 | 500.00 | 700.00 |" in card
    assert "With one seed the intervals say nothing of training." in card
    assert (tmp_path / "out" / "aggregate.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in card

    paths[1].write_text(json.dumps({**summary("b", 1.0), "scores_before": None}))
    assert main(command) == 2
    assert "'b' has no scores that compare with other tasks'" in capsys.readouterr().err
    paths[1].write_text('{"cells": []}')
    assert main(command) == 2
    assert f"`{paths[1]}` is not a summary of runs, it lacks ['task'," in capsys.readouterr().err
    paths[1].write_text("[")
    assert main(command) == 2
    assert "is not JSON" in capsys.readouterr().err
