"""Conversion and the one way to open data."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import gymnasium
import numpy as np
import pytest

from dmc_hub import checkpoint
from dmc_hub.data import (
    Episodes,
    EpisodeSource,
    convert,
    dataset_statistics,
    load_episodes,
    make_nav1d_dataset,
    record_episodes,
)
from dmc_hub.data.readers import Contents
from dmc_hub.data.readers.source import make_episode

LENGTHS = [3, 5, 2, 7]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@dataclass(frozen=True)
class MemorySource(EpisodeSource):
    """Episodes from memory, with pictures; after `fails_after` of them it fails."""

    path: None = None
    fails_after: int | None = None
    format = "memory"

    @property
    def contents(self) -> Contents:
        return Contents(observation_dim=2, action_dim=1, keys={}, image_shapes={"top": (4, 6, 3)})

    def episodes(self) -> Iterator[Episodes]:
        rng = np.random.default_rng(0)
        for index, count in enumerate(LENGTHS):
            if index == self.fails_after:
                raise ValueError("no more")
            yield make_episode(
                rng.normal(size=(count, 2)),
                rng.normal(size=(count, 1)),
                rng.normal(size=count),
                terminated=index % 2 == 0,
                images={"top": rng.integers(0, 256, (count, 4, 6, 3)).astype(np.uint8)},
            )


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_what_is_converted_is_mapped_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr("dmc_hub.data.conversion.BLOCK_BYTES", block_bytes)
    monkeypatch.setattr("dmc_hub.data.conversion._WRITE_BYTES", 16)
    expected = Episodes.concatenate(*MemorySource().episodes())
    episodes = load_episodes(convert(MemorySource(), tmp_path / "out"))
    for name in Episodes.__dataclass_fields__.keys() - {"images"}:
        np.testing.assert_array_equal(getattr(episodes, name), getattr(expected, name))
        assert getattr(episodes, name).dtype == getattr(expected, name).dtype
    np.testing.assert_array_equal(episodes.images["top"], expected.images["top"])
    for array in (episodes.observations, episodes.rewards, episodes.images["top"]):
        assert not array.flags.owndata
        assert not array.flags.writeable, "a view of the file"
    dataset = datasets.load_from_disk(str(tmp_path / "out"))
    assert dataset.features == expected.to_dataset().features
    assert dataset.to_dict() == expected.to_dataset().to_dict()


def test_the_folder_says_what_it_holds(tmp_path: Path) -> None:
    folder = convert(MemorySource(), tmp_path / "out")
    facts = json.loads((folder / "source.json").read_text())
    assert facts["format"] == "memory"
    expected = dataset_statistics(Episodes.concatenate(*MemorySource().episodes()).to_dataset())
    assert facts["statistics"]["episodes"] == expected["episodes"]
    for name, moments in facts["statistics"]["columns"].items():
        for key, values in moments.items():
            np.testing.assert_allclose(values, expected["columns"][name][key], rtol=1e-9, atol=1e-12)
    checkpoint.verify(folder)


def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir()
    with pytest.raises(ValueError, match="no more"):
        convert(MemorySource(fails_after=2), tmp_path / "parent/out")
    assert list((tmp_path / "parent").iterdir()) == []


def test_a_truncated_conversion_is_refused(tmp_path: Path) -> None:
    folder = convert(MemorySource(), tmp_path / "out")
    path = folder / "data-00000-of-00001.arrow"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(checkpoint.CheckpointError, match=r"data-00000-of-00001.arrow` should have .* convert"):
        load_episodes(folder)


# ---- Opening -------------------------------------------------------------------------------------------------


def write_kitchen(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    np.save(folder / "observations_seq.npy", rng.normal(size=(2, 5, 3)))
    np.save(folder / "actions_seq.npy", rng.normal(size=(2, 5, 1)))
    np.save(folder / "existence_mask.npy", np.arange(5) < np.array([[3], [5]]))
    return folder


def ones(observations: np.ndarray, actions: np.ndarray, next_observations: np.ndarray) -> np.ndarray:
    return np.ones(len(actions))


def test_a_raw_file_is_converted_once_per_file_and_options(tmp_path: Path, private_cache: Path, capsys: Any) -> None:
    folder = write_kitchen(tmp_path / "kitchen")

    def conversions() -> int:
        return capsys.readouterr().err.count("converting")

    first = load_episodes(folder, reward="zero")
    assert conversions() == 1
    again = load_episodes(folder, reward="zero")
    assert conversions() == 0
    np.testing.assert_array_equal(first.observations, again.observations)
    assert load_episodes(folder, reward=ones).rewards.tolist() == [1.0] * 8
    assert conversions() == 1
    os.utime(folder / "actions_seq.npy", (1, 1))
    load_episodes(folder, reward=ones)
    assert conversions() == 1
    assert len(list((private_cache / "dmc_hub").iterdir())) == 3
    with pytest.raises(ValueError, match="has no name to find its results by"):
        load_episodes(folder, reward=lambda o, a, n: a[:, 0])


def test_options_that_the_source_has_not(tmp_path: Path) -> None:
    folder = write_kitchen(tmp_path / "kitchen")
    with pytest.raises(ValueError, match="give options of its reader, not `config` or `split`"):
        load_episodes(folder, reward="zero", split="validation")
    converted = convert(MemorySource(), tmp_path / "out")
    with pytest.raises(ValueError, match="reward can only be given for one"):
        load_episodes(converted, reward="zero")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(
        ValueError, match=r"has no format that is known. Formats are d4rl, robomimic, zarr, relay-kitchen"
    ):
        load_episodes(tmp_path / "notes.txt")


# ---- Recording -----------------------------------------------------------------------------------------------


def nav1d_policy(observation: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return np.clip(0.5 * observation[2:] + generator.normal(0, 0.1, 1), -1, 1)


def test_recorded_episodes_are_those_of_a_loop(tmp_path: Path) -> None:
    source = record_episodes(lambda: gymnasium.make("dmc_hub/Nav1D-v0"), nav1d_policy, num_episodes=3, seed=7)
    episodes = load_episodes(convert(source, tmp_path / "nav"))
    env = gymnasium.make("dmc_hub/Nav1D-v0")
    row = 0
    for index in range(3):
        generator = np.random.default_rng([7, index])
        observation, _ = env.reset(seed=7 + index)
        terminated = truncated = False
        while not (terminated or truncated):
            action = nav1d_policy(observation, generator)
            np.testing.assert_array_equal(episodes.observations[row], observation)
            np.testing.assert_array_equal(episodes.actions[row], action.astype(np.float32))
            observation, reward, terminated, truncated, _ = env.step(action.astype(np.float32))
            assert episodes.rewards[row] == np.float32(reward)
            assert (episodes.terminations[row], episodes.truncations[row]) == (terminated, truncated)
            np.testing.assert_array_equal(episodes.next_observations[row], observation)
            row += 1
    assert row == episodes.num_steps


def test_recording_stops_at_the_step(tmp_path: Path) -> None:
    source = record_episodes(lambda: gymnasium.make("dmc_hub/Nav1D-v0"), nav1d_policy, num_steps=20, seed=0)
    episodes = load_episodes(convert(source, tmp_path / "nav"))
    assert episodes.episode_lengths.tolist() == [8, 8, 4]
    assert episodes.truncations[-1]
    with pytest.raises(ValueError, match="Give `num_episodes` or `num_steps`, at least 1"):
        record_episodes(lambda: gymnasium.make("dmc_hub/Nav1D-v0"), nav1d_policy, seed=0)
    wrong = record_episodes(
        lambda: gymnasium.make("dmc_hub/Nav1D-v0"), lambda o, g: np.zeros(2), num_episodes=1, seed=0
    )
    with pytest.raises(ValueError, match=r"`policy` returned the shape \(2,\) at episode 0, step 0; \(1,\) is due"):
        convert(wrong, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_statistics_in_blocks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_nav1d_dataset("full", num_episodes=30)
    whole = dataset_statistics(dataset)
    monkeypatch.setattr("dmc_hub.data.statistics._BLOCK_ROWS", 7)
    blocks = dataset_statistics(dataset)
    assert blocks["episodes"] == whole["episodes"]
    for name, moments in whole["columns"].items():
        for key, values in moments.items():
            np.testing.assert_allclose(blocks["columns"][name][key], values, rtol=1e-9, atol=1e-12)
