"""Saved datasets are read back by `datasets` alone, streamed or not, and cards hold no surprises."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from huggingface_hub import DatasetCard

from dmc_hub.data import (
    DatasetCardText,
    DatasetConfig,
    DatasetDefectsError,
    Episodes,
    dataset_statistics,
    episode_features,
    load_episodes,
    make_nav1d_dataset,
    make_preference_pairs,
    preference_features,
    save_dataset,
    split_episodes,
)
from dmc_hub.data.publishing import nav1d_card_text, nav1d_dataset_configs

TEXT = DatasetCardText(title="Walks", description="Random walks.", repo_id="someone/walks", command="make data")


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def nav1d_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "nav1d"
    save_dataset(
        folder, nav1d_dataset_configs(40, num_pairs=90), nav1d_card_text("dmc/nav1d", "dmc-hub x"), rows_per_shard=100
    )
    return folder


def assert_same_rows(left: Episodes, right: Episodes) -> None:
    assert left.images.keys() == right.images.keys()
    for name in Episodes.__dataclass_fields__.keys() - {"images"}:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def test_reading_back_gives_the_same_rows(nav1d_folder: Path) -> None:
    for config in nav1d_dataset_configs(40, num_pairs=90):
        for split, dataset in config.splits.items():
            loaded = datasets.load_dataset(str(nav1d_folder), config.name, split=split)
            assert loaded.features == dataset.features
            assert loaded.to_dict() == dataset.to_dict()


def test_streaming_gives_the_same_rows(nav1d_folder: Path) -> None:
    expected = datasets.load_dataset(str(nav1d_folder), "full", split="train")
    stream = datasets.load_dataset(str(nav1d_folder), "full", split="train", streaming=True)
    assert list(stream) == expected.to_list()
    assert len(list((nav1d_folder / "data/full").glob("train-*-of-00003.parquet"))) == 3


def test_first_configuration_is_the_default_and_reads_to_episodes(nav1d_folder: Path) -> None:
    expected = nav1d_dataset_configs(40, num_pairs=90)[0]
    assert_same_rows(load_episodes(nav1d_folder), Episodes.from_dataset(expected.splits["train"]))
    assert_same_rows(
        load_episodes(nav1d_folder, config="full", split="validation"),
        Episodes.from_dataset(expected.splits["validation"]),
    )


def test_missing_shard_is_noticed(nav1d_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(nav1d_folder, folder)
    (folder / "data/full/train-00001-of-00003.parquet").unlink()
    with pytest.raises(DatasetDefectsError, match=r"train-00001-of-00003\.parquet` is missing"):
        load_episodes(folder)


def test_card_is_valid_and_computed_from_the_data(nav1d_folder: Path) -> None:
    card = DatasetCard.load(nav1d_folder / "README.md")
    assert [entry["config_name"] for entry in card.data.configs][:3] == ["full", "partial", "expert"]
    info = {entry["config_name"]: entry for entry in card.data.dataset_info}["full"]
    assert {split["name"]: split["num_examples"] for split in info["splits"]} == {"train": 288, "validation": 32}
    statistics = json.loads((nav1d_folder / "statistics.json").read_text())["full"]["train"]
    mean, std = statistics["episodes"]["return"]["mean"], statistics["episodes"]["return"]["std"]
    assert f"| train | 288 | 36 | {mean:.2f} ± {std:.2f} |" in card.text
    assert "| optimum | 7.38 |" in card.text


def test_statistics_are_those_of_the_columns() -> None:
    dataset = make_nav1d_dataset("full", num_episodes=20)
    statistics = dataset_statistics(dataset)
    observations = np.asarray(dataset["observations"][:], dtype=np.float64)
    np.testing.assert_allclose(statistics["columns"]["observations"]["std"], observations.std(0))
    np.testing.assert_allclose(statistics["columns"]["rewards"]["max"], [max(dataset["rewards"][:])])
    assert statistics["episodes"]["count"] == 20
    assert statistics["episodes"]["length"] == {"min": 8, "max": 8, "mean": 8.0}
    returns = np.asarray(dataset["rewards"][:], dtype=np.float64).reshape(20, 8).sum(1)
    assert statistics["episodes"]["return"]["mean"] == pytest.approx(returns.mean())
    assert "episode_ids" not in statistics["columns"]


def test_splits_share_no_episode_and_lose_none() -> None:
    dataset = make_nav1d_dataset("full", num_episodes=30)
    parts = split_episodes(dataset, validation_fraction=0.2, seed=3)
    assert [len(part) // 8 for part in parts.values()] == [24, 6]
    starts = [tuple(Episodes.from_dataset(part).observations[::8, 0]) for part in parts.values()]
    whole = Episodes.from_dataset(dataset).observations[::8, 0]
    assert sorted(starts[0] + starts[1]) == sorted(whole)
    assert split_episodes(dataset, validation_fraction=0.2, seed=4)["train"].to_dict() != parts["train"].to_dict()
    with pytest.raises(ValueError, match="both splits need at least one"):
        split_episodes(dataset, validation_fraction=0.01)


def test_selected_episodes_are_whole_and_in_order() -> None:
    episodes = Episodes.from_dataset(make_nav1d_dataset("full", num_episodes=5))
    chosen = episodes.select(np.array([3, 1]))
    np.testing.assert_array_equal(chosen.rewards, episodes.rewards.reshape(5, 8)[[3, 1]].ravel())
    np.testing.assert_array_equal(chosen.episode_ends, [8, 16])


def test_preference_pairs_start_alike_and_prefer_the_higher_return() -> None:
    data = Episodes.from_dataset(make_nav1d_dataset("full", num_episodes=300))
    pairs = make_preference_pairs(data, horizon=3, num_pairs=50, max_distance=0.03, seed=1)
    assert pairs.features == preference_features(3, 1, 3)
    rows = {name: np.asarray(pairs[name][:]) for name in pairs.column_names}
    assert (rows["chosen_return"] > rows["rejected_return"]).all()
    gap = np.abs(rows["chosen_observations"][:, 0] - rows["rejected_observations"][:, 0]) / np.ptp(
        data.observations, axis=0
    )
    assert gap.max() <= 0.03
    np.testing.assert_array_equal(rows["observations"][:, -1], rows["chosen_observations"][:, 0])
    windows = data.windows(3).gather(np.arange(data.num_steps))
    logged = {tuple(a): r for a, r in zip(windows["actions"].flatten(1).tolist(), windows["rewards"].sum(1).tolist())}
    for actions, total in zip(rows["rejected_actions"][..., 0].tolist(), rows["rejected_return"].tolist()):
        assert logged[tuple(actions)] == pytest.approx(total, abs=1e-5)
    again = make_preference_pairs(data, horizon=3, num_pairs=50, max_distance=0.03, seed=1)
    assert again.to_dict() == pairs.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 9}, "`horizon` 9 is longer than every episode, of 8 steps"),
        ({"horizon": 2, "max_distance": 1e-9}, "leaves too few pairs: 0 of 5 found"),
        ({"horizon": 2, "max_distance": 2.0}, r"`max_distance` in \(0, 1\], got 5 and 2.0"),
    ],
)
def test_impossible_preference_pairs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_preference_pairs(make_nav1d_dataset("full", num_episodes=10), num_pairs=5, **options)


def test_text_of_a_card_does_nothing(tmp_path: Path) -> None:
    hostile = "{{ 7 * 7 }} <script>alert(1)</script> [x](javascript:y) `z`\n---\nlicense: evil"
    text = DatasetCardText(
        title=hostile, description=hostile, repo_id="a/b", command="run ```\n# heading", tags=["x: y\n- z"]
    )
    save_dataset(
        tmp_path / "d", [DatasetConfig("c", hostile, {"train": make_nav1d_dataset("full", num_episodes=2)})], text
    )
    card = DatasetCard.load(tmp_path / "d/README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.tags[-1] == "x: y\n- z"
    assert "49" not in card.text.split("| configuration")[0]
    assert "<script>" not in card.text
    assert "](javascript" not in card.text.replace("\\]", "")
    assert "\n# heading" not in card.text


@pytest.mark.parametrize("name", ["../up", "a/b", "", "a b", ".hidden"])
def test_names_that_are_paths_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must consist of letters"):
        DatasetConfig(name, "", {"train": make_nav1d_dataset("full", num_episodes=1)})


def test_wrong_configurations_are_refused(tmp_path: Path) -> None:
    data = make_nav1d_dataset("full", num_episodes=1)
    with pytest.raises(ValueError, match="differ in their features"):
        DatasetConfig("c", "", {"train": data, "test": data.remove_columns("rewards")})
    with pytest.raises(ValueError, match="must have different names"):
        save_dataset(tmp_path / "d", [DatasetConfig("c", "", {"train": data})] * 2, TEXT)
    with pytest.raises(ValueError, match=r"must not be empty, but \['train'\] are"):
        DatasetConfig("c", "", {"train": data.select([])})
    assert not (tmp_path / "d").exists()


def test_episode_columns_keep_their_types(nav1d_folder: Path) -> None:
    assert datasets.load_dataset(str(nav1d_folder), "expert", split="train").features == episode_features(3, 1)
