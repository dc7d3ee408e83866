from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from dmc_hub.plots import (
    pareto_front,
    plot_diversity_front,
    plot_learning_curve,
    plot_nav1d_trajectories,
    plot_return_histogram,
)

STAGES = [
    {"label": "foundation", "return_mean": 3.2, "return_std": 1.1, "coherency": 0.9},
    {"label": "pass 1 RL", "return_mean": 6.0, "return_std": 0.7, "coherency": 0.85},
    {"label": "pass 1 DPO", "return_mean": 6.9, "return_std": 0.3, "coherency": 0.88},
]


def num_pixels(image: np.ndarray, color: tuple[float, float, float]) -> int:
    """Number of pixels close to an RGB colour."""
    return int((np.abs(image[..., :3] - np.array(color)).max(axis=-1) < 0.12).sum())


ORANGE, GREEN, BLACK = (1.0, 0.5, 0.06), (0.17, 0.63, 0.17), (0.0, 0.0, 0.0)


def test_learning_curve_shows_coherency_and_lines_where_given(tmp_path: Path) -> None:
    plot_learning_curve(STAGES, tmp_path / "new" / "full.png", baseline=2.2, optimum=7.38)
    without = [{**row, "coherency": None} for row in STAGES]
    plot_learning_curve(without, tmp_path / "plain.png")
    full, plain = (matplotlib.image.imread(tmp_path / name) for name in ("new/full.png", "plain.png"))
    assert full.shape[0] > plain.shape[0]
    assert num_pixels(full, ORANGE) > 200
    assert num_pixels(plain, ORANGE) == 0
    assert num_pixels(full, GREEN) > 200
    assert num_pixels(plain, GREEN) == 0
    assert num_pixels(full, BLACK) > num_pixels(plain, BLACK) + 300


def test_learning_curve_of_one_stage_and_of_none(tmp_path: Path) -> None:
    plot_learning_curve(STAGES[:1], tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="`stages` is empty"):
        plot_learning_curve([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_trajectories_are_drawn_in_their_panels(tmp_path: Path) -> None:
    high, low = np.full((3, 9), 0.9), np.full((3, 9), -0.9)
    plot_nav1d_trajectories(high, low, tmp_path / "t.png")
    image = matplotlib.image.imread(tmp_path / "t.png")
    height, width = image.shape[:2]
    quarters = {
        "upper left": image[: height // 2, : width // 2],
        "lower left": image[height // 2 :, : width // 2],
        "upper right": image[: height // 2, width // 2 :],
        "lower right": image[height // 2 :, width // 2 :],
    }
    green = {name: num_pixels(part, GREEN) > 100 for name, part in quarters.items()}
    assert green == {"upper left": True, "lower left": False, "upper right": False, "lower right": True}


def test_histogram_is_repeatable_and_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "h.png"
    path.write_text("old")
    before, after = np.array([1.0, 2.0, 3.0]), np.array([6.0, 7.0, 7.0])
    plot_return_histogram(before, after, path)
    first = path.read_bytes()
    plot_return_histogram(before, after, path)
    assert path.read_bytes() == first
    assert first.startswith(b"\x89PNG")
    plot_return_histogram(after, before, path)
    assert path.read_bytes() != first


def test_the_diversity_front_joins_the_states_that_none_surpasses(tmp_path: Path) -> None:
    def state(diversity: float, return_mean: float) -> dict[str, float]:
        return {"diversity": diversity, "return_mean": return_mean}

    assert pareto_front([(0.5, 2.0), (0.4, 1.0), (0.3, 4.0), (0.2, 3.0)]) == [(0.3, 4.0), (0.5, 2.0)]
    stages = [
        {"name": "foundation", "validations": [], **state(0.5, 2.0)},
        {"name": "nft", "validations": [state(0.4, 1.0), state(0.3, 4.0)], **state(0.3, 4.0)},
    ]
    plot_diversity_front(stages, tmp_path / "front.png")
    assert num_pixels(matplotlib.image.imread(tmp_path / "front.png"), ORANGE) > 20
    with pytest.raises(ValueError, match="empty"):
        plot_diversity_front([], tmp_path / "none.png")


def test_a_failed_plot_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    plot_learning_curve(STAGES, path)
    old = path.read_bytes()
    with pytest.raises(KeyError, match="return_std"):
        plot_learning_curve([{"label": "x", "return_mean": 1.0}], path)
    folder = tmp_path / "taken.png"
    folder.mkdir()
    with pytest.raises(IsADirectoryError):
        plot_learning_curve(STAGES, folder)
    assert path.read_bytes() == old
    assert sorted(item.name for item in tmp_path.iterdir()) == ["curve.png", "taken.png"]
