"""`dmc-hub data ...` on files of others."""

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from dmc_hub import cli
from dmc_hub.data import Episodes, load_episodes, make_nav1d_dataset

h5py = pytest.importorskip("h5py", reason="HDF5 is the extra [hdf5]")


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "walk.hdf5"
    with h5py.File(path, "w") as file:
        for key, shape in {"observations": (40, 3), "actions": (40, 2), "rewards": (40,)}.items():
            file[key] = rng.normal(size=shape).astype(np.float32)
        file["terminals"] = np.arange(40) % 10 == 9
    return path


def run(*argv: Any) -> int:
    return cli.main(["data", *map(str, argv)])


def test_info_of_a_raw_file_and_of_its_conversion(raw: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("info", "--source", raw) == 0
    printed = capsys.readouterr().out
    for line in ("kind: raw, d4rl", "observation_dim: 3", "action_dim: 2", "steps: 40", "array rewards: float32 (40,)"):
        assert f"  {line}\n" in printed
    assert not (tmp_path / "cache").exists(), "info converted the file"
    assert run("convert", "--source", raw, "--output-dir", tmp_path / "walk") == 0
    assert json.loads(capsys.readouterr().out)["count"] == 4
    assert run("info", "--source", tmp_path / "walk") == 0
    printed = capsys.readouterr().out
    for line in ("kind: converted", "source format: d4rl", "source name: walk.hdf5", "steps: 40", "episodes: 4"):
        assert f"  {line}\n" in printed
    assert run("convert", "--source", raw, "--output-dir", tmp_path / "walk") == 2
    assert "is there already" in capsys.readouterr().err


def test_options_reach_the_reader(raw: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("stats", "--source", raw, "--max-episode-steps", 5) == 0
    statistics = json.loads(capsys.readouterr().out)
    assert statistics["episodes"]["length"] == {"min": 4, "max": 4, "mean": 4.0}
    expected = load_episodes(raw, max_episode_steps=5)
    np.testing.assert_allclose(statistics["columns"]["actions"]["mean"], expected.actions.mean(0), rtol=1e-5)
    assert statistics["episodes"]["return"]["mean"] == pytest.approx(expected.returns().mean())
    assert run("stats", "--source", raw, "--filter-key", "train") == 2
    assert "the reader of d4rl has no option filter_key" in capsys.readouterr().err.lower()


def test_a_view_has_frames_where_there_are_images(raw: Path, tmp_path: Path) -> None:
    assert run("view", "--source", raw, "--output", tmp_path / "plain.png") == 0
    episodes = load_episodes(raw)
    red = np.zeros((40, 8, 8, 3), np.uint8)
    red[..., 0] = 255
    arrays = {name: getattr(episodes, name) for name in Episodes.__dataclass_fields__}
    Episodes(**{**arrays, "images": {"camera": red}}).to_dataset().save_to_disk(tmp_path / "seen")
    assert run("view", "--source", tmp_path / "seen", "--output", tmp_path / "seen.png") == 0
    plain, seen = (matplotlib.image.imread(tmp_path / name)[..., :3] for name in ("plain.png", "seen.png"))
    assert seen.shape[0] > plain.shape[0]
    is_red = (seen == [1, 0, 0]).all(-1)
    assert is_red.sum() > 10_000
    assert not (plain == [1, 0, 0]).all(-1).any()


def test_what_data_goes_on_with(capsys: Any) -> None:
    assert cli.main(["data"]) == 2
    assert "`data` goes on with collect, convert, export, info" in capsys.readouterr().err
    assert cli.main(["data", "inf"]) == 2
    assert "`data inf` is not a command (did you mean `data info`" in capsys.readouterr().err
    assert run("info", "--source", "nowhere.hdf5", "--format", "d4rl") == 2
    assert "`nowhere.hdf5` does not exist" in capsys.readouterr().err


def test_export_and_view_of_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "dmc_hub.tasks.table.make_nav1d_dataset",
        lambda variant, num_episodes, seed: make_nav1d_dataset(variant, num_episodes=20, seed=seed),
    )
    assert run("export", "--task", "nav1d-full", "--output-dir", tmp_path / "nav") == 0
    assert run("view", "--source", tmp_path / "nav", "--split", "validation", "--output", tmp_path / "nav.png") == 0
    assert matplotlib.image.imread(tmp_path / "nav.png").std() > 0.01
