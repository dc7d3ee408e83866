"""The commands that write for others: data in their formats, and the page as a Space."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmc_hub import cli
from dmc_hub.data import Episodes, load_episodes, make_nav1d_dataset


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "dmc_hub.tasks.table.make_nav1d_dataset",
        lambda variant, num_episodes, seed: make_nav1d_dataset(variant, num_episodes=20, seed=seed),
    )


def run(*argv: str) -> int:
    return cli.main(["data", "export", "--task", "nav1d-full", *argv])


def test_data_for_datasets(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert run("--output-dir", str(tmp_path / "d"), "--repo-id", "someone/nav", "--seed", "3") == 0
    train, validation = (load_episodes(tmp_path / "d", split=split) for split in ("train", "validation"))
    assert (train.num_episodes, validation.num_episodes) == (18, 2)
    card = (tmp_path / "d/README.md").read_text()
    assert 'load_dataset("someone/nav", "nav1d-full", split="train")' in card
    assert "dmc-hub data export --task nav1d-full --seed 3" in card
    capsys.readouterr()


def test_data_for_lerobot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert run("--output-dir", str(tmp_path / "d"), "--format", "lerobot") == 0
    expected = Episodes.from_dataset(make_nav1d_dataset("full", num_episodes=20))
    np.testing.assert_array_equal(load_episodes(tmp_path / "d").actions, expected.actions)
    info = json.loads((tmp_path / "d/meta/info.json").read_text())
    assert info["reference_scores"]["optimum"] == pytest.approx(7.38, abs=0.01)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "--pipelines", "nothing"], "`nothing` is not a folder"),
        (["demo", "--pipelines", "x", "--port", "70000"], "`port` must lie in 0..65535, got 70000"),
        (["data", "export", "--task", "nav1d-full", "--output-dir", "x", "--repo-id", "a b"], "a b"),
    ],
)
def test_wrong_input_is_one_line(argv: list[str], message: str, capsys: Any) -> None:
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert message in error.splitlines()[-1]
