"""robomimic's files: the same rows as h5py's, filter keys, images, and what is named when they are bad."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmc_hub.data import convert, load_episodes, open_source
from tests.data.readers.files import steps

h5py = pytest.importorskip("h5py", reason="HDF5 is the extra [hdf5]")
LENGTHS = {0: 4, 1: 3, 2: 5, 10: 2}
WIDTHS = {"object": 10, "robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "robot0_joint_pos": 7}
DEFAULT_KEYS = list(WIDTHS)[:4]


def write(path: Path, *, next_obs: bool = True, dtype: Any = np.float64) -> Path:
    """As robomimic's converter writes: float64, dones and rewards 1 at success, mask with names as bytes."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = "{}"
        for number, length in LENGTHS.items():
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = length
            demo["actions"] = steps(length, 7, seed=number).astype(dtype)
            success = np.arange(length) >= length - 2 if number != 1 else np.zeros(length, bool)
            demo["rewards"] = success.astype(dtype)
            demo["dones"] = success.astype(np.int64)
            demo["states"] = steps(length, 20)
            for key, width in WIDTHS.items():
                states = steps(length + 1, width, seed=number).astype(dtype)
                demo[f"obs/{key}"] = states[:-1]
                if next_obs:
                    demo[f"next_obs/{key}"] = states[1:]
            pixels = np.random.default_rng(number).integers(0, 256, (length, 8, 8, 3))
            demo["obs/agentview_image"] = pixels.astype(np.uint8)
        file["mask/train"] = np.array([b"demo_10", b"demo_0", b"demo_2"])
        file["mask/valid"] = np.array([b"demo_1"])
    return path


@pytest.mark.parametrize("next_obs", [True, False])
def test_rows_are_those_of_the_file_in_the_order_of_robomimic(tmp_path: Path, next_obs: bool) -> None:
    path = write(tmp_path / "low_dim.hdf5", next_obs=next_obs)
    episodes = load_episodes(path, image_keys=("agentview_image",))
    assert episodes.episode_lengths.tolist() == [4, 3, 5, 2]
    assert np.flatnonzero(episodes.terminations).tolist() == [3, 11, 13]  # demo_1 never succeeds
    assert np.flatnonzero(episodes.truncations).tolist() == [6]
    with h5py.File(path) as file:
        demos = [file[f"data/demo_{number}"] for number in LENGTHS]
        observations = [np.concatenate([demo[f"obs/{key}"][:] for key in DEFAULT_KEYS], axis=1) for demo in demos]
        if next_obs:
            following = [np.concatenate([demo[f"next_obs/{k}"][:] for k in DEFAULT_KEYS], axis=1) for demo in demos]
        else:
            following = [np.concatenate([part[1:], part[-1:]]) for part in observations]
        for name, parts in {
            "observations": observations,
            "next_observations": following,
            "actions": [demo["actions"][:] for demo in demos],
            "rewards": [demo["rewards"][:] for demo in demos],
        }.items():
            np.testing.assert_array_equal(getattr(episodes, name), np.concatenate(parts).astype(np.float32))
        images = np.concatenate([demo["obs/agentview_image"][:] for demo in demos])
        np.testing.assert_array_equal(episodes.images["agentview_image"], images)


def test_filter_keys_and_observation_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "low_dim.hdf5")
    assert load_episodes(path, filter_key="train").episode_lengths.tolist() == [4, 5, 2]
    assert load_episodes(path, filter_key="valid").episode_lengths.tolist() == [3]
    chosen = load_episodes(path, observation_keys=("robot0_joint_pos", "robot0_eef_pos"))
    expected = np.concatenate([steps(5, 7, seed=0)[:-1], steps(5, 3, seed=0)[:-1]], axis=1)
    np.testing.assert_array_equal(chosen.observations[:4], expected)


def refuse(path: Path, message: str, **options: Any) -> None:
    output = path.parent / "out"
    output.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message) as error:
        convert(open_source(path, "robomimic", **options), output / "data")
    assert path.name in str(error.value)
    assert list(output.iterdir()) == [], "conversion left something behind"


def change(path: Path, key: str, values: Any) -> None:
    with h5py.File(path, "a") as file:
        del file[key]
        if values is not None:
            file[key] = values


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("data/demo_1/dones", None, "lacks the array 'data/demo_1/dones'"),
        ("data/demo_2/obs/object", steps(4, 10), "'data/demo_2/obs/object' has 4 rows, the actions have 5"),
        ("data/demo_2/obs/object", steps(5, 9), r"obs/object \+ .* has the shape \(5, 18\) in episode 2"),
        ("data/demo_1/rewards", np.full(3, np.nan), "'rewards' has NaN or infinite .* episode 1, step 0"),
        ("data/demo_1/actions", np.full((3, 7), b"a"), "'data/demo_1/actions' must hold numbers"),
        ("data/demo_0/obs/agentview_image", np.zeros((4, 8, 8, 3)), "must hold uint8 images"),
        ("mask/train", np.array([b"demo_7"]), r"'mask/train' names \['demo_7'\], which 'data' has not"),
        ("data/demo_1", steps(3), "lacks the array 'data/demo_1/actions'"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, key: str, values: Any, message: str) -> None:
    path = write(tmp_path / "bad.hdf5")
    change(path, key, values)
    refuse(path, message, image_keys=("agentview_image",), filter_key="train" if key == "mask/train" else None)


def test_an_empty_demonstration(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.hdf5")
    with h5py.File(path, "a") as file:
        demo = file["data/demo_1"]
        for key in ["actions", "rewards", "dones", *(f"{g}/{k}" for g in ("obs", "next_obs") for k in WIDTHS)]:
            empty = demo[key][:0]
            del demo[key]
            demo[key] = empty
    refuse(path, "'data/demo_1/actions' has no steps")


def test_unknown_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.hdf5")
    refuse(path, r"has no filter key 'test'; it has \['train', 'valid'\]", filter_key="test")
    refuse(path, r"'data/demo_0/obs' lacks \['gripper'\]; it has .*'object'", observation_keys=("gripper",))
    with h5py.File(path, "w") as file:
        file["data/demo_x/actions"] = steps(3)
    refuse(path, r"'data' must hold groups demo_0, demo_1, ...; it has \['demo_x'\]")
