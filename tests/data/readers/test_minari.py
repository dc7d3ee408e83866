"""Minari datasets: the same rows as Minari's own reader, and as gymnasium flattens them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from dmc_hub.data import convert, load_episodes, open_source

minari = pytest.importorskip("minari", reason="Minari is the extra [minari]")
h5py = pytest.importorskip("h5py", reason="HDF5 is the extra [hdf5]")
pytestmark = pytest.mark.filterwarnings("ignore")  # Minari asks for author, code and e-mail

VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float64)
DICT = spaces.Dict(
    {
        "observation": spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
        "achieved": spaces.Dict({"y": spaces.Box(-9, 9, (1,)), "x": spaces.Box(-9, 9, (2,))}),
    }
)
IMAGES = spaces.Dict({"state": spaces.Box(-9, 9, (2,)), "camera": spaces.Box(0, 255, (8, 6, 3), np.uint8)})


@pytest.fixture(params=["hdf5", "arrow"])
def data_format(request: pytest.FixtureRequest) -> str:
    if request.param == "arrow":
        pytest.importorskip("pyarrow")
    return str(request.param)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def collect(space: spaces.Space[Any], data_format: str = "hdf5") -> Any:
    """Episodes of 3, 4, 5, 6 and 3 steps; every second one is cut."""
    from minari.data_collector import EpisodeBuffer

    action_space = spaces.Box(-1, 1, (2,), np.float32)
    space.seed(0)
    action_space.seed(0)
    buffers = []
    for index in range(5):
        count = 3 + index % 4
        samples: Any = [space.sample() for _ in range(count + 1)]
        is_last = np.arange(count) == count - 1
        buffers.append(
            EpisodeBuffer(
                id=index,
                observations=stack(samples),
                actions=np.stack([action_space.sample() for _ in range(count)]),
                rewards=list(np.linspace(index, index + 1, count)),
                terminations=list(is_last & (index % 2 == 0)),
                truncations=list(is_last & (index % 2 == 1)),
            )
        )
    return minari.create_dataset_from_buffers(
        "walk/random-v0",
        buffers,
        observation_space=space,
        action_space=action_space,
        data_format=data_format,
        description="x",
    )


def stack(samples: list[Any]) -> Any:
    if isinstance(samples[0], dict):
        return {key: stack([sample[key] for sample in samples]) for key in samples[0]}
    return np.stack(samples)


@pytest.mark.parametrize("space", [VECTOR, DICT], ids=["vector", "dict"])
def test_rows_are_those_that_minari_reads(root: Path, data_format: str, space: spaces.Space[Any]) -> None:
    dataset = collect(space, data_format)
    episodes = load_episodes(root / "walk/random-v0")
    starts = episodes.episode_starts
    assert episodes.num_episodes == dataset.total_episodes == 5
    assert episodes.num_steps == dataset.total_steps
    for start, end, expected in zip(starts, episodes.episode_ends, dataset.iterate_episodes(), strict=True):
        states = [expected.observations] if space is VECTOR else None
        if states is None:
            count = len(expected.rewards) + 1
            flat: Any = [
                spaces.flatten(
                    space,
                    {
                        "observation": expected.observations["observation"][i],
                        "achieved": {key: expected.observations["achieved"][key][i] for key in ("x", "y")},
                    },
                )
                for i in range(count)
            ]
            states = [np.stack(flat)]
        np.testing.assert_array_equal(episodes.observations[start:end], states[0][:-1].astype(np.float32))
        np.testing.assert_array_equal(episodes.next_observations[start:end], states[0][1:].astype(np.float32))
        np.testing.assert_array_equal(episodes.actions[start:end], expected.actions)
        np.testing.assert_array_equal(episodes.rewards[start:end], np.float32(expected.rewards))
        np.testing.assert_array_equal(episodes.terminations[start:end], expected.terminations)
        np.testing.assert_array_equal(episodes.truncations[start:end], expected.truncations)


def test_by_id_and_by_keys(root: Path) -> None:
    dataset = collect(DICT)
    episodes = load_episodes("walk/random-v0", format="minari", observation_keys=("achieved/y",))
    expected = [episode.observations["achieved"]["y"][:-1] for episode in dataset.iterate_episodes()]
    np.testing.assert_array_equal(episodes.observations, np.concatenate(expected))
    refuse(root / "walk/random-v0", r"lack \['goal'\]; they have \['achieved/x', ", observation_keys=("goal",))


def test_images_are_kept(root: Path) -> None:
    pytest.importorskip("PIL")
    dataset = collect(IMAGES)
    episodes = load_episodes(root / "walk/random-v0", image_keys=("camera",))
    assert episodes.observation_dim == 2
    expected = [episode.observations["camera"][:-1] for episode in dataset.iterate_episodes()]
    np.testing.assert_array_equal(episodes.images["camera"], np.concatenate(expected))


def refuse(folder: Path, message: str, **options: Any) -> None:
    output = folder.parent / "out"
    output.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message) as error:
        convert(open_source(folder, "minari", **options), output / "data")
    assert str(folder) in str(error.value)
    assert list(output.iterdir()) == [], "conversion left something behind"


def change(folder: Path, key: str, values: Any) -> None:
    with h5py.File(folder / "data/main_data.hdf5", "a") as file:
        del file[key]
        if values is not None:
            file[key] = values


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("episode_1/rewards", None, "episode 1 cannot be read: KeyError"),
        ("episode_1/rewards", np.full(4, np.nan), "'rewards' has NaN or infinite .* episode 1, step 0"),
        ("episode_1/rewards", np.zeros(0), "'rewards' has no steps in episode 1"),
        ("episode_1/observations", np.zeros((4, 3)), "'observations' has 4 rows in episode 1 of 4 steps"),
        ("episode_1/terminations", np.ones(4, bool), "episode 1 ends at step 0, but has 4 steps"),
        (
            "episode_1/actions",
            h5py.ExternalLink("/etc/passwd", "/x"),
            "'episode_1/actions' is a link or stored outside",
        ),
    ],
)
def test_bad_arrays_are_named(root: Path, key: str, values: Any, message: str) -> None:
    collect(VECTOR)
    folder = root / "walk/random-v0"
    change(folder, key, values)
    refuse(folder, message)


def test_damaged_files(root: Path) -> None:
    collect(VECTOR)
    folder = root / "walk/random-v0"
    metadata = json.loads((folder / "data/metadata.json").read_text())
    without = {key: value for key, value in metadata.items() if key != "action_space"}
    (folder / "data/metadata.json").write_text(json.dumps({**without, "env_spec": '{"id": "evil:Env-v0"}'}))
    refuse(folder, "'data/metadata.json' lacks action_space")
    (folder / "data/metadata.json").write_text(json.dumps(metadata))
    path = folder / "data/main_data.hdf5"
    path.write_bytes(path.read_bytes()[:5000])
    refuse(folder, "main_data.hdf5` is not a whole HDF5 file")
    (folder / "data/metadata.json").unlink()
    refuse(folder, "lacks 'data/metadata.json'")


def test_discrete_spaces_are_refused(root: Path) -> None:
    collect(spaces.Dict({"a": spaces.Discrete(3)}))
    refuse(root / "walk/random-v0", "'a' is discrete; only vectors are supported")
