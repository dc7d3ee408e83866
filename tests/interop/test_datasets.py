"""Episodes as a LeRobotDataset and as a Minari dataset, and back."""

import json
from pathlib import Path
from typing import Any

import datasets
import gymnasium
import numpy as np
import pytest

from dmc_hub.data import Episodes, make_nav1d_dataset
from dmc_hub.interop import (
    InteropError,
    load_lerobot_episodes,
    load_minari_episodes,
    save_lerobot_dataset,
    save_minari_dataset,
)


def nav1d() -> Episodes:
    return Episodes.from_dataset(make_nav1d_dataset("full", num_episodes=6))


def ragged() -> Episodes:
    """Episodes of 3 and 2 steps, the second one cut; its last observation is seen nowhere else."""
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(5, 2)).astype(np.float32)
    following = np.roll(observations, -1, axis=0)
    following[[2, 4]] = rng.normal(size=(2, 2))
    return Episodes(
        observations=observations,
        actions=rng.normal(size=(5, 2)).astype(np.float32),
        rewards=rng.normal(size=5).astype(np.float32),
        next_observations=following,
        terminations=np.array([False, False, True, False, False]),
        truncations=np.array([False, False, False, False, True]),
        episode_ends=np.array([3, 5]),
    )


def assert_same_rows(left: Episodes, right: Episodes) -> None:
    assert left.images == right.images == {}
    for name in Episodes.__dataclass_fields__.keys() - {"images"}:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
        assert getattr(left, name).dtype == getattr(right, name).dtype


# ---- LeRobot -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [nav1d, ragged])
@pytest.mark.parametrize("state_dim", [None, 1])
def test_lerobot_round_trip(tmp_path: Path, make: Any, state_dim: int | None) -> None:
    episodes = make()
    save_lerobot_dataset(episodes, tmp_path / "d", task="navigate", fps=10, state_dim=state_dim)
    assert_same_rows(load_lerobot_episodes(tmp_path / "d"), episodes)


def test_lerobot_frames_are_read_by_datasets(tmp_path: Path) -> None:
    episodes = ragged()
    save_lerobot_dataset(episodes, tmp_path / "d", task="walk", fps=10, state_dim=1)
    frames = datasets.Dataset.from_parquet(
        str(tmp_path / "d/data/chunk-000/file-000.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert frames["observation.state"][:] == episodes.observations[:, 0].tolist()
    assert frames["observation.environment_state"][:] == episodes.observations[:, 1].tolist()
    np.testing.assert_array_equal(frames["action"][:], episodes.actions)
    assert frames["next.reward"][:] == episodes.rewards.tolist()
    assert frames["next.done"][:] == [False, False, True, False, True]
    assert frames["next.success"][:] == [False, False, True, False, False]
    assert frames["frame_index"][:] == [0, 1, 2, 0, 1]
    assert frames["episode_index"][:] == [0, 0, 0, 1, 1]
    assert frames["index"][:] == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(frames["timestamp"][:], [0, 0.1, 0.2, 0, 0.1])


def test_lerobot_meta_says_what_the_frames_hold(tmp_path: Path) -> None:
    episodes = ragged()
    save_lerobot_dataset(
        episodes, tmp_path / "d", task="walk", fps=10, robot_type="dot", reference_scores={"optimum": 3.5}
    )
    info = json.loads((tmp_path / "d/meta/info.json").read_text())
    assert {name: info[name] for name in ("codebase_version", "total_episodes", "total_frames", "fps")} == {
        "codebase_version": "v3.0",
        "total_episodes": 2,
        "total_frames": 5,
        "fps": 10,
    }
    assert info["features"]["action"] == {"dtype": "float32", "shape": [2], "names": None}
    assert info["reference_scores"] == {"optimum": 3.5}
    statistics = json.loads((tmp_path / "d/meta/stats.json").read_text())
    np.testing.assert_allclose(statistics["action"]["mean"], episodes.actions.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics["action"]["q90"], np.quantile(episodes.actions, 0.9, axis=0), rtol=1e-6)
    assert statistics["next.reward"]["count"] == [5]
    rows = datasets.Dataset.from_parquet(
        str(tmp_path / "d/meta/episodes/chunk-000/file-000.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert rows["dataset_from_index"][:] == [0, 3]
    assert rows["dataset_to_index"][:] == [3, 5]
    assert rows["tasks"][:] == [["walk"], ["walk"]]
    np.testing.assert_allclose(rows["stats/action/max"][1], episodes.actions[3:].max(0))


def test_success_by_return(tmp_path: Path) -> None:
    episodes = ragged()
    best = int(episodes.returns().argmax())
    save_lerobot_dataset(episodes, tmp_path / "d", task="walk", fps=1, success_return=float(episodes.returns()[best]))
    frames = datasets.Dataset.from_parquet(
        str(tmp_path / "d/data/chunk-000/file-000.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert np.flatnonzero(frames["next.success"][:]).tolist() == [episodes.episode_ends[best] - 1]


def test_frames_of_others_without_next_observations(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    episodes = ragged()
    save_lerobot_dataset(episodes, tmp_path / "d", task="walk", fps=10)
    path = tmp_path / "d/data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["next.observation.state", "next.truncated"]), path)
    loaded = load_lerobot_episodes(tmp_path / "d")
    expected = episodes.next_observations.copy()
    expected[[2, 4]] = episodes.observations[[2, 4]]
    np.testing.assert_array_equal(loaded.next_observations, expected)
    assert loaded.terminations.tolist() == [False, False, True, False, True]
    pq.write_table(table.drop_columns(["next.reward"]), path)
    with pytest.raises(InteropError, match=r"lacks next.reward"):
        load_lerobot_episodes(tmp_path / "d")
    pq.write_table(table.slice(0, 3), path)
    with pytest.raises(InteropError, match=r"has 3 frames, its info.json says 5"):
        load_lerobot_episodes(tmp_path / "d")


def test_other_layouts_are_refused(tmp_path: Path) -> None:
    save_lerobot_dataset(ragged(), tmp_path / "d", task="walk", fps=10)
    info = json.loads((tmp_path / "d/meta/info.json").read_text())
    (tmp_path / "d/meta/info.json").write_text(json.dumps({**info, "codebase_version": "v2.1"}))
    with pytest.raises(InteropError, match=r"has the layout 'v2.1'; v3.0 is read"):
        load_lerobot_episodes(tmp_path / "d")
    with pytest.raises(InteropError, match=r"`state_dim` must lie in 1..2"):
        save_lerobot_dataset(ragged(), tmp_path / "e", task="walk", fps=10, state_dim=3)


# ---- Minari ------------------------------------------------------------------------------------------------


@pytest.fixture
def minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return pytest.importorskip("minari", reason="Minari is the extra [minari]")


@pytest.mark.filterwarnings("ignore")  # Minari asks for author, code and e-mail
def test_minari_round_trip(minari: Any) -> None:
    episodes = nav1d()
    save_minari_dataset(
        episodes,
        "nav1d/full-v0",
        env_id="dmc_hub/Nav1D-v0",
        description="uniform",
        reference_scores={"random": 2.2, "expert": 7.4},
    )
    dataset = minari.load_dataset("nav1d/full-v0")
    assert_same_rows(load_minari_episodes(dataset), episodes)
    assert dataset.total_steps == 48
    assert dataset.spec.env_spec.id == "dmc_hub/Nav1D-v0"
    assert minari.get_normalized_score(dataset, np.array(4.8)) == pytest.approx(0.5)


@pytest.mark.filterwarnings("ignore")
def test_minari_with_spaces(minari: Any) -> None:
    box = gymnasium.spaces.Box(-10, 10, (2,), np.float32)
    save_minari_dataset(ragged(), "walks/random-v0", observation_space=box, action_space=box)
    assert_same_rows(load_minari_episodes(minari.load_dataset("walks/random-v0")), ragged())


def test_minari_refuses_what_it_cannot_hold(minari: Any) -> None:
    episodes = ragged()
    episodes.next_observations[0] += 1
    box = gymnasium.spaces.Box(-10, 10, (2,), np.float32)
    with pytest.raises(InteropError, match="the one after step 0 is not that before step 1"):
        save_minari_dataset(episodes, "walks/broken-v0", observation_space=box, action_space=box)
    with pytest.raises(InteropError, match="Give an `env_id`, or"):
        save_minari_dataset(episodes, "walks/broken-v0", observation_space=box)
    with pytest.raises(InteropError, match="may hold 'random' and 'expert'"):
        save_minari_dataset(episodes, "a/b-v0", env_id="dmc_hub/Nav1D-v0", reference_scores={"best": 1})
