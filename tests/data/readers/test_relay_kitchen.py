"""relay-kitchen's arrays, in both layouts that are about."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmc_hub.data import convert, load_episodes, open_source
from tests.data.readers.files import steps

LENGTHS = [6, 3, 5]


def write(folder: Path, time_axis: int, **changes: Any) -> Path:
    mask = np.arange(7) < np.array(LENGTHS)[:, None]
    arrays = {
        "observations_seq": steps(3, 7, 60).astype(np.float64),
        "actions_seq": steps(3, 7, 9).astype(np.float64),
        "existence_mask": mask.astype(np.float64),
        **changes,
    }
    folder.mkdir()
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", np.moveaxis(values, 1, time_axis) if values.ndim > 1 else values)
    return folder


@pytest.mark.parametrize("time_axis", [0, 1])
def test_rows_are_those_under_the_mask(tmp_path: Path, time_axis: int) -> None:
    episodes = load_episodes(write(tmp_path / "kitchen", time_axis), reward="zero", terminal=True)
    assert episodes.episode_lengths.tolist() == LENGTHS
    # Diffusion Policy's KitchenLowdimDataset, which has the episodes on the first axis
    parts = [steps(3, 7, 60)[i, :length] for i, length in enumerate(LENGTHS)]
    np.testing.assert_array_equal(episodes.observations, np.concatenate(parts))
    following = [np.concatenate([part[1:], part[-1:]]) for part in parts]
    np.testing.assert_array_equal(episodes.next_observations, np.concatenate(following))
    actions = [steps(3, 7, 9)[i, :length] for i, length in enumerate(LENGTHS)]
    np.testing.assert_array_equal(episodes.actions, np.concatenate(actions))
    assert np.flatnonzero(episodes.terminations).tolist() == [5, 8, 13]


def test_a_mask_that_does_not_tell(tmp_path: Path) -> None:
    folder = write(tmp_path / "kitchen", 1, existence_mask=np.ones((3, 7)))
    refuse(folder, "'existence_mask.npy' is ones and then zeros along either axis: give `time_axis`")
    assert load_episodes(folder, reward="zero", time_axis=1).episode_lengths.tolist() == [7, 7, 7]
    assert load_episodes(folder, reward="zero", time_axis=0).episode_lengths.tolist() == [3] * 7
    broken = write(tmp_path / "broken", 1, existence_mask=np.eye(3, 7))
    refuse(broken, "is ones and then zeros along no axis")
    refuse(broken, "is not ones and then zeros along axis 1", time_axis=1)


def refuse(folder: Path, message: str, **options: Any) -> None:
    output = folder.parent / "out"
    output.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message) as error:
        convert(open_source(folder, "relay-kitchen", **{"reward": "zero", **options}), output / "data")
    assert folder.name in str(error.value)
    assert list(output.iterdir()) == [], "conversion left something behind"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions_seq": steps(3, 6, 9)}, "must agree in time and episode, got the shapes"),
        ({"actions_seq": steps(3)}, r"actions_seq.npy` has the shape \(3,\)"),
        ({"actions_seq": np.full((3, 7, 9), np.nan)}, r"'actions_seq.npy' \(actions\) has NaN .* episode 0, step 0"),
        ({"actions_seq": np.full((3, 7, 9), "x")}, "'actions_seq.npy' must hold numbers"),
        ({"existence_mask": np.arange(7) < np.array([[6], [0], [5]])}, "gives episode 1 no steps"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    refuse(write(tmp_path / "bad", 1, **changes), message)


def test_damaged_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "bad", 0)
    refuse(folder, "has no rewards: give `reward`", reward=None)
    path = folder / "observations_seq.npy"
    path.write_bytes(path.read_bytes()[:-100])
    refuse(folder, "observations_seq.npy` is not a whole npy file")
    np.save(path, np.array([{}]), allow_pickle=True)
    refuse(folder, "observations_seq.npy` is not a whole npy file of numbers: .*Python objects")
    path.unlink()
    refuse(folder, "lacks 'observations_seq.npy'")
