"""D4RL's files: the same rows as h5py's and as `d4rl.qlearning_dataset`, and no trust in what they declare."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmc_hub.data import Episodes, convert, load_episodes, open_source
from dmc_hub.data.readers import d4rl, hdf5
from tests.data.readers.files import steps

h5py = pytest.importorskip("h5py", reason="HDF5 is the extra [hdf5]")


def write(path: Path, arrays: dict[str, Any], **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            file.create_dataset(key, data=values, **options)
    return path


def rows(count: Any = 12, **changes: Any) -> dict[str, Any]:
    """Rows without `next_observations`: a terminal at row 3, a time-out at row 7, and an unfinished rest."""
    arrays: dict[str, Any] = {
        "observations": steps(count, 4),
        "actions": steps(count, 2),
        "rewards": steps(count),
        "terminals": np.arange(count) == 3,
        "timeouts": np.arange(count) == 7,
    }
    arrays |= changes
    return {key: values for key, values in arrays.items() if values is not None}


def qlearning_dataset(arrays: dict[str, Any], max_episode_steps: int) -> dict[str, np.ndarray]:
    """What `d4rl.qlearning_dataset` computes, row by row, with `terminate_on_end=False`."""
    kept, following, episode_step = [], [], 0
    for i in range(len(arrays["rewards"]) - 1):
        done = bool(arrays["terminals"][i])
        final = bool(arrays["timeouts"][i]) if "timeouts" in arrays else episode_step == max_episode_steps - 1
        if final:
            episode_step = 0
            continue
        if done:
            episode_step = 0
        kept.append(i)
        following.append(arrays["observations"][i + 1])
        episode_step += not done
    return {
        "observations": arrays["observations"][kept],
        "actions": arrays["actions"][kept],
        "rewards": arrays["rewards"][kept].reshape(-1),
        "terminations": arrays["terminals"][kept].reshape(-1).astype(bool),
        "next_observations": np.array(following),
    }


def assert_is_qlearning_dataset(episodes: Episodes, arrays: dict[str, Any], max_episode_steps: int = -1) -> None:
    expected = qlearning_dataset(arrays, max_episode_steps)
    for name in ("observations", "actions", "rewards", "terminations"):
        np.testing.assert_array_equal(getattr(episodes, name), expected[name])
    inner = ~episodes.terminations  # D4RL gives a terminal row the next episode's first observation
    np.testing.assert_array_equal(episodes.next_observations[inner], expected["next_observations"][inner])
    np.testing.assert_array_equal(episodes.next_observations[~inner], episodes.observations[~inner])


@pytest.mark.parametrize("name", ["random", "expert"])
def test_hopper_is_what_h5py_reads(name: str, real_file: Callable[[str], Path]) -> None:
    path = real_file(f"hopper/hopper-{name}.hdf5")
    episodes = load_episodes(path)
    with h5py.File(path) as file:
        for key in ("observations", "actions", "rewards", "next_observations"):
            np.testing.assert_array_equal(getattr(episodes, key), file[key][:])
        terminals, timeouts, rewards = file["terminals"][:], file["timeouts"][:], file["rewards"][:]
    np.testing.assert_array_equal(episodes.terminations, terminals)
    np.testing.assert_array_equal(episodes.truncations, timeouts)
    ends = np.flatnonzero(terminals | timeouts) + 1
    np.testing.assert_array_equal(episodes.episode_ends, ends)
    expected = [part.sum(dtype=np.float64) for part in np.split(rewards, ends[:-1])]
    np.testing.assert_allclose(episodes.returns(), expected)


def test_without_next_observations_it_is_qlearning_dataset(tmp_path: Path) -> None:
    episodes = load_episodes(write(tmp_path / "a.hdf5", rows()))
    assert_is_qlearning_dataset(episodes, rows())
    assert episodes.episode_lengths.tolist() == [4, 3, 3]
    assert np.flatnonzero(episodes.terminations).tolist() == [3]
    assert np.flatnonzero(episodes.truncations).tolist() == [6, 9]


def test_a_terminal_at_a_time_out_is_left_out_as_in_qlearning_dataset(tmp_path: Path) -> None:
    arrays = rows(terminals=np.isin(np.arange(12), [3, 7]))
    assert_is_qlearning_dataset(load_episodes(write(tmp_path / "a.hdf5", arrays)), arrays)


def test_without_timeouts_the_limit_cuts(tmp_path: Path) -> None:
    """Kitchen's files, whose limit is the environment's; the terminal comes before the limit."""
    arrays = rows(30, timeouts=None)
    path = write(tmp_path / "a.hdf5", arrays)
    episodes = load_episodes(path, max_episode_steps=5)
    assert_is_qlearning_dataset(episodes, arrays, max_episode_steps=5)
    assert episodes.episode_lengths.tolist() == [4, 4, 4, 4, 4, 4]
    assert load_episodes(path).episode_lengths.tolist() == [4, 25]


def test_columns_of_one_are_squeezed_as_in_d4rl(tmp_path: Path) -> None:
    arrays = rows(rewards=steps(12, 1), terminals=(np.arange(12) == 3)[:, None])
    assert_is_qlearning_dataset(load_episodes(write(tmp_path / "a.hdf5", arrays)), arrays)


def test_a_jump_between_rows_ends_an_episode(tmp_path: Path) -> None:
    observations = steps(6, 4)
    following = np.concatenate([observations[1:], steps(1, 4, seed=1)])
    following[1] += 1e-3
    arrays = rows(6, observations=observations, next_observations=following, timeouts=None)
    episodes = load_episodes(write(tmp_path / "a.hdf5", arrays))
    assert episodes.episode_ends.tolist() == [2, 4, 6]
    assert np.flatnonzero(episodes.truncations).tolist() == [1, 5]
    np.testing.assert_array_equal(episodes.next_observations, following)


def test_time_outs_stay_apart_from_terminals(tmp_path: Path) -> None:
    both = np.arange(12) == 3
    arrays = rows(next_observations=steps(12, 4), timeouts=both, observations=steps(12, 4, seed=1))
    arrays["next_observations"][:-1] = arrays["observations"][1:]
    episodes = load_episodes(write(tmp_path / "a.hdf5", arrays))
    assert np.flatnonzero(episodes.terminations).tolist() == [3]
    assert np.flatnonzero(episodes.truncations).tolist() == [3, 11]


def test_goals_of_antmaze(tmp_path: Path) -> None:
    goal = np.repeat(steps(2, 2), 6, axis=0)
    path = write(tmp_path / "a.hdf5", rows(timeouts=None, terminals=np.zeros(12, bool), **{"infos/goal": goal}))
    assert load_episodes(path).episode_lengths.tolist() == [11]
    episodes = load_episodes(path, append_goal=True)
    assert episodes.episode_lengths.tolist() == [5, 5]
    np.testing.assert_array_equal(episodes.observations[:, :4], steps(12, 4)[[0, 1, 2, 3, 4, 6, 7, 8, 9, 10]])
    np.testing.assert_array_equal(episodes.observations[:, 4:], goal[[0, 1, 2, 3, 4, 6, 7, 8, 9, 10]])
    np.testing.assert_array_equal(episodes.next_observations[:, 4:], episodes.observations[:, 4:])


@pytest.mark.parametrize("with_next", [False, True])
def test_slices_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_next: bool) -> None:
    rng = np.random.default_rng(0)
    arrays = rows(500, terminals=rng.random(500) < 0.05, timeouts=rng.random(500) < 0.05)
    if with_next:
        arrays["next_observations"] = np.roll(arrays["observations"], -1, axis=0)
        arrays["next_observations"][::50] = 0
    path = write(tmp_path / "a.hdf5", arrays)
    whole = load_episodes(path)
    monkeypatch.setattr(hdf5, "BLOCK_BYTES", 7 * 60)
    assert len(list(hdf5.row_blocks({"a": h5py.File(path)["observations"]}))) > 10
    sliced = Episodes.concatenate(*open_source(path).episodes())
    for name in ("observations", "next_observations", "rewards", "terminations", "truncations", "episode_ends"):
        np.testing.assert_array_equal(getattr(sliced, name), getattr(whole, name))


# ---- Bad input -----------------------------------------------------------------------------------------------


def refuse(path: Path, output_dir: Path, message: str, **options: Any) -> None:
    before = sorted(output_dir.parent.iterdir())
    with pytest.raises(ValueError, match=message) as error:
        convert(open_source(path, "d4rl", **options), output_dir)
    assert path.name in str(error.value)
    assert sorted(output_dir.parent.iterdir()) == before, "conversion left something behind"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rewards": None},
            r"lacks the array 'rewards'; it has \['actions', 'observations', 'terminals', 'timeouts'\]",
        ),
        ({"observations": np.full((12, 4), b"x")}, r"'observations' must hold numbers, but has the type \|S1"),
        ({"actions": steps(11, 2)}, r"'actions' has the shape \(11, 2\), but 'rewards' has 12 rows"),
        (
            {"rewards": np.where(np.arange(12) == 5, np.nan, 0)},
            r"'rewards' has NaN or infinite values .*first at episode 1, step 1",
        ),
        (
            {"observations": np.full((12, 4), 1e300)},
            r"'observations' has NaN or infinite values \(in float32\), first at episode 0, step 0",
        ),
        ({"terminals": np.array(1)}, r"'terminals' has the shape \(\)"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "out").mkdir()
    refuse(write(tmp_path / "bad.hdf5", rows(**changes)), tmp_path / "out/data", message)


def test_what_is_not_hdf5(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    path = tmp_path / "bad.hdf5"
    path.write_bytes(b"hello")
    refuse(path, tmp_path / "out/data", "is not an HDF5 file")
    write(path, rows(2000))
    path.write_bytes(path.read_bytes()[:-1000])
    refuse(path, tmp_path / "out/data", "is not a whole HDF5 file: .*truncated")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_source(tmp_path / "nowhere.hdf5")


def test_a_damaged_chunk(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    path = write(tmp_path / "bad.hdf5", rows(2000, terminals=np.arange(2000) % 10 == 9), compression="gzip")
    with h5py.File(path) as file:
        offset = file["rewards"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 64] = bytes(64)
    path.write_bytes(content)
    refuse(path, tmp_path / "out/data", "'rewards' cannot be read from row 0: .*damaged")


def test_a_small_file_that_declares_gigabytes(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    path = tmp_path / "bomb.hdf5"
    with h5py.File(path, "w") as file:
        for key, shape in {"observations": (10**8, 20), "actions": (10**8, 1), "rewards": (10**8,)}.items():
            file.create_dataset(key, shape=shape, dtype="f4", chunks=(1000, *shape[1:]))
        file.create_dataset("terminals", shape=(10**8,), dtype=bool, chunks=(1000,))
    assert path.stat().st_size < 10_000
    refuse(path, tmp_path / "out/data", r"declares 8,900,000,000, most of them in 'observations'")
    with h5py.File(path, "w") as file:
        for key, values in rows().items():
            file.create_dataset(key, data=values)
        del file["rewards"]
        file.create_dataset("rewards", shape=(12,), maxshape=(None,), dtype="f4", chunks=(10**8,))
    refuse(path, tmp_path / "out/data", r"'rewards' has chunks of \(100000000,\), more than 256 MiB")


def test_links_out_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "other.hdf5", rows())
    arrays = rows(rewards=None)
    path = write(tmp_path / "bad.hdf5", arrays)
    with h5py.File(path, "a") as file:
        file["rewards"] = h5py.ExternalLink("other.hdf5", "/rewards")
    refuse(path, tmp_path / "out/data", "'rewards' is a link to '/rewards'")
    write(path, arrays)
    with h5py.File(path, "a") as file:
        file.create_dataset("rewards", (12,), "f4", external=[(str(tmp_path / "other.hdf5"), 0, 48)])
    refuse(path, tmp_path / "out/data", "'rewards' is stored outside the file")
    write(path, arrays)
    with h5py.File(path, "a") as file:
        layout = h5py.VirtualLayout((12,), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.hdf5"), "rewards", (12,))
        file.create_virtual_dataset("rewards", layout)
    refuse(path, tmp_path / "out/data", "'rewards' is stored outside the file")


def test_an_episode_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(hdf5, "BLOCK_BYTES", 100)
    monkeypatch.setattr("dmc_hub.data.readers.source.MAX_EPISODE_BYTES", 1000)
    path = write(tmp_path / "bad.hdf5", rows(2000, terminals=np.zeros(2000, bool), timeouts=None))
    refuse(path, tmp_path / "out/data", "marks an episode of more than")
    assert len(list(d4rl.D4RLSource(path=path, max_episode_steps=10).episodes())) == 200


def test_wrong_options(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", rows())
    with pytest.raises(ValueError, match=r"has no option rate; its options are max_episode_steps, append_goal"):
        open_source(path, rate=1)
    with pytest.raises(ValueError, match="`max_episode_steps` must be at least 1, got 0"):
        open_source(path, max_episode_steps=0)
    with pytest.raises(ValueError, match="`format` 'xml' is unknown; formats are d4rl"):
        open_source(path, "xml")
    with pytest.raises(ValueError, match="lacks the array 'infos/goal'"):
        load_episodes(path, append_goal=True)
