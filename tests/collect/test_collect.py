"""Collecting data: what is recorded is what happened, and the qualities are what they are called."""

from pathlib import Path
from typing import Any

import datasets
import gymnasium
import numpy as np
import pytest
import torch

from dmc_hub import checkpoint, cli
from dmc_hub.collect import BEHAVIORS, CollectionSettings, collect, random_behavior, run_behavior
from dmc_hub.collect.experts import Snapshot, choose_snapshots, replay_episodes, train_experts
from dmc_hub.data import Episodes
from dmc_hub.tasks import TASKS


class Counter(gymnasium.Env[np.ndarray, np.ndarray]):
    """Counts its steps; ends by itself after `length`; the last step is a success."""

    observation_space = gymnasium.spaces.Box(0, 100, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, length: int) -> None:
        self.length, self.count = length, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        self.count += 1
        over = self.count == self.length
        return np.full(1, self.count, np.float32), float(action[0]), over, False, {"success": over}


def hold(value: float) -> Any:
    return lambda generator: lambda observation: np.full(1, value)


def test_steps_are_recorded_as_they_happened() -> None:
    collected = run_behavior(Counter(3), hold(0.5), seed=0, num_episodes=2)
    episodes = Episodes.from_dataset(collected.episodes.to_dataset())
    np.testing.assert_array_equal(episodes.observations[:, 0], [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(episodes.next_observations[:, 0], [1, 2, 3, 1, 2, 3])
    np.testing.assert_array_equal(episodes.terminations, [False, False, True] * 2)
    assert not episodes.truncations.any()
    assert episodes.returns().tolist() == [1.5, 1.5]
    assert collected.successes is not None
    assert collected.successes.all()


def test_episodes_are_cut() -> None:
    short = run_behavior(Counter(9), hold(7.0), seed=0, num_episodes=2, max_episode_steps=4)
    assert short.episodes.episode_lengths.tolist() == [4, 4]
    assert short.episodes.truncations[short.episodes.episode_ends - 1].all()
    assert short.episodes.actions.max() == 1.0  # what lies outside the bounds is clipped
    assert short.successes is not None
    assert not short.successes.any()
    by_steps = run_behavior(Counter(4), hold(0.0), seed=0, num_steps=10).episodes
    assert by_steps.episode_lengths.tolist() == [4, 4, 2]
    assert by_steps.truncations[-1]
    assert not by_steps.truncations[:-1].any()
    for sizes in ({}, {"num_steps": 3, "num_episodes": 3}, {"num_episodes": 0}):
        with pytest.raises(ValueError, match="Exactly one of `num_episodes` and `num_steps`"):
            run_behavior(Counter(4), hold(0.0), seed=0, **sizes)  # type: ignore[arg-type]


def test_a_seed_fixes_the_data_and_covers_the_actions() -> None:
    space = Counter.action_space
    first, again, other = (
        run_behavior(Counter(5), random_behavior(space), seed=seed, num_episodes=40).episodes for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.actions, again.actions)
    assert not np.array_equal(first.actions, other.actions)
    assert len(np.unique(first.actions)) == 200
    assert first.actions.min() < -0.9
    assert first.actions.max() > 0.9


def test_medium_is_a_third_of_the_way_to_the_best() -> None:
    scores = [10.0, 20.0, 35.0, 45.0, 100.0, 60.0]
    snapshots = [Snapshot(i, value, {}) for i, value in enumerate(scores)]
    medium, expert = choose_snapshots(snapshots)
    assert (medium.score, expert.score) == (45.0, 100.0)  # the first of at least 10 + 90 / 3
    with pytest.raises(ValueError, match="`training_steps` is too small"):
        choose_snapshots([])


def test_settings_are_checked() -> None:
    for changes, message in (
        ({"behavior": "good"}, f"`behavior` must be one of {', '.join(BEHAVIORS)}; got 'good'"),
        ({"behavior": "expert"}, "`training_dir` is missing"),
        ({"behavior": "random", "num_steps": 0}, "`num_steps` must be at least 1, got 0"),
        ({"behavior": "random", "num_steps": 1, "num_episodes": 1}, "exclude each other"),
        ({"behavior": "random", "seed": -1}, "`seed` must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            CollectionSettings(**changes)
    with pytest.raises(ValueError, match="only MetaWorld's tasks have scripted experts"):
        collect(TASKS["nav1d-full"], CollectionSettings(behavior="scripted", num_episodes=1))
    with pytest.raises(ValueError, match="has images"):
        collect(TASKS["push-t-image"], CollectionSettings(behavior="random", num_episodes=1))


def test_the_command_writes_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "collect", "--task", "nav1d-full", "--output-dir", str(tmp_path / "d")]
    assert cli.main([*arguments, "--num-episodes", "6", "--seed", "4"]) == 0
    assert "6 episodes, 48 steps of behaviour random" in capsys.readouterr().out
    episodes = Episodes.from_dataset(datasets.load_from_disk(str(tmp_path / "d")))
    assert episodes.episode_lengths.tolist() == [8] * 6
    facts = checkpoint.verify(tmp_path / "d").metadata
    assert (facts["behavior"], facts["seed"], facts["num_episodes"]) == ("random", 4, 6)
    assert facts["return_mean"] == pytest.approx(episodes.returns().mean())
    assert cli.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_graded_experts_of_metaworld() -> None:
    pytest.importorskip("metaworld", reason="comes with the extra [robotics]")
    from dmc_hub.collect.scripted import Grade, scripted_behavior
    from dmc_hub.envs.metaworld import MetaWorldEnv

    def success_rate(noise: float, share: float, offset: float) -> float:
        behavior = scripted_behavior("button-press", lambda _: Grade(noise, share, np.array([offset, 0.0, 0.0])))
        collected = run_behavior(MetaWorldEnv("button-press"), behavior, seed=0, num_episodes=3, max_episode_steps=150)
        assert collected.successes is not None
        return float(collected.successes.mean())

    assert success_rate(0.0, 0.0, 0.0) == 1
    assert success_rate(0.5, 0.0, 0.0) == 1
    assert success_rate(0.0, 1.0, 0.0) == 0
    assert success_rate(0.0, 0.0, 0.12) == 0
    grades = [Grade.draw(np.random.default_rng([0, i])) for i in range(300)]
    lengths = np.array([np.linalg.norm(grade.offset) for grade in grades])
    np.testing.assert_allclose(lengths[lengths > 0], 0.12)
    assert (lengths > 0).mean() == pytest.approx(0.35, abs=0.1)
    with pytest.raises(ValueError, match="MetaWorld has no scripted expert"):
        scripted_behavior("no-such-task")


def test_qualities_come_from_one_training_run(tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3", reason="comes with the extra [collect]")
    pytest.importorskip("mujoco", reason="comes with the extra [mujoco]")
    task, folder = TASKS["hopper-medium"], tmp_path / "training"
    before = torch.get_rng_state()

    def made(behavior: str, **sizes: Any) -> Episodes:
        settings = CollectionSettings(behavior=behavior, training_steps=3000, training_dir=folder, **sizes)
        return collect(task, settings).episodes

    medium, expert = made("medium", num_steps=150), made("expert", num_steps=150)
    facts = checkpoint.verify(folder).metadata
    assert facts["medium_num_steps"] <= facts["expert_num_steps"] <= 3000
    both = made("medium-expert", num_steps=300)
    np.testing.assert_array_equal(both.actions[:150], medium.actions)
    assert both.num_steps == 300
    assert not np.array_equal(medium.actions, expert.actions)
    replay = made("medium-replay")
    assert replay.num_steps == facts["medium_num_steps"]
    np.testing.assert_array_equal(replay.actions, replay_episodes(folder).actions)
    assert made("medium-replay", num_episodes=2).num_episodes == 2
    assert torch.equal(before, torch.get_rng_state())
    steps = {"algorithm": "ppo", "seed": 0}
    with pytest.raises(ValueError, match=r"`training_dir` .* holds the run .*'training_steps': 3000"):
        train_experts(task, folder, training_steps=4000, **steps)  # type: ignore[arg-type]
