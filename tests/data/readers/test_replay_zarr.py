"""Diffusion Policy's replay buffers, as a folder and as a zip: the same rows as zarr's own reader."""

import json
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmc_hub.data import Episodes, convert, load_episodes, open_source
from tests.data.readers.files import steps

zarr = pytest.importorskip("zarr", reason="zarr is the extra [zarr]")
ENDS = np.array([5, 6, 12])


def arrays(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {
        "data/state": steps(12, 5),
        "data/keypoint": steps(12, 9, 2),
        "data/action": steps(12, 2),
        "data/img": rng.integers(0, 256, (12, 4, 6, 3)).astype(np.float32),
        "meta/episode_ends": ENDS,
    }
    values |= changes
    return {key: value for key, value in values.items() if value is not None}


def write(path: Path, values: dict[str, Any]) -> Path:
    """A folder, or a zip if the name ends so; chunks of 4 rows in blosc, as Diffusion Policy writes them."""
    from numcodecs import Blosc

    folder = path.with_suffix("") if path.suffix == ".zip" else path
    group = zarr.open_group(folder, mode="w", zarr_format=2)
    for key, value in values.items():
        array = group.create_array(
            key,
            shape=value.shape,
            dtype=value.dtype,
            chunks=(4, *value.shape[1:]),
            compressors=Blosc("zstd", shuffle=2),
        )
        array[:] = value
    if path.suffix == ".zip":
        shutil.make_archive(str(folder), "zip", folder)
        shutil.rmtree(folder)
    return path


@pytest.mark.parametrize("name", ["replay.zarr", "replay.zarr.zip"])
def test_rows_are_those_of_the_file(tmp_path: Path, name: str) -> None:
    values = arrays()
    episodes = load_episodes(write(tmp_path / name, values), reward="zero", image_keys=("img",))
    np.testing.assert_array_equal(episodes.observations, values["data/state"])
    np.testing.assert_array_equal(episodes.actions, values["data/action"])
    np.testing.assert_array_equal(episodes.images["img"], values["data/img"])
    assert episodes.images["img"].dtype == np.uint8
    np.testing.assert_array_equal(episodes.episode_ends, ENDS)
    following = np.roll(values["data/state"], -1, axis=0)
    following[ENDS - 1] = values["data/state"][ENDS - 1]
    np.testing.assert_array_equal(episodes.next_observations, following)
    np.testing.assert_array_equal(np.flatnonzero(episodes.truncations), ENDS - 1)
    assert not episodes.terminations.any()
    assert not episodes.rewards.any()


def reward_of_test(observations: np.ndarray, actions: np.ndarray, next_observations: np.ndarray) -> np.ndarray:
    return observations[:, 0] + 10 * actions[:, 1] + 100 * next_observations[:, 2]


def test_options(tmp_path: Path) -> None:
    values = arrays()
    path = write(tmp_path / "replay.zarr", values)
    episodes = load_episodes(
        path, observation_keys=("keypoint", "state"), action_key="state", reward=reward_of_test, terminal=True
    )
    expected = np.concatenate([values["data/keypoint"].reshape(12, 18), values["data/state"]], axis=1)
    np.testing.assert_array_equal(episodes.observations, expected)
    np.testing.assert_array_equal(episodes.actions, values["data/state"])
    np.testing.assert_array_equal(np.flatnonzero(episodes.terminations), ENDS - 1)
    assert not episodes.truncations.any()
    rewards = reward_of_test(episodes.observations, episodes.actions, episodes.next_observations)
    np.testing.assert_allclose(episodes.rewards, rewards, rtol=1e-6)
    rewarded = load_episodes(write(tmp_path / "rewarded.zarr", arrays(**{"data/reward": steps(12, 1, seed=1)})))
    np.testing.assert_array_equal(rewarded.rewards, steps(12, 1, seed=1)[:, 0])


def test_pusht_is_what_zarr_reads(real_file: Callable[[str], Path]) -> None:
    path = real_file("pusht/pusht_cchi_v7_replay.zarr.zip")
    episodes = load_episodes(path, reward="zero")
    group = zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")
    np.testing.assert_array_equal(episodes.observations, group["data/state"][:])
    np.testing.assert_array_equal(episodes.actions, group["data/action"][:])
    np.testing.assert_array_equal(episodes.episode_ends, group["meta/episode_ends"][:])
    assert (episodes.num_steps, episodes.num_episodes) == (25_650, 206)
    source = open_source(path, reward="zero", image_keys=("img",))
    images = next(iter(source.episodes())).images["img"]
    np.testing.assert_array_equal(images, group["data/img"][: len(images)])


def refuse(path: Path, message: str, **options: Any) -> None:
    output = path.parent / "out"
    output.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message) as error:
        convert(open_source(path, "zarr", **{"reward": "zero", **options}), output / "data")
    assert path.name in str(error.value)
    assert list(output.iterdir()) == [], "conversion left something behind"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data/action": None}, r"lacks the array 'data/action'; 'data' has \['img', 'keypoint', 'state'\]"),
        ({"data/state": steps(11, 5)}, "'data/state' has 11 rows, the actions have 12"),
        ({"meta/episode_ends": np.array([5, 5, 12])}, "'meta/episode_ends' gives episode 1 a length of 0"),
        ({"meta/episode_ends": np.array([5, 13])}, "'meta/episode_ends' ends at 13, but the actions have 12 rows"),
        ({"meta/episode_ends": np.array([5.0, 12.0])}, "'meta/episode_ends' must hold whole numbers"),
        ({"data/state": np.full((12, 5), np.inf)}, r"'data/state' \(observations\) has NaN or infinite .* step 0"),
        ({"data/state": np.full((12, 5), "x")}, "'data/state' must hold numbers, but has the type <U1"),
        ({"data/img": np.full((12, 4, 6, 3), 0.5)}, "'data/img' must hold pixels, whole numbers in 0..255"),
        ({"data/img": np.full((12, 4, 6, 4), 5.0)}, "'data/img' must hold images of shape"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr warns of strings
        path = write(tmp_path / "bad.zarr", arrays(**changes))
    refuse(path, message, image_keys=("img",))


def test_a_reward_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "replay.zarr", arrays())
    refuse(path, "lacks 'data/reward': give `reward`", reward=None)
    refuse(path, "`reward` must be 'zero' or a function, got 'one'|", reward=lambda o, a, n: np.zeros((len(o), 1)))
    with pytest.raises(ValueError, match="must be 'zero' or a function, got 'one'"):
        load_episodes(path, reward="one")


def test_damaged_files(tmp_path: Path) -> None:
    archive = write(tmp_path / "bad.zarr.zip", arrays())
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2])
    refuse(archive, "is not a whole zip file")
    folder = write(tmp_path / "bad.zarr", arrays())
    chunk = folder / "data/state/1.0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:20])
    refuse(folder, "'data/state': the chunk 'data/state/1.0' is damaged")
    chunk.unlink()
    refuse(folder, r"'data/state' lacks its chunk 'data/state/1.0'")
    chunk.write_bytes(whole)
    compressed = write(tmp_path / "also_bad.zarr", arrays(**{"data/state": np.tile(steps(1, 5), (12, 40))}))
    chunk = compressed / "data/state/1.0"
    chunk.write_bytes(chunk.read_bytes()[:16] + bytes(chunk.stat().st_size - 16))
    refuse(compressed, "'data/state' cannot be read from row 0")
    (folder / "data/state/.zarray").write_text("{")
    refuse(folder, "'data/state' has damaged metadata")


def change_metadata(folder: Path, **changes: Any) -> None:
    path = folder / "data/state/.zarray"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filters": [{"id": "pickle"}]}, r"'data/state' has the codecs \['blosc', 'pickle'\]"),
        ({"dtype": "|O"}, "'data/state' must hold numbers, but has the type object"),
        ({"shape": [10**9, 5], "chunks": [10**9, 5]}, "has chunks of .* more than 256 MiB each"),
        (
            {"shape": [10**9, 5], "chunks": [10**6, 5]},
            "lacks its chunk 'data/state/0.0'|the chunk 'data/state/0.0' is damaged",
        ),
        ({"shape": [-1, 5]}, r"has the shape \[-1, 5\]"),
        ({"shape": [10**11, 5], "chunks": [1, 5]}, "declares 100,000,000,000 chunks; up to 1,000,000 are read"),
        ({"shape": [float("inf"), 5]}, "'data/state' has damaged metadata"),
    ],
)
def test_nothing_is_read_that_metadata_should_not_say(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = write(tmp_path / "bad.zarr", arrays())
    change_metadata(folder, **changes)
    refuse(folder, message)


def test_zip_bombs_and_paths_outside(tmp_path: Path) -> None:
    folder = write(tmp_path / "replay.zarr", arrays())
    bomb = tmp_path / "bomb.zarr.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.rglob("*"):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())
        with archive.open("data/extra/0.0", "w") as entry:
            for _ in range(300):
                entry.write(bytes(1 << 20))
    assert bomb.stat().st_size < 1 << 20
    refuse(bomb, "declares 314,.* most of them in 'data/extra/0.0': a decompression bomb")
    outside = tmp_path / "outside.zarr.zip"
    with zipfile.ZipFile(outside, "w") as archive:
        archive.write(folder / "data/state/.zarray", "meta/episode_ends/.zarray")
        archive.writestr("data/../../evil", b"x")
    refuse(outside, r"has the entry 'data/../../evil', a path outside the folder")
    shutil.move(folder / "data/state/1.0", tmp_path / "elsewhere")
    (folder / "data/state/1.0").symlink_to(tmp_path / "elsewhere")
    refuse(folder, "has the link 'data/state/1.0' to outside the folder")


def test_a_zip_of_the_folder_itself(tmp_path: Path) -> None:
    folder = write(tmp_path / "inner" / "replay.zarr", arrays())
    path = Path(shutil.make_archive(str(tmp_path / "outer"), "zip", folder.parent))
    episodes: Episodes = load_episodes(path, reward="zero")
    np.testing.assert_array_equal(episodes.observations, arrays()["data/state"])
