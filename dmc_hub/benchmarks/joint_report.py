"""The miniature of Table 5 over several seeds: what it shows, its JSON, its card and its picture."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmc_hub import checkpoint, plots
from dmc_hub.benchmarks.joint import JointMiniature
from dmc_hub.benchmarks.joint_measures import MEASURES
from dmc_hub.cards import results_card
from dmc_hub.run_settings import run_environment

SINGLES = {measure: f"{reward} only" for reward, measure in MEASURES.items()}
COLUMNS = {
    "accuracy": "accuracy",
    "parity_distance": "parity distance",
    "brightness": "brightness",
    "tone_accuracy": "named tones",
    "denoising_loss": "denoising loss",
}
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5 % quantile of Student's t with one degree of freedom less than there are seeds."""
LEVELS = (0.5, 0.8)
"""Shares of a gain that models race to."""


def reproduce_joint(output_dir: Path, *, seeds: Sequence[int], **settings: Any) -> dict[str, Any]:
    """Run the miniature with each seed and write digits-joint.{json,md,png}; models that are there are found again.

    Args:
        output_dir: gets a folder per seed and settings too.
        seeds: of data, training and measurement.
        settings: of `JointMiniature`.

    Returns:
        What digits-joint.json holds: see `summary`.
    """
    miniatures = {seed: JointMiniature(seed=seed, **settings) for seed in seeds}
    folders = {seed: output_dir / _folder_name(each) for seed, each in miniatures.items()}
    runs: dict[int, dict[str, Any]] = {seed: {**vars(each), "models": {}} for seed, each in miniatures.items()}
    for name in ["base", *miniatures[seeds[0]].names]:
        for seed, miniature in miniatures.items():
            runs[seed]["models"][name] = miniature.run(name, folders[seed])
    result = summary(list(runs.values()))
    draw(folders[seeds[0]], output_dir / "digits-joint.png")
    checkpoint.save_json(output_dir / "digits-joint.json", result)
    checkpoint.write_text(output_dir / "digits-joint.md", card(result, settings))
    return result


def _folder_name(miniature: JointMiniature) -> str:
    return "-".join(str(value) for name, value in vars(miniature).items() if name != "ablate")


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the seeds' runs show together.

    Returns:
        `models`: by name and measure, `mean`, `low` and `high` (Student's 95 % interval over the seeds; None for one
        seed) and `by_seed`; `share_of_gain`: by model and measure, of the single model's gain over the base, from means
        over the seeds; `apart`: by measure, whether the intervals of base and single model are apart, over the seeds
        and in each (1.96 standard errors); `credit` and `efficiency`: see `race`; `evaluations`, `seconds`.
    """
    names = list(runs[0]["models"])
    models = {
        name: {measure: _estimate([run["models"][name][measure] for run in runs]) for measure in COLUMNS}
        for name in names
    }
    shares = {
        name: {measure: share_of_gain(models, name, measure) for measure in SINGLES} for name in names if name != "base"
    }
    trained = [name for name in names if name != "base"]
    return {
        **{name: value for name, value in runs[0].items() if name not in ("seed", "models")},
        "seeds": [run["seed"] for run in runs],
        "judge_accuracy": [run["models"]["base"]["judge_accuracy"] for run in runs],
        "models": models,
        "share_of_gain": shares,
        "apart": {measure: _apart(runs, models, measure) for measure in SINGLES},
        "credit": race(runs, "parity, leave one out", "parity, shared credit", "parity_distance", "images"),
        "efficiency": race(runs, "brightness only", "brightness, paper's recipe", "brightness", "evaluations"),
        "evaluations": {name: runs[0]["models"][name]["evaluations"] for name in trained},
        "seconds": {name: [run["models"][name]["seconds"] for run in runs] for name in trained},
    }


def _estimate(values: Sequence[float]) -> dict[str, Any]:
    mean = statistics.fmean(values)
    half = STUDENT_T[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) in STUDENT_T else None
    bounds = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "low": bounds[0], "high": bounds[1], "by_seed": list(values)}


def share_of_gain(models: Mapping[str, Any], name: str, measure: str) -> float | None:
    """Of the single model's mean gain over the base, the share that a model has; None if there was none."""
    base, single, own = (models[each][measure]["mean"] for each in ("base", SINGLES[measure], name))
    return None if single == base else (own - base) / (single - base)


def _apart(runs: Sequence[Mapping[str, Any]], models: Mapping[str, Any], measure: str) -> dict[str, Any]:
    base, single = models["base"][measure], models[SINGLES[measure]][measure]
    over_seeds = None if base["low"] is None else single["low"] > base["high"] or single["high"] < base["low"]

    def gap(run: Mapping[str, Any]) -> float:
        first, second = run["models"]["base"], run["models"][SINGLES[measure]]
        return float(
            abs(first[measure] - second[measure]) - 1.96 * (first[f"{measure}_error"] + second[f"{measure}_error"])
        )

    return {"over_seeds": over_seeds, "in_each_seed": [gap(run) > 0 for run in runs]}


def race(runs: Sequence[Mapping[str, Any]], quick: str, slow: str, measure: str, cost: str) -> list[dict[str, Any]]:
    """What two runs cost until the model is some share of the way from the base to where the quicker one ends.

    Read from the curves of models measured during training, between points on a straight line.

    Returns:
        For each of `LEVELS`: `level`; `by_seed`, each with the `target` and the `cost` of both by name; and `ratio`,
        the slower one's cost over the quicker one's. Where it never comes there, `reached` is false and the ratio is
        at least this: that of all it spent.
    """
    rows: list[dict[str, Any]] = []
    for level in LEVELS:
        by_seed = [
            _race(run["models"][quick]["curve"], run["models"][slow]["curve"], level, measure, cost) for run in runs
        ]
        costs = [{**row, "cost": dict(zip((quick, slow), row["cost"], strict=True))} for row in by_seed]
        rows.append({"level": level, "by_seed": costs, "ratio": _estimate([row["ratio"] for row in by_seed])})
    return rows


def _race(
    quick: Sequence[Mapping[str, float]], slow: Sequence[Mapping[str, float]], level: float, measure: str, cost: str
) -> dict[str, Any]:
    start, end = quick[0][measure], quick[-1][measure]
    target = start + level * (end - start)
    spent, reached = (cost_to(curve, target, start > end, measure, cost) for curve in (quick, slow))
    assert spent is not None
    needed = slow[-1][cost] if reached is None else reached
    return {"target": target, "cost": (spent, needed), "reached": reached is not None, "ratio": needed / spent}


def cost_to(
    curve: Sequence[Mapping[str, float]], target: float, is_falling: bool, measure: str, cost: str
) -> float | None:
    """What it took until the measure came to `target`, from above or below; None: it never did."""
    sign = -1 if is_falling else 1
    for before, after in itertools.pairwise(curve):
        gained, wanted = sign * (after[measure] - before[measure]), sign * (target - before[measure])
        if wanted <= 0:
            return before[cost]
        if gained >= wanted:
            return before[cost] + wanted / gained * (after[cost] - before[cost])
    return None


def draw(folder: Path, path: Path) -> None:
    """Samples of the base, the single models and the joint one for each digit, from the same noise."""
    names = ("base", *SINGLES.values(), "joint")
    plots.plot_image_grids(
        {name: checkpoint.load_tensors(folder / f"{name}.safetensors")["images"].numpy() for name in names}, path
    )


def card(result: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The model card of a result."""
    seeds = " ".join(map(str, result["seeds"]))
    return results_card(
        title="Digits: one reward at a time, and three at once",
        introduction="Table 5 of arXiv:2401.12244 in miniature: a Stable Diffusion of 0.5 million parameters, trained "
        "from nothing on scikit-learn's digits in four tones, aligned to prompt following, parity of the tones and "
        f"brightness. Means over {len(result['seeds'])} seed(s), with Student's 95 % interval, on wordings of the "
        "prompts that alignment has not seen, by a classifier that no reward knows.",
        command=f"python scripts/reproduce_joint.py --output-dir runs/joint --seeds {seeds}"
        + (" --quick" if "base_steps" in settings else "")
        + (" --ablate" if settings.get("ablate") else ""),
        table=as_table(result),
        notes=_notes(result),
        picture="digits-joint.png",
        **run_environment(),
    )


def as_table(result: Mapping[str, Any]) -> str:
    """Markdown in the shape of Table 5: the models, every measure, and shares of the single models' gains."""
    lines = [
        f"| model | {' | '.join(COLUMNS.values())} | share of gain: accuracy | parity | brightness | evaluations |",
        "|" + "---|" * (len(COLUMNS) + 5),
    ]
    for name, row in result["models"].items():
        cells = [_entry(row[measure]) for measure in COLUMNS]
        shares = [result["share_of_gain"].get(name, {}).get(measure) for measure in SINGLES]
        cells += ["–" if share is None else f"{share:.0%}" for share in shares]
        count = result["evaluations"].get(name)
        lines.append(f"| {name} | {' | '.join(cells)} | {'–' if count is None else f'{count / 1000:.0f} k'} |")
    return "\n".join(lines) + "\n"


def _entry(estimate: Mapping[str, Any], digits: int = 3) -> str:
    if estimate["low"] is None:
        return f"{estimate['mean']:.{digits}f}"
    return f"{estimate['mean']:.{digits}f} ± {estimate['high'] - estimate['mean']:.{digits}f}"


def _notes(result: Mapping[str, Any]) -> list[str]:
    joint, bare = (result["models"][name] for name in ("joint", "joint, no pretraining loss"))
    base = result["models"]["base"]["denoising_loss"]["mean"]
    more = result["joint_iterations"] / result["iterations"]
    return [
        "Parity distance: mean L2 distance of the tones of 16 pictures to uniform, about 0.2 for a uniform model. "
        "Named tones, and the denoising loss on pictures that nothing was trained on, are in no reward.",
        "Evaluations: of the network on one sample, in training; those of the gradient are not counted apart.",
        f"The denoising loss rises by {joint['denoising_loss']['mean'] - base:.3f} with the pretraining loss and by "
        f"{bare['denoising_loss']['mean'] - base:.3f} without.",
        *_race_notes("Images", "parity", result["credit"]),
        *_race_notes("Evaluations", "brightness", result["efficiency"]),
        "These costs are of models measured during training as in the table: that of the paper's recipe without the "
        "guidance that it samples with, too.",
        _apart_note(result["apart"]),
        f"A joint model gets {more:.1f} times the samplings of a single one, which is {more / len(SINGLES):.0%} of "
        f"what the {len(SINGLES)} single models get together.",
        "Shares of the paper's joint model: 84, 66 and 77 % (its Table 5).",
    ]


def _apart_note(apart: Mapping[str, Any]) -> str:
    in_seeds = [f"{sum(found['in_each_seed'])} of {len(found['in_each_seed'])}" for found in apart.values()]
    over = [COLUMNS[measure] for measure, found in apart.items() if found["over_seeds"]]
    pairs = zip(apart, in_seeds, strict=True)
    return (
        "95 % intervals of the base and of the single model, over pictures, are apart in "
        + ", ".join(f"{count} seeds for {COLUMNS[measure]}" for measure, count in pairs)
        + f"; Student's over seeds for {', '.join(over) or 'none'}."
    )


def _race_notes(cost: str, reward: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    notes: list[str] = []
    for row in found:
        pairs = [_pair(each) for each in row["by_seed"]]
        names = " and ".join(row["by_seed"][0]["cost"])
        estimate = _entry(row["ratio"], digits=1)
        at_least = "" if all(each["reached"] for each in row["by_seed"]) else "at least "
        notes.append(
            f"{cost} until {row['level']:.0%} of the gain in {reward}: {names} took {'; '.join(pairs)} "
            f"({at_least}{estimate} times as many)."
        )
    return notes


def _pair(row: Mapping[str, Any]) -> str:
    quick, slow = row["cost"].values()
    return f"{quick:,.0f} and {'' if row['reached'] else 'more than '}{slow:,.0f}"
