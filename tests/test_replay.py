"""Episodes replayed from their actions: pictures and videos."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from PIL import Image

from dmc_hub import task_evaluation
from dmc_hub.cli import main
from dmc_hub.data import Episodes, make_nav1d_dataset
from dmc_hub.evaluation import Evaluation, summarize_records
from dmc_hub.evaluation_cache import EpisodeRecord
from dmc_hub.plots import plot_frames
from dmc_hub.presets import preset_of
from dmc_hub.replay import Replay, best_median_worst, replay, save_video
from dmc_hub.rollout import Rollouts, run_episodes
from dmc_hub.task_evaluation import draw_episodes
from dmc_hub.tasks import Task, get_task, make_vector_env


def play(task: Task, num_episodes: int, max_length: int | None = None) -> Rollouts:
    """Episodes of random actions, as a controller draws them."""
    vector_env = make_vector_env(task, num_episodes)
    space: Any = vector_env.single_action_space

    def act(observations: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        uniform = torch.rand((len(observations), *space.shape), generator=generator).numpy()
        return space.low + (space.high - space.low) * uniform

    try:
        return run_episodes(act, vector_env, seeds=range(num_episodes), generator=torch.Generator().manual_seed(0))
    finally:
        vector_env.close()


def shortened(name: str, length: int) -> Task:
    task = get_task(name)

    def short(make: Any) -> Any:
        return None if make is None else lambda: gymnasium.wrappers.TimeLimit(make(), length)

    made = {"make_env": short(task.make_env), "make_render_env": short(task.make_render_env), "make_vector": None}
    return dataclasses.replace(task, **made)


def test_frames_are_those_of_the_episode() -> None:
    task = get_task("nav1d-full")
    rollouts = play(task, 3)
    [all_of, some] = replay(task, rollouts, [2, 1], max_frames=100), replay(task, rollouts, [1], max_frames=3)
    assert [seen.seed for seen in all_of] == [2, 1]
    assert all_of[0].frames.dtype == np.uint8
    assert all_of[0].frames.shape[0] == 9  # 8 steps and the start
    np.testing.assert_array_equal(some[0].frames, all_of[1].frames[[0, 4, 8]])
    assert (all_of[1].frames[0] != all_of[1].frames[8]).any()
    assert all_of[0].frames_per_second == 4.0  # Nav1D's own
    assert some[0].frames_per_second == pytest.approx(4 * 3 / 9)


def test_an_episode_that_goes_otherwise_is_noticed() -> None:
    task = get_task("nav1d-full")
    rollouts = play(task, 2)
    actions = rollouts.actions.copy()
    actions[1, 3] *= -1
    with pytest.raises(ValueError, match="episode of seed 1 differs at step 4 when it is replayed"):
        replay(task, dataclasses.replace(rollouts, actions=actions), [0, 1], max_frames=2)
    with pytest.raises(ValueError, match="`rollouts` holds no episode of seed 7"):
        replay(task, rollouts, [7], max_frames=2)
    with pytest.raises(ValueError, match="'nav1d-full' has no environment that draws"):
        replay(dataclasses.replace(task, make_render_env=None), rollouts, [0], max_frames=2)


def test_best_median_and_worst() -> None:
    assert best_median_worst(np.array([3.0, 9.0, 1.0, 5.0, 4.0])) == {"best": 1, "median": 4, "worst": 2}
    assert best_median_worst(np.array([1.0, 2.0])) == {"best": 1, "median": 0, "worst": 0}
    assert best_median_worst(np.array([1.0])) == {"best": 0, "median": 0, "worst": 0}


def test_push_t_is_drawn_step_by_step() -> None:
    pytest.importorskip("gym_pusht", reason="the environment comes with the extra [robotics]")
    task = shortened("push-t", 12)
    rollouts = play(task, 2)
    [seen] = replay(task, rollouts, [1], max_frames=4)
    assert len(seen.frames) == 4
    assert all((first != second).any() for first, second in zip(seen.frames, seen.frames[1:], strict=False))


def test_hopper_is_drawn_where_there_is_a_way_to_draw() -> None:
    pytest.importorskip("mujoco", reason="the environment comes with the extra [mujoco]")
    task = shortened("hopper-medium", 5)
    rollouts = play(task, 2)
    try:
        [seen] = replay(task, rollouts, [1], max_frames=2)
    except ValueError:
        raise
    except Exception as error:
        pytest.skip(f"nothing draws MuJoCo here: {type(error).__name__}")
    assert seen.frames.shape == (2, 480, 480, 3)
    assert (seen.frames[0] != seen.frames[1]).any()


@pytest.fixture
def colors() -> Replay:
    frames = np.zeros((4, 30, 41, 3), np.uint8)
    frames[1, ..., 0] = frames[2, ..., 1] = frames[3, ..., 2] = 255
    return Replay(7, frames, 10.0)


def test_a_gif_holds_the_frames(colors: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    path = save_video(colors, tmp_path / "new" / "best-7")
    assert path.name == "best-7.gif"
    with Image.open(path) as image:
        assert (image.n_frames, image.info["duration"]) == (4, 100)  # type: ignore[attr-defined]
        for index, frame in enumerate(colors.frames):
            image.seek(index)
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), frame)
    assert [file.name for file in path.parent.iterdir()] == ["best-7.gif"]


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # ffmpeg's pipes
def test_an_mp4_holds_the_frames(colors: Replay, tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg", reason="comes with the extra [video]")
    import imageio.v2 as imageio

    path = save_video(colors, tmp_path / "best-7")
    assert path.name == "best-7.mp4"
    frames = [np.asarray(frame) for frame in imageio.mimread(path)]
    assert len(frames) == 4
    assert frames[0].shape == (30, 40, 3)
    for read, written in zip(frames[1:], colors.frames[1:], strict=True):
        assert read.mean(axis=(0, 1)).argmax() == written.mean(axis=(0, 1)).argmax()


def evaluation(rollouts: Rollouts) -> Evaluation:
    records = [
        EpisodeRecord(int(seed), float(value), int(length), 0.0, None, 0, None, None)
        for seed, value, length in zip(rollouts.seeds, rollouts.returns, rollouts.lengths, strict=True)
    ]
    facts: dict[str, Any] = {"num_candidates": 1, "action_selection": "greedy", "num_inference_steps": None}
    facts |= {"num_upsampling_passes": 0, "generator_seed": 0, "wall_seconds": 0.0, "failed_seeds": ()}
    return summarize_records(records, steps=rollouts, **facts)


def test_a_run_draws_its_episodes_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nav1d = get_task("nav1d-full")
    rollouts = play(nav1d, 4)
    assert draw_episodes(nav1d, evaluation(rollouts), tmp_path / "none.png") is None
    task = dataclasses.replace(nav1d, name="mine")
    drawn = draw_episodes(task, evaluation(rollouts), tmp_path / "episodes.png")
    assert drawn is not None
    order = np.argsort(-rollouts.returns)
    assert [drawn[name]["seed"] for name in ("best", "median", "worst")] == order[[0, 2, 3]].tolist()
    assert (tmp_path / "episodes.png").read_bytes().startswith(b"\x89PNG")

    def broken() -> Any:
        raise OSError("no library draws")

    assert capsys.readouterr().err == ""
    lacking = dataclasses.replace(task, make_render_env=broken)
    assert draw_episodes(lacking, evaluation(rollouts), tmp_path / "none.png") is None
    assert "episodes are not drawn: OSError: no library draws" in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


def test_rows_of_different_lengths_fit_in_one_picture(tmp_path: Path) -> None:
    red = np.zeros((1, 8, 8, 3), np.uint8)
    red[..., 0] = 255
    plot_frames({"best": red.repeat(3, axis=0), "worst": red}, tmp_path / "frames.png")
    with Image.open(tmp_path / "frames.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    is_red = (pixels[..., 0] > 250) & (pixels[..., 1] < 5)
    upper, lower = np.array_split(is_red.sum(axis=1), 2)
    assert upper.sum() == pytest.approx(3 * lower.sum(), rel=0.05)


def test_the_command_films_what_it_has_run_and_what_it_has_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_evaluation, "VIDEO_FRAMES", 3)
    episodes = Episodes.from_dataset(make_nav1d_dataset("full", num_episodes=20))
    preset_of(get_task("nav1d-full"), "policy", "ddpm").build_pipeline(episodes, 0).save_pretrained(tmp_path / "policy")
    command = ["evaluate", "--task", "nav1d-full", "--pipeline", str(tmp_path / "policy"), "--num-inference-steps", "2"]
    command += ["--num-candidates", "2", "--num-episodes", "5", "--num-workers", "2"]
    command += ["--cache-dir", str(tmp_path / "cache")]
    kept = []
    for folder in ("run", "found"):
        assert main([*command, "--videos", str(tmp_path / folder)]) == 0
        returns = json.loads(capsys.readouterr().out)["statistics"]
        kept.append({path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()})
        assert returns["num_episodes"] == 5
    assert sorted(name.partition("-")[0] for name in kept[0]) == ["best", "median", "worst"]
    assert kept[0] == kept[1]
    assert main([*command, "--task", "robomimic-lift-ph", "--videos", str(tmp_path)]) == 2
    assert "`videos` cannot be made: `task` 'robomimic-lift-ph' has no environment" in capsys.readouterr().err
