"""Summaries of several tasks as one: rliable's aggregates before and after alignment (Agarwal et al., 2021,
arXiv:2108.13264), with the control beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from dmc_hub import cards, checkpoint, plots
from dmc_hub.evaluation import CONFIDENCE_LEVEL, NUM_RESAMPLES, interquartile_mean
from dmc_hub.run_settings import run_environment

SETTINGS = {
    "before": "before",
    "control": "best of N before, the control",
    "after": "after",
    "best_after": "best of N after",
}
_PAIRS = {"after": "before", "best_after": "control"}


@dataclass(frozen=True)
class TaskResults:
    """The episodes of one task and controller.

    Attributes:
        name: task and controller.
        scores: by setting (see `SETTINGS`), of every training seed the scores of its episodes, an expert's being 1.
        returns: the same of what was aligned for, in its own unit.
    """

    name: str
    scores: Mapping[str, Sequence[np.ndarray]]
    returns: Mapping[str, Sequence[np.ndarray]]


def mean_score(scores: np.ndarray) -> np.ndarray:
    """Mean over tasks and runs of scores `(..., num_runs, num_tasks)`."""
    return cast(np.ndarray, scores.mean(axis=(-2, -1)))


def median_score(scores: np.ndarray) -> np.ndarray:
    """Median over tasks of the mean over runs of scores `(..., num_runs, num_tasks)`."""
    return cast(np.ndarray, np.median(scores.mean(axis=-2), axis=-1))


def iqm_score(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half of all runs of all tasks, of scores `(..., num_runs, num_tasks)`."""
    return interquartile_mean(scores.reshape(*scores.shape[:-2], -1))


def optimality_gap(scores: np.ndarray, gamma: float = 1.0) -> np.ndarray:
    """How far runs stay below `gamma` on average, those above it counting as 0; scores `(..., num_runs, num_tasks)`."""
    return cast(np.ndarray, gamma - np.minimum(scores, gamma).mean(axis=(-2, -1)))


def probability_of_improvement(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Chance that a run of ours beats one of theirs on a task, averaged over tasks; a draw counts half.

    Args:
        ours: scores of shape `(..., num_runs, num_tasks)`.
        theirs: likewise, the number of runs may differ.
    """
    first, second = ours[..., :, None, :], theirs[..., None, :, :]
    return cast(np.ndarray, ((first > second) + 0.5 * (first == second)).mean(axis=(-3, -2, -1)))


def relative_gain(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Mean over tasks of `ours / theirs - 1`, of the means over runs of returns `(..., num_runs, num_tasks)`."""
    return cast(np.ndarray, (ours.mean(axis=-2) / theirs.mean(axis=-2) - 1.0).mean(axis=-1))


def share_of_std(means: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Mean over tasks of `std / mean` of the episodes of all runs.

    Args:
        means: of the returns of every run, `(..., num_runs, num_tasks)`.
        squares: likewise of their squares.
    """
    mean = means.mean(axis=-2)
    variance = np.maximum(squares.mean(axis=-2) - mean**2, 0.0)
    return cast(np.ndarray, (np.sqrt(variance) / mean).mean(axis=-1))


AGGREGATES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": mean_score,
    "median": median_score,
    "IQM": iqm_score,
    "optimality gap": optimality_gap,
}


def aggregate(tasks: Sequence[TaskResults], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """The aggregates of every setting, each with the limits of its 95 % interval.

    A run is a training seed, its score the mean over its evaluation episodes. Intervals are percentiles of a bootstrap
    stratified by task: of every task training seeds are drawn with replacement, and of each its episodes; the settings
    of a run are drawn alike, since they share foundation and evaluation seeds.

    Args:
        tasks: all with the same number of training seeds.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        `aggregates` by name and setting, `probability_of_improvement`, `relative_gain` (mean over the tasks of
        `mean after / mean before - 1`) and `share_of_std` (mean over the tasks of `std / mean` of the episodes), each a
        dict of `value`, `low` and `high`; and `tasks_with_gain`, the names of those that count in the last two: those
        whose means are positive in every resample.

    Raises:
        ValueError: no tasks, two of one name, different numbers of training seeds, or of episodes within a run.
    """
    _check(tasks)
    rng = np.random.default_rng(seed)
    point = _stacked([_run_means(task) for task in tasks])
    drawn = _stacked([_resampled_means(task, num_resamples, rng) for task in tasks])
    is_positive = np.all([drawn["returns", setting].mean(axis=1).min(axis=0) > 0 for setting in SETTINGS], axis=0)
    tail = 50.0 * (1.0 - CONFIDENCE_LEVEL)

    def estimate(
        measure: Callable[..., np.ndarray], *keys: tuple[str, str], kept: Any = slice(None)
    ) -> dict[str, float]:
        low, high = np.percentile(measure(*(drawn[key][..., kept] for key in keys)), [tail, 100.0 - tail])
        value = measure(*(point[key][..., kept] for key in keys))
        return {"value": float(value), "low": float(low), "high": float(high)}

    def gain(setting: str) -> dict[str, float]:
        return estimate(relative_gain, ("returns", setting), ("returns", "before"), kept=is_positive)

    def spread(setting: str) -> dict[str, float]:
        return estimate(share_of_std, ("returns", setting), ("squares", setting), kept=is_positive)

    return {
        "num_tasks": len(tasks),
        "num_runs": len(tasks[0].scores["before"]),
        "aggregates": {
            name: {setting: estimate(measure, ("scores", setting)) for setting in SETTINGS}
            for name, measure in AGGREGATES.items()
        },
        "probability_of_improvement": {
            ours: estimate(probability_of_improvement, ("scores", ours), ("scores", theirs))
            for ours, theirs in _PAIRS.items()
        },
        "relative_gain": {s: gain(s) for s in SETTINGS if s != "before"} if is_positive.any() else {},
        "share_of_std": {s: spread(s) for s in SETTINGS} if is_positive.any() else {},
        "tasks_with_gain": [task.name for task, kept in zip(tasks, is_positive, strict=True) if kept],
    }


def _stacked(means: Sequence[Mapping[tuple[str, str], np.ndarray]]) -> dict[tuple[str, str], np.ndarray]:
    """Of all tasks, behind the other dimensions."""
    return {key: np.stack([task[key] for task in means], axis=-1) for key in means[0]}


def _arrays(task: TaskResults) -> dict[tuple[str, str], Sequence[np.ndarray]]:
    """What is averaged over the episodes of every run."""
    parts = {"scores": task.scores, "returns": task.returns}
    arrays = {(name, s): [np.asarray(run, float) for run in part[s]] for name, part in parts.items() for s in SETTINGS}
    return {**arrays, **{("squares", s): [run**2 for run in arrays["returns", s]] for s in SETTINGS}}


def _run_means(task: TaskResults) -> dict[tuple[str, str], np.ndarray]:
    """Of every run, `(num_runs,)`."""
    return {key: np.array([run.mean() for run in runs]) for key, runs in _arrays(task).items()}


def _resampled_means(
    task: TaskResults, num_resamples: int, rng: np.random.Generator
) -> dict[tuple[str, str], np.ndarray]:
    """Of the runs of every resample, `(num_resamples, num_runs)`."""
    arrays = _arrays(task)
    num_runs = len(task.scores["before"])
    chosen = rng.integers(num_runs, size=(num_resamples, num_runs))
    means = {key: np.empty(chosen.shape) for key in arrays}
    for run in range(num_runs):
        where = chosen == run
        length = len(task.scores["before"][run])
        episodes = rng.integers(length, size=(int(where.sum()), length))
        for key, runs in arrays.items():
            means[key][where] = runs[run][episodes].mean(axis=1)
    return means


def _check(tasks: Sequence[TaskResults]) -> None:
    if not tasks:
        raise ValueError("`results` is empty: give the summaries of tasks.")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"`results` holds {sorted({n for n in names if names.count(n) > 1})} twice.")
    counts = {task.name: len(task.scores["before"]) for task in tasks}
    if len(set(counts.values())) > 1:
        raise ValueError(f"`results` must have as many training seeds for every task, got {counts}.")
    for task in tasks:
        lengths = [[len(run) for run in part[s]] for part in (task.scores, task.returns) for s in SETTINGS]
        if any(other != lengths[0] or 0 in other for other in lengths):
            raise ValueError(f"`results` of {task.name}: the settings differ in the episodes of their runs.")


def aggregate_summaries(paths: Sequence[Path], output_dir: Path) -> dict[str, Any]:
    """Aggregate what `dmc-hub summarize` has written of several tasks, and write `aggregate.{json,md,png}`.

    Args:
        paths: of the summaries' JSON files.
        output_dir: where the files go.

    Raises:
        ValueError: naming a file that is no summary or has no scores; see also `aggregate`.
    """
    summaries = [_read(path) for path in paths]
    tasks = [_results(path, summary) for path, summary in zip(paths, summaries, strict=True)]
    results = {"tasks": [task.name for task in tasks], **aggregate(tasks)}
    checkpoint.save_json(output_dir / "aggregate.json", results)
    plots.plot_intervals(results["aggregates"], SETTINGS, output_dir / "aggregate.png")
    checkpoint.write_text(output_dir / "aggregate.md", _card(results, summaries, paths))
    return results


def _read(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`{path}` is not JSON: {error}.") from error
    wanted = ("task", "controller", "best_of_n_control", "best_of_n_after", "returns_before", "scores_before")
    missing = [name for name in wanted if name not in summary] if isinstance(summary, dict) else list(wanted)
    if missing:
        raise ValueError(f"`{path}` is not a summary of runs, it lacks {missing}: write one by `dmc-hub summarize`.")
    return cast(dict[str, Any], summary)


def _results(path: Path, summary: Mapping[str, Any]) -> TaskResults:
    parts = {}
    for name in ("scores", "returns"):
        found = {"before": summary[f"{name}_before"], "after": summary[f"{name}_after"]}
        found |= {"control": summary["best_of_n_control"][name], "best_after": summary["best_of_n_after"][name]}
        if None in found.values():
            raise ValueError(
                f"`{path}`: {summary['task']!r} has no {name} that compare with other tasks': it knows neither an "
                "expert's score nor its optimum. Leave it out."
            )
        parts[name] = {setting: [np.asarray(run, float) for run in runs] for setting, runs in found.items()}
    return TaskResults(f"{summary['task']} {summary['controller']}", parts["scores"], parts["returns"])


def _card(results: Mapping[str, Any], summaries: Sequence[Mapping[str, Any]], paths: Sequence[Path]) -> str:
    one_run = " With one seed the intervals say nothing of training." if results["num_runs"] == 1 else ""
    return cards.results_card(
        title=f"{results['num_tasks']} tasks: foundation → aligned",
        introduction=f"Scores of {results['num_tasks']} tasks and controllers, 1 being an expert's or the optimum, "
        f"{results['num_runs']} training seed(s) each, aggregated as rliable does (Agarwal et al., 2021, "
        "arXiv:2108.13264). In brackets 95 % intervals of a bootstrap that is stratified by task and draws training "
        f"seeds and their evaluation episodes.{one_run}",
        command=f"dmc-hub aggregate --results {' '.join(path.name for path in paths)} --output-dir runs/aggregate",
        table=f"{_aggregate_table(results)}\n\n{_task_table(summaries)}",
        notes=_notes(results),
        picture="aggregate.png",
        **run_environment(),
    )


def _aggregate_table(results: Mapping[str, Any]) -> str:
    rows = {f"{name} score": entries for name, entries in results["aggregates"].items() if name != "optimality gap"}
    rows["optimality gap, lower is better"] = results["aggregates"]["optimality gap"]
    lines = [f"| | {' | '.join(SETTINGS.values())} |", "|---" * (1 + len(SETTINGS)) + "|"]
    lines += [f"| {name} | {' | '.join(_entry(row[s]) for s in SETTINGS)} |" for name, row in rows.items()]
    others = {
        "probability of improvement over the same without alignment": ("probability_of_improvement", False),
        "relative gain over before": ("relative_gain", True),
        "std over mean of the episodes": ("share_of_std", True),
    }
    for label, (name, is_percent) in others.items():
        found = results[name]
        entries = [_entry(found[s], is_percent) if s in found else "" for s in SETTINGS]
        lines.append(f"| {label} | {' | '.join(entries)} |")
    return "\n".join(lines)


def _task_table(summaries: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"| task | controller | metric | {' | '.join(SETTINGS.values())} |", "|---" * (3 + len(SETTINGS)) + "|"]
    for row in summaries:
        means = (
            row["return_before"],
            row["best_of_n_control"]["mean"],
            row["return_after"],
            row["best_of_n_after"]["mean"],
        )
        values = " | ".join(f"{mean:.2f}" for mean in means)
        lines.append(f"| {row['task']} | {row['controller']} | {row['metric']} | {values} |")
    return "\n".join(lines)


def _notes(results: Mapping[str, Any]) -> list[str]:
    left_out = [name for name in results["tasks"] if name not in results["tasks_with_gain"]]
    notes = [
        "The control is the best of N candidates of the foundation under the same critic, without alignment; the best "
        "of N after alignment is compared with it.",
    ]
    if left_out:
        notes.append(f"Gain and spread leave out {', '.join(left_out)}: a mean there is not surely positive.")
    return notes


def _entry(estimate: Mapping[str, float], is_percent: bool = False) -> str:
    if is_percent:
        return f"{estimate['value']:.1%} [{estimate['low']:.1%}, {estimate['high']:.1%}]"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
