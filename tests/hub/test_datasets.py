"""Datasets on the way to the Hub and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmc_hub import checkpoint
from dmc_hub.data import (
    DatasetCardText,
    DatasetConfig,
    Episodes,
    make_nav1d_dataset,
    push_dataset,
    save_dataset,
)

TEXT = DatasetCardText(title="Walks", description="Walks.", repo_id="alice/walks", command="make walks")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = make_nav1d_dataset("full", num_episodes=4)
    save_dataset(tmp_path / "walks", [DatasetConfig("walks", "walks", {"train": data})], TEXT)
    return tmp_path / "walks"


def test_what_was_pushed_is_loaded_with_the_same_rows(hub: Any, folder: Path, shell: Callable[..., str]) -> None:
    (folder / ".env").write_text("SECRET=1")
    head = push_dataset(folder, "alice/walks")
    assert sorted(hub.files("alice/walks")) == [
        ".gitattributes",
        "README.md",
        "data/walks/train-00000-of-00001.parquet",
        "manifest.json",
        "statistics.json",
    ]
    assert push_dataset(folder, "alice/walks") == head  # nothing to commit
    code = """
from dmc_hub.data import load_episodes
episodes = load_episodes("alice/walks")
print(episodes.observations.tobytes().hex(), episodes.rewards.tobytes().hex(), episodes.episode_ends.tolist())
"""
    expected = Episodes.from_dataset(make_nav1d_dataset("full", num_episodes=4))
    observations, rewards = expected.observations.tobytes().hex(), expected.rewards.tobytes().hex()
    assert shell(code).split("\n")[-2] == f"{observations} {rewards} {expected.episode_ends.tolist()}"


def test_a_changed_folder_is_refused_before_the_hub_is_asked(hub: Any, folder: Path) -> None:
    (shard,) = folder.glob("data/walks/*.parquet")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(checkpoint.CheckpointError, match="truncated"):
        push_dataset(folder, "alice/walks")
    assert not hub.requests
