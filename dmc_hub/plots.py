"""Plots of reports and model cards, drawn off screen and saved whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dmc_hub.data import Episodes
from dmc_hub.envs.nav1d import draw_reward_distributions

RETURN_COLOR, COHERENCY_COLOR = "tab:blue", "tab:orange"
BEFORE_COLOR, AFTER_COLOR = "tab:gray", "tab:green"
_DPI = 130


def plot_learning_curve(
    stages: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    baseline: float | None = None,
    optimum: float | None = None,
) -> None:
    """Return and coherency over the stages of an alignment, as Figures 5 and 6 of arXiv:2502.12198.

    Args:
        stages: one mapping per evaluation with `label`, `return_mean`, `return_std` (drawn as a band of one
            standard deviation) and, where it was measured, `coherency` in `[0, 1]` (drawn in a panel below).
        path: the PNG file to write.
        baseline: average return of the dataset, a black line.
        optimum: optimal return, a dashed line.
    """
    if len(stages) == 0:
        raise ValueError("`stages` is empty: there is nothing to plot.")
    coherency = np.array([np.nan if row.get("coherency") is None else row["coherency"] for row in stages], float)
    has_coherency = bool(np.isfinite(coherency).any())
    width = min(max(5.0, 1.6 + 0.62 * len(stages)), 16.0)
    figure = Figure(figsize=(width, 5.0 if has_coherency else 3.6), layout="constrained")
    ratios = [2.4, 1.0] if has_coherency else [1.0]
    panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    _draw_returns(panels[0], stages, baseline, optimum)
    if has_coherency:
        _draw_coherency(panels[1], coherency)
    _label_stages(panels[-1], [str(row["label"]) for row in stages])
    _save(figure, path)


def plot_nav1d_trajectories(
    before: np.ndarray, after: np.ndarray, path: str | os.PathLike[str], max_trajectories: int = 64
) -> None:
    """Nav1D trajectories over the reward distributions, before and after alignment side by side.

    Args:
        before: positions of shape `(num_episodes, num_steps + 1)`, in `[-1, 1]`.
        after: the same of the aligned controller.
        path: the PNG file to write.
        max_trajectories: number of episodes drawn at most, the first ones.
    """
    figure = Figure(figsize=(10.0, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, positions, title in zip(panels, (before, after), ("before alignment", "after alignment"), strict=True):
        _draw_trajectories(axes, np.asarray(positions)[:max_trajectories])
        axes.set_title(title)
    panels[1].set_ylabel("")
    _save(figure, path)


def plot_return_histogram(before: np.ndarray, after: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Histogram of the returns before and after alignment, on common bins, with their means as lines.

    Args:
        before: returns of shape `(num_episodes,)`.
        after: the same of the aligned controller.
        path: the PNG file to write.
    """
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    both = np.concatenate([before, after])
    edges = np.histogram_bin_edges(both, bins=min(30, max(8, len(both) // 4)))
    for returns, color, label in ((before, BEFORE_COLOR, "before"), (after, AFTER_COLOR, "after")):
        mean, std = float(np.mean(returns)), float(np.std(returns))
        axes.hist(returns, bins=edges.tolist(), color=color, alpha=0.55, label=f"{label}: {mean:.2f} ± {std:.2f}")
        axes.axvline(mean, color=color, linewidth=1.8, linestyle="--")
    axes.set(xlabel="return", ylabel="episodes")
    axes.legend(frameon=False)
    _hide_spines(axes)
    _save(figure, path)


def plot_episodes(
    episodes: Episodes, path: str | os.PathLike[str], *, title: str = "", max_episodes: int = 12, num_frames: int = 8
) -> None:
    """Returns and lengths of all episodes, some episodes in the plane of the two principal components, and frames.

    Args:
        episodes: the data.
        path: the PNG file to write.
        title: above the picture.
        max_episodes: episodes drawn in the plane at most, evenly over the data; the darker, the higher the return.
        num_frames: frames of the first of them, evenly over its steps, in a row for each camera.
    """
    num_rows = 1 + len(episodes.images)
    figure = Figure(figsize=(13.0, 3.6 + 1.7 * len(episodes.images)), layout="constrained")
    grid = figure.add_gridspec(num_rows, 1, height_ratios=[2.2, *[1.0] * len(episodes.images)])
    left, middle, right = grid[0].subgridspec(1, 3).subplots(squeeze=False)[0]
    returns, lengths = episodes.returns(), episodes.episode_lengths
    for axes, values, label in ((left, returns, "return"), (middle, lengths, "length")):
        axes.hist(values, bins=min(40, max(8, len(values) // 4)), color=RETURN_COLOR, alpha=0.8)
        axes.axvline(values.mean(), color="black", linewidth=1.2, linestyle="--")
        axes.set(xlabel=f"{label}: {values.mean():.4g} ± {values.std():.4g}", ylabel="episodes")
        _hide_spines(axes)
    chosen = np.unique(np.linspace(0, episodes.num_episodes - 1, max_episodes).astype(int))
    _draw_principal_plane(right, [_episode_rows(episodes, index) for index in chosen], returns[chosen])
    for row, (camera, frames) in enumerate(episodes.images.items(), start=1):
        panels = grid[row].subgridspec(1, num_frames).subplots(squeeze=False)[0]
        steps = np.linspace(episodes.episode_starts[0], episodes.episode_ends[0] - 1, num_frames).astype(int)
        for axes, step in zip(panels, steps, strict=True):
            axes.imshow(frames[step])
            axes.set_axis_off()
        panels[0].set_title(camera, fontsize=8, loc="left")
    figure.suptitle(f"{title}: {episodes.num_episodes} episodes, {episodes.num_steps} steps".removeprefix(": "))
    _save(figure, path)


def _episode_rows(episodes: Episodes, index: int) -> np.ndarray:
    return episodes.observations[episodes.episode_starts[index] : episodes.episode_ends[index]]


def _draw_principal_plane(axes: Axes, parts: Sequence[np.ndarray], returns: np.ndarray) -> None:
    """Standardised observations of some episodes, projected on their two principal components."""
    rows = np.concatenate(parts).astype(np.float64)
    mean, std = rows.mean(0), rows.std(0)
    scale = np.where(std > 0, std, 1.0)
    directions = np.linalg.svd(np.cov((rows - mean) / scale, rowvar=False).reshape(rows.shape[1], -1))[0][:, :2]
    ranks = np.argsort(np.argsort(returns)) / max(len(returns) - 1, 1)
    for part, rank in zip(parts, ranks, strict=True):
        plane = (part - mean) / scale @ directions
        y = plane[:, 1] if plane.shape[1] > 1 else np.arange(len(plane))
        axes.plot(plane[:, 0], y, color="tab:green", alpha=0.25 + 0.65 * rank, linewidth=1.0)
        axes.plot(plane[:1, 0], y[:1], "o", color="black", markersize=2.5)
    axes.set(xlabel="1st principal component", ylabel="2nd" if rows.shape[1] > 1 else "step")
    _hide_spines(axes)


def plot_diversity_front(
    stages: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], min_diversity: float | None = None
) -> None:
    """Return of every validated state over the diversity of its candidates, one colour per method.

    States that no other surpasses in both are joined by a line, the front.

    Args:
        stages: one mapping per stage, the foundation's first, with `name`, `validations` (mappings with `return_mean`
            and `diversity`), and its own `return_mean` and `diversity`.
        path: the PNG file to write.
        min_diversity: the bound as a share of the foundation's diversity, a dotted line.
    """
    if len(stages) == 0:
        raise ValueError("`stages` is empty: there is nothing to plot.")
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    points = [(row["diversity"], row["return_mean"]) for stage in stages for row in stage["validations"] or [stage]]
    axes.plot(*zip(*pareto_front(points), strict=True), color="0.75", linewidth=2, zorder=1, label="front")
    for name in dict.fromkeys(stage["name"] for stage in stages):
        states = [row for stage in stages if stage["name"] == name for row in stage["validations"] or [stage]]
        axes.scatter([row["diversity"] for row in states], [row["return_mean"] for row in states], s=26, label=name)
    if min_diversity is not None:
        bound = min_diversity * stages[0]["diversity"]
        axes.axvline(bound, color="black", linewidth=1.2, linestyle=":", label=f"bound {bound:.3f}")
    axes.set(xlabel="diversity of candidates", ylabel="return, one candidate")
    axes.legend(frameon=False, fontsize=8)
    _hide_spines(axes)
    _save(figure, path)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other equals or surpasses in both coordinates, by ascending first coordinate."""
    return [a for a in sorted(set(points)) if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in points)]


def plot_table(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], optimum: float | None = None) -> None:
    """Before and after of every cell of a table as a line between two dots, beside the published figure.

    Args:
        rows: one mapping per cell with `controller`, `sampler`, `selection`, `dataset`, `return_before`,
            `return_after` and `paper_after`.
        path: the PNG file to write.
        optimum: optimal return, a dashed line.
    """
    figure = Figure(figsize=(7.0, 1.2 + 0.28 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    y = np.arange(len(rows))[::-1]
    before, after, paper = (
        np.array([row[key] for row in rows], float) for key in ("return_before", "return_after", "paper_after")
    )
    axes.hlines(y, before, after, color="0.8", linewidth=3)
    axes.plot(before, y, "o", color=BEFORE_COLOR, label="before")
    axes.plot(after, y, "o", color=AFTER_COLOR, label="after")
    axes.plot(paper, y, "|", color="black", markersize=11, markeredgewidth=2, label="after, as published")
    if optimum is not None:
        axes.axvline(optimum, color="tab:green", linewidth=1.2, linestyle="--", label=f"optimum {optimum:.2f}")
    labels = [f"{row['dataset']} · {row['controller']} {row['sampler']}, {row['selection']}" for row in rows]
    axes.set_yticks(y, labels, fontsize=8)
    axes.set_xlabel("return")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    _hide_spines(axes)
    _save(figure, path)


def plot_curves(
    curves: Sequence[Sequence[tuple[int, float]]], path: str | os.PathLike[str], metric: str = "return"
) -> None:
    """Validated metric over the optimizer steps of an alignment, one line per training seed.

    Args:
        curves: of each seed, `(step, value)`.
        path: the PNG file to write.
        metric: what the values are.
    """
    if len(curves) == 0:
        raise ValueError("`curves` is empty: there is nothing to plot.")
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        steps, values = zip(*curve, strict=True)
        axes.plot(steps, values, color=RETURN_COLOR, marker="o", markersize=3, linewidth=1.4, alpha=0.8)
    axes.axhline(float(np.mean([curve[0][1] for curve in curves])), color=BEFORE_COLOR, linestyle="--", linewidth=1)
    axes.set(xlabel="optimizer steps of alignment", ylabel=f"validated {metric}")
    _hide_spines(axes)
    _save(figure, path)


def plot_critic(returns_to_go: np.ndarray, values: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Values of the data's steps over the return that followed, the more steps the darker, and where both are equal.

    Args:
        returns_to_go: of shape `(num_steps,)`.
        values: of the same steps, `(num_steps,)`.
        path: the PNG file to write.
    """
    figure = Figure(figsize=(4.6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    hexagons = axes.hexbin(returns_to_go, values, gridsize=40, bins="log", mincnt=1, cmap="Blues", linewidths=0.2)
    low, high = min(returns_to_go.min(), values.min()), max(returns_to_go.max(), values.max())
    axes.plot([low, high], [low, high], color="black", linewidth=1, linestyle="--", label="equal")
    figure.colorbar(hexagons, ax=axes, label="steps")
    axes.set(xlabel="discounted return-to-go", ylabel="min(Q1, Q2)")
    axes.legend(frameon=False, fontsize=8)
    _hide_spines(axes)
    _save(figure, path)


def plot_intervals(
    estimates: Mapping[str, Mapping[str, Mapping[str, float]]],
    labels: Mapping[str, str],
    path: str | os.PathLike[str],
) -> None:
    """Point estimates with their intervals, a panel per aggregate and a bar per setting, as rliable draws them.

    Args:
        estimates: by aggregate and setting, `value`, `low` and `high`.
        labels: by setting, from the top.
        path: the PNG file to write.
    """
    figure = Figure(figsize=(3.0 + 2.1 * len(estimates), 0.9 + 0.4 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(estimates), sharey=True, squeeze=False)[0]
    y = np.arange(len(labels))[::-1]
    for axes, (name, entries) in zip(panels, estimates.items(), strict=True):
        low, value, high = (np.array([entries[s][key] for s in labels]) for key in ("low", "value", "high"))
        colors = [AFTER_COLOR if "after" in setting else BEFORE_COLOR for setting in labels]
        axes.use_sticky_edges = False
        axes.barh(y, high - low, left=low, height=0.6, color=colors, alpha=0.6)
        axes.vlines(value, y - 0.3, y + 0.3, color="black", linewidth=1.6)
        axes.set_title(name, fontsize=9)
        axes.set_yticks(y, list(labels.values()), fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        _hide_spines(axes)
    _save(figure, path)


def plot_frames(rows: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    """Frames of episodes from left to right, a row per episode.

    Args:
        rows: by label, frames of shape `(num_frames, height, width, 3)`, uint8.
        path: the PNG file to write.
    """
    count = max(len(frames) for frames in rows.values())
    figure = Figure(figsize=(1.7 * count, 1.95 * len(rows)), layout="constrained")
    for strip, (label, frames) in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows.items(), strict=True):
        strip.suptitle(label, fontsize=9, x=0.01, ha="left")
        panels = strip.subplots(1, count, squeeze=False)[0]
        for axes in panels:
            axes.set_axis_off()
        for axes, frame in zip(panels, frames):
            axes.imshow(frame)
    _save(figure, path)


def plot_image_grids(grids: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    """Grids of images, one below the other.

    Args:
        grids: by label, images of shape `(rows, columns, height, width, 3)` in `[0, 1]`.
        path: the PNG file to write.
    """
    figure = Figure(figsize=(5.0, 2.3 * len(grids)), layout="constrained")
    for axes, (label, images) in zip(figure.subplots(len(grids), 1, squeeze=False)[:, 0], grids.items(), strict=True):
        padded = np.pad(images, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=1.0)
        rows, columns, height, width, _ = padded.shape
        axes.imshow(padded.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3))
        axes.set_title(label, fontsize=9, loc="left")
        axes.set_axis_off()
    _save(figure, path)


def plot_ablation(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Learning curves of every variant, one panel per controller; a line per seed.

    Args:
        rows: one mapping per controller and variant with `controller`, `variant` and `curves`, of each seed the pairs
            of optimizer steps and validated return.
        path: the PNG file to write.
    """
    controllers = list(dict.fromkeys(str(row["controller"]) for row in rows))
    figure = Figure(figsize=(6.2 * len(controllers), 4.2), layout="constrained")
    panels = figure.subplots(1, len(controllers), sharey=True, squeeze=False)[0]
    variants = list(dict.fromkeys(str(row["variant"]) for row in rows if not str(row["variant"]).endswith("cascade")))
    for axes, controller in zip(panels, controllers, strict=True):
        for row in rows:
            if row["controller"] == controller and row["variant"] in variants:
                color = f"C{variants.index(row['variant'])}"
                for number, curve in enumerate(row["curves"]):
                    steps, returns = zip(*curve, strict=True)
                    label = None if number else row["variant"]
                    axes.plot(steps, returns, color=color, linewidth=1.3, alpha=0.8, marker=".", label=label)
        axes.set(xlabel="optimizer steps", title=controller)
        _hide_spines(axes)
    panels[0].set_ylabel("validated return, one candidate")
    panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def plot_growth(rows: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw the `growth` of `dmc_hub.benchmarks.growth` in logarithmic scales, beside lines of proportional growth."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, -(-len(rows) // 2), squeeze=False).flatten()
    for axis, (name, row) in zip(axes, rows.items()):
        values, times = np.array(row["values"]), np.array(row["milliseconds"])
        axis.loglog(values, times, "o-", label="measured")
        axis.loglog(values, times[-1] * values / values[-1], ":", color="grey", label="proportional")
        axis.set(xlabel=name, ylabel="milliseconds")
        axis.set_xticks(values, [f"{value:,}" for value in values])
        axis.minorticks_off()
        _hide_spines(axis)
    axes[0].legend(frameon=False)
    _save(figure, path)


def _draw_returns(
    axes: Axes, stages: Sequence[Mapping[str, Any]], baseline: float | None, optimum: float | None
) -> None:
    mean = np.array([row["return_mean"] for row in stages], float)
    std = np.array([row["return_std"] for row in stages], float)
    x = np.arange(len(stages))
    axes.fill_between(x, mean - std, mean + std, color=RETURN_COLOR, alpha=0.2, linewidth=0, label="±1 std")
    axes.plot(x, mean, color=RETURN_COLOR, marker="o", markersize=4.5, linewidth=2, label="mean return")
    if baseline is not None:
        axes.axhline(baseline, color="black", linewidth=1.2, label=f"dataset {baseline:.2f}")
    if optimum is not None:
        axes.axhline(optimum, color="tab:green", linewidth=1.2, linestyle="--", label=f"optimum {optimum:.2f}")
    axes.set_ylabel("return")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)
    _hide_spines(axes)


def _draw_coherency(axes: Axes, coherency: np.ndarray) -> None:
    axes.plot(np.arange(len(coherency)), coherency, color=COHERENCY_COLOR, marker="s", markersize=4, linewidth=1.8)
    axes.set(ylabel="coherency", ylim=(0.0, 1.05))
    _hide_spines(axes)


def _label_stages(axes: Axes, labels: list[str]) -> None:
    is_crowded = len(labels) > 5 or max(map(len, labels)) > 12
    rotation: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if is_crowded else {}
    axes.set_xticks(np.arange(len(labels)), labels, fontsize=8, **rotation)
    axes.set_xlim(-0.3, max(len(labels) - 0.7, 0.3))


def _draw_trajectories(axes: Axes, positions: np.ndarray) -> None:
    draw_reward_distributions(axes)
    alpha = float(np.clip(10.0 / max(len(positions), 1), 0.2, 0.9))
    axes.plot(np.arange(positions.shape[1]), positions.T, color="tab:green", linewidth=1.3, alpha=alpha)
    axes.plot(np.arange(positions.shape[1]), positions.T, "o", color="tab:green", markersize=2.5, alpha=alpha)


def _hide_spines(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        FigureCanvasAgg(figure)
        figure.savefig(unfinished, format="png", dpi=_DPI)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
