"""The results of several runs of one task, one per training seed, as one table and card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmc_hub import cards, checkpoint, plots
from dmc_hub.evaluation import return_statistics
from dmc_hub.report import learning_curve
from dmc_hub.run_settings import run_environment

_SAME = (
    "task",
    "controller",
    "sampler",
    "metric",
    "score_name",
    "num_candidates",
    "episodes",
    "seeds",
    "training_scale",
)


def summarize_runs(runs: Sequence[Path], output_dir: Path) -> dict[str, Any]:
    """Pool the evaluations of runs that differ in the training seed, and write `<task>-<controller>.{json,md,png}`.

    The headline is one candidate per decision, before and after. The control is the best of all candidates by the same
    critic without alignment; the same after alignment stands beside it.

    Args:
        runs: folders of finished runs.
        output_dir: where the files go.

    Raises:
        ValueError: no runs, runs of different settings, or two of one training seed.
        FileNotFoundError: a folder without a report.
    """
    if not runs:
        raise ValueError("`runs` is empty: give the folders of finished runs.")
    reports = [cards.read_report(run / cards.REPORT_NAME) for run in runs]
    for run, report in zip(runs, reports, strict=True):
        different = [name for name in _SAME if report.get(name) != reports[0].get(name)]
        if different:
            raise ValueError(f"`runs` {runs[0]} and {run} differ in {', '.join(different)}.")
    seeds = [report["seed"] for report in reports]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"`runs` has a training seed twice: {seeds}.")
    summary = _summary(reports)
    name = f"{summary['task']}-{summary['controller']}"
    checkpoint.write_text(output_dir / f"{name}.json", json.dumps(summary, indent=2) + "\n")
    curves = [learning_curve(report["stages"]) for report in reports]
    plots.plot_curves(curves, output_dir / f"{name}.png", metric=summary["metric"])
    checkpoint.write_text(output_dir / f"{name}.md", _card(summary, f"{name}.png"))
    return summary


def _summary(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = reports[0]
    one, best = (_pooled(reports, count) for count in (1, first["num_candidates"]))
    before, after = one["before"], one["after"]
    return {
        "task": first["task"],
        "controller": first["controller"],
        "sampler": first["sampler"],
        "metric": first["metric"],
        "return_before": before["mean"],
        "return_before_ci": before["ci"],
        "return_after": after["mean"],
        "return_after_ci": after["ci"],
        "returns_before": before["returns"],
        "returns_after": after["returns"],
        "scores_before": before["scores"],
        "scores_after": after["scores"],
        "score_name": first["score_name"],
        "std_before": before["std"],
        "std_after": after["std"],
        "gain": after["mean"] / before["mean"] - 1 if before["mean"] > 0 else None,
        "best_of_n_control": {"num_candidates": first["num_candidates"], **best["before"]},
        "best_of_n_after": {"num_candidates": first["num_candidates"], **best["after"]},
        "success_before": before["success_rate"],
        "success_after": after["success_rate"],
        "normalized_score_before": before["normalized_score"],
        "normalized_score_after": after["normalized_score"],
        "return_data": first["return_data"],
        "data": first["data"],
        "seeds": [report["seed"] for report in reports],
        "episodes": first["episodes"],
        "evaluation_seeds": first["seeds"],
        "stages": [[row["name"], row["decision"]] for row in first["stages"][1:]],
        "wall_seconds": [report["wall_seconds"] for report in reports],
        "training_scale": first["training_scale"],
        "machine": first["machine"],
        "command": re.sub(r" --seed \d+", "", first["command"]),
    }


def _pooled(reports: Sequence[Mapping[str, Any]], num_candidates: int) -> dict[str, dict[str, Any]]:
    """Statistics over the episodes of all runs, before and after, at one number of greedy candidates."""
    rows = [
        next(
            row
            for row in report["evaluations"]
            if (row["action_selection"], row["num_candidates"], row["num_upsampling_passes"])
            == ("greedy", num_candidates, 0)
        )
        for report in reports
    ]
    return {when: _statistics(rows, when) for when in ("before", "after")}


def _statistics(rows: Sequence[Mapping[str, Any]], when: str) -> dict[str, Any]:
    statistics = return_statistics(np.concatenate([row[f"returns_{when}"] for row in rows]))

    def by_seed(name: str) -> list[list[float]] | None:
        lists = [row[f"{name}_{when}"] for row in rows]
        return None if None in lists else [[float(f"{value:.7g}") for value in values] for values in lists]

    def mean(name: str) -> float | None:
        values = [row[when][name] for row in rows]
        return None if None in values else float(np.mean(values))

    return {
        "mean": statistics.mean,
        "std": statistics.std,
        "ci": [statistics.mean_ci_low, statistics.mean_ci_high],
        "by_seed": [row[when]["mean"] for row in rows],
        "returns": by_seed("returns"),
        "scores": by_seed("scores"),
        "success_rate": mean("success_rate"),
        "normalized_score": mean("normalized_score"),
    }


def _card(summary: Mapping[str, Any], picture: str) -> str:
    control = summary["best_of_n_control"]
    after = summary["best_of_n_after"]
    best = f"best of {control['num_candidates']} by the critic"
    rows = [
        ("one candidate", _entry(summary, "before"), _entry(summary, "after")),
        (best, _entry(control), _entry(after)),
    ]
    measures = {"success_rate": "success rate", "normalized_score": summary["score_name"]}
    if summary["score_name"] in (summary["metric"], "success rate"):
        del measures["normalized_score"]
    before, aligned = (
        {"success_rate": summary[f"success_{when}"], "normalized_score": summary[f"normalized_score_{when}"]}
        for when in ("before", "after")
    )
    for label, first, last in (("one candidate", before, aligned), (best, control, after)):
        rows += [
            (f"{label}: {measure}", f"{first[name]:.3f}", f"{last[name]:.3f}")
            for name, measure in measures.items()
            if first[name] is not None
        ]
    seeds = ", ".join(str(seed) for seed in summary["seeds"])
    return cards.results_card(
        title=f"{summary['task']}, {summary['controller']}: foundation → aligned",
        introduction=f"{summary['metric'].capitalize()} before and after alignment, training seed(s) {seeds}, "
        f"{summary['episodes']} evaluation episodes each, on seeds that no choice was made on. ± is the standard "
        "deviation over the episodes, in brackets the 95 % bootstrap interval of the mean.",
        command=summary["command"],
        table="\n".join(["| | before | after |", "|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows)])
        + f"\n\n{_seed_table(summary, best)}",
        notes=[
            f"The second row, before, is the control: best of {control['num_candidates']} candidates of the foundation "
            "under the same critic, without alignment.",
            f"The data ({', '.join(summary['data']) or 'made on the spot'}) earn a return of "
            f"{summary['return_data']:.2f} an episode.",
            f"Stages of seed {summary['seeds'][0]}: " + ", ".join(f"{n} {d}" for n, d in summary["stages"]) + ".",
            "Seconds per run: " + ", ".join(f"{seconds:.0f}" for seconds in summary["wall_seconds"]) + ".",
        ],
        picture=picture,
        machine=summary["machine"],
        version=run_environment()["version"],
    )


def _seed_table(summary: Mapping[str, Any], best: str) -> str:
    """Means of every training seed."""
    lines = [f"| training seed | before | {best}, before | after | {best}, after |", "|---|---|---|---|---|"]
    columns = (
        [np.mean(returns) for returns in summary["returns_before"]],
        summary["best_of_n_control"]["by_seed"],
        [np.mean(returns) for returns in summary["returns_after"]],
        summary["best_of_n_after"]["by_seed"],
    )
    for seed, *means in zip(summary["seeds"], *columns, strict=True):
        lines.append(f"| {seed} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    return "\n".join(lines)


def _entry(values: Mapping[str, Any], when: str | None = None) -> str:
    if when is not None:
        values = {"mean": values[f"return_{when}"], "std": values[f"std_{when}"], "ci": values[f"return_{when}_ci"]}
    low, high = values["ci"]
    return f"{values['mean']:.2f} ± {values['std']:.2f} [{low:.2f}, {high:.2f}]"
