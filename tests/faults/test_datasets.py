"""Every seeded defect of data is found and placed, sound data have none, and training refuses."""

from pathlib import Path

import numpy as np
import pytest

from dmc_hub.cli import main
from dmc_hub.data import DEFECTS, DatasetDefectsError, load_episodes, refuse_defects, validate_dataset
from dmc_hub.data.loading import check_card
from tests.faults.dataset_defects import BOUNDS, CASES, sound


@pytest.mark.parametrize("name", CASES)
def test_a_defect_is_found_and_placed(name: str) -> None:
    make, kind, where = CASES[name]
    found = [defect for defect in validate_dataset(make(), action_bounds=BOUNDS) if defect.kind == kind]
    assert len(found) == 1
    assert where in found[0].message


def test_every_kind_has_a_case() -> None:
    assert {kind for _, kind, _ in CASES.values()} | {"missing-shard"} == set(DEFECTS)


def test_sound_data_have_no_defect() -> None:
    assert validate_dataset(sound(), action_bounds=BOUNDS) == []
    assert validate_dataset(sound().to_dataset(), action_bounds=BOUNDS) == []


def test_only_allowed_kinds_pass() -> None:
    make, kind, _ = CASES["a reward of 1e9"]
    defects = validate_dataset(make(), action_bounds=BOUNDS)
    assert refuse_defects("x", defects, [kind]) == defects
    with pytest.raises(DatasetDefectsError, match=r"`x` has defects: huge-value: .* `--allow-defects huge-value`"):
        refuse_defects("x", defects, ["no-end"])
    with pytest.raises(ValueError, match="`allow_defects` has typo"):
        refuse_defects("x", [], ["typo"])


def test_the_command_lists_all_defects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CASES["an episode twice"][0]().save_to_disk(tmp_path / "data")
    source = ["--source", str(tmp_path / "data"), "--task", "nav1d-full"]
    capsys.readouterr()
    assert main(["data", "validate", *source]) == 2
    captured = capsys.readouterr()
    assert "duplicate-episode: 1 in all, first episode 3, which is episode 1 again" in captured.out
    assert captured.err.count("\n") == 1
    assert main(["data", "validate", *source, "--allow-defects", "duplicate-episode"]) == 0
    sound().to_dataset().save_to_disk(tmp_path / "sound")
    assert main(["data", "validate", "--source", str(tmp_path / "sound"), "--task", "nav1d-full"]) == 0


def test_training_refuses_unless_it_is_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CASES["an action outside the space"][0]().save_to_disk(tmp_path / "data")
    command = ["train-denoising", "--task", "nav1d-full", "--data", str(tmp_path / "data"), "--max-steps", "1"]
    command += ["--output-dir", str(tmp_path / "run"), "--disable-tqdm", "true"]
    assert main(command) == 2
    assert "action-out-of-range: an action is outside the space in 1 steps, first at episode 2, step 3" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
    assert main([*command, "--allow-defects", "action-out-of-range", "broken-transition"]) == 0


def test_a_missing_shard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "d").mkdir()
    for index, rows in enumerate(np.split(np.arange(40), [16, 24])):
        sound().to_dataset().select(rows).to_parquet(tmp_path / "d" / f"train-{index:05d}-of-00003.parquet")
    assert load_episodes(tmp_path / "d").num_episodes == 5
    (tmp_path / "d" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DatasetDefectsError, match=r"train-00001-of-00003\.parquet` is missing"):
        load_episodes(tmp_path / "d")
    assert main(["data", "validate", "--source", str(tmp_path / "d")]) == 2


@pytest.mark.parametrize(
    "entry",
    [
        "data_files: ../../secret/*.parquet",
        "data_files: [{split: train, path: /etc/passwd}]",
        "data_files: {train: [a.parquet, ../b.parquet]}",
        "data_dir: ..",
        "data_files: https://example.org/x.parquet",
        "data_files: ~/x.parquet",
    ],
)
def test_a_card_that_reads_elsewhere_is_refused(entry: str, tmp_path: Path) -> None:
    sound().to_dataset().to_parquet(tmp_path / "d" / "train-00000-of-00001.parquet")
    card = f"---\nconfigs:\n- config_name: default\n  {entry}\n---\nhello"
    (tmp_path / "d" / "README.md").write_text(card)
    with pytest.raises(ValueError, match=r"README\.md names the data file .*, outside the folder"):
        load_episodes(tmp_path / "d")


def test_a_card_without_a_header_or_with_a_broken_one(tmp_path: Path) -> None:
    check_card("hello", "x")
    check_card("---\nlicense: mit\nconfigs:\n- data_files: [{split: train, path: data/train-*.parquet}]\n---\n", "x")
    with pytest.raises(ValueError, match=r"`x`: the header of README\.md is not YAML"):
        check_card("---\n[broken\n---\n", "x")
