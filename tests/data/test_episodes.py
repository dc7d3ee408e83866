import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

from dmc_hub.data import Episodes, episode_features
from dmc_hub.data.episodes import COLUMNS


def make_episodes(lengths: tuple[int, ...] = (3, 2), observation_dim: int = 2) -> Episodes:
    """Observations count steps: all entries are the step's index, and 100 more in the next one."""
    steps = np.arange(sum(lengths), dtype=np.float32)
    ends = np.cumsum(lengths)
    terminations = np.zeros(len(steps), dtype=bool)
    terminations[ends - 1] = True
    terminations[-1] = False
    truncations = np.zeros(len(steps), dtype=bool)
    truncations[-1] = True
    return Episodes(
        observations=np.stack([steps] * observation_dim, axis=1),
        actions=-steps[:, None] - 1,
        rewards=steps / 2,
        next_observations=np.stack([steps + 100] * observation_dim, axis=1),
        terminations=terminations,
        truncations=truncations,
        episode_ends=ends.astype(np.int64),
    )


def rows(**changes: Any) -> dict[str, list[Any]]:
    """Two episodes as columns, with some columns replaced."""
    columns = make_episodes().to_dataset().to_dict()
    return {**columns, **changes}


def from_rows(features: datasets.Features | None = None, **changes: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict(rows(**changes), features=features or episode_features(2, 1))


def assert_equal(left: Episodes, right: Episodes) -> None:
    assert left.images.keys() == right.images.keys()
    for name in Episodes.__dataclass_fields__.keys() - {"images"}:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
        assert getattr(left, name).dtype == getattr(right, name).dtype


def test_dataset_round_trip() -> None:
    episodes = make_episodes()
    dataset = episodes.to_dataset()
    assert dataset.features == episode_features(2, 1)
    assert_equal(Episodes.from_dataset(dataset), episodes)


def test_saved_dataset_stays_memory_mapped(tmp_path: Path) -> None:
    make_episodes().to_dataset().save_to_disk(tmp_path)
    dataset = datasets.load_from_disk(tmp_path)
    episodes = Episodes.from_dataset(dataset)
    allocated = pa.total_allocated_bytes()
    again = Episodes.from_dataset(dataset)
    assert pa.total_allocated_bytes() - allocated < 1024
    for name in ("observations", "actions", "next_observations", "rewards"):
        assert np.shares_memory(getattr(episodes, name), getattr(again, name))
        assert not getattr(episodes, name).flags.writeable


def test_several_chunks_and_selected_rows_are_read_in_order() -> None:
    dataset = make_episodes().to_dataset()
    second = dataset.map(lambda row: {"episode_ids": row["episode_ids"] + 2}, features=dataset.features)
    both = datasets.concatenate_datasets([dataset, second])
    assert_equal(Episodes.from_dataset(both), Episodes.concatenate(make_episodes(), make_episodes()))
    last_episode = Episodes.from_dataset(dataset.select([3, 4]))
    np.testing.assert_array_equal(last_episode.observations[:, 0], [3, 4])
    np.testing.assert_array_equal(last_episode.episode_ends, [2])


def test_sizes_and_returns() -> None:
    episodes = make_episodes()
    assert (episodes.num_steps, episodes.num_episodes) == (5, 2)
    assert (episodes.observation_dim, episodes.action_dim) == (2, 1)
    np.testing.assert_allclose(episodes.returns(), [0 + 0.5 + 1, 1.5 + 2])


@pytest.mark.parametrize("as_indices", [np.array, torch.tensor])
def test_transitions_gather_single_steps(
    as_indices: Callable[[list[int]], np.ndarray | torch.Tensor],
) -> None:
    batch = make_episodes().transitions(as_indices([4, 2]))
    assert all(value.dtype == torch.float32 for value in batch.values())
    torch.testing.assert_close(batch["observations"], torch.tensor([[4.0, 4.0], [2.0, 2.0]]))
    torch.testing.assert_close(batch["actions"], torch.tensor([[-5.0], [-3.0]]))
    torch.testing.assert_close(batch["rewards"], torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(batch["next_observations"][:, 0], torch.tensor([104.0, 102.0]))
    torch.testing.assert_close(batch["terminations"], torch.tensor([0.0, 1.0]))


def test_windows_are_padded_past_the_end_of_their_episode() -> None:
    windows = make_episodes().windows(4)
    assert len(windows) == 5
    # the first episode has steps 0, 1, 2 and ends in observation 102; the second has 3, 4 and ends in 104
    batch = windows.gather(torch.tensor([1, 3, 0]))
    expected = torch.tensor([[1.0, 2, 102, 102], [3, 4, 104, 104], [0, 1, 2, 102]])
    torch.testing.assert_close(batch["observations"], expected[..., None].expand(-1, -1, 2))
    torch.testing.assert_close(
        batch["actions"][..., 0], torch.tensor([[-2.0, -3, 0, 0], [-4, -5, 0, 0], [-1, -2, -3, 0]])
    )
    torch.testing.assert_close(batch["rewards"], torch.tensor([[0.5, 1, 0, 0], [1.5, 2, 0, 0], [0, 0.5, 1, 0]]))
    assert batch["valid"].tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [True, True, True, False],
    ]
    assert {value.dtype for name, value in batch.items() if name != "valid"} == {torch.float32}


def test_windows_of_a_random_set_agree_with_a_loop() -> None:
    rng = np.random.default_rng(0)
    episodes = make_episodes(tuple(rng.integers(1, 9, 30)))
    horizon = 5
    batch = episodes.windows(horizon).gather(np.arange(episodes.num_steps))
    for end, start in zip(episodes.episode_ends, episodes.episode_starts, strict=True):
        for step in range(start, end):
            inside = list(range(step, min(step + horizon, end)))
            padded = [float(index) for index in inside] + [end - 1 + 100.0] * (horizon - len(inside))
            assert batch["observations"][step, :, 0].tolist() == padded
            assert batch["valid"][step].sum() == len(inside)


def test_a_history_stops_at_the_start_of_its_episode() -> None:
    windows = make_episodes((3, 2)).windows(2, num_observation_steps=3)
    history = windows.gather(np.arange(5))["observation_history"]
    assert history[:, :, 0].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [3, 3, 3], [3, 3, 4]]
    assert torch.equal(history[:, -1], windows.gather(np.arange(5))["observations"][:, 0])


def test_windows_need_a_positive_horizon() -> None:
    with pytest.raises(ValueError, match="`horizon` and `num_observation_steps` must be at least 1, got 0 and 1"):
        make_episodes().windows(0)


def test_concatenate_refuses_other_widths_and_nothing() -> None:
    with pytest.raises(ValueError, match=r"differ in \(observation_dim, action_dim\)"):
        Episodes.concatenate(make_episodes(), make_episodes(observation_dim=3))
    with pytest.raises(ValueError, match="`episodes` is empty"):
        Episodes.concatenate()


def test_the_newest_episodes_are_whole_ones() -> None:
    episodes = make_episodes((3, 2, 4))
    for max_steps, lengths in ((9, [3, 2, 4]), (8, [2, 4]), (6, [2, 4]), (5, [4]), (4, [4]), (1, [4])):
        newest = episodes.newest(max_steps)
        np.testing.assert_array_equal(newest.episode_lengths, lengths)
        np.testing.assert_array_equal(newest.rewards, np.arange(9 - sum(lengths), 9) / 2)
    assert_equal(Episodes.concatenate(make_episodes((3,)), make_episodes((3, 2)).newest(2)).newest(2), episodes_tail())


def episodes_tail() -> Episodes:
    """The second episode of `make_episodes`, alone."""
    both = make_episodes()
    columns = {name: getattr(both, name)[3:] for name in COLUMNS if name != "episode_ids"}
    return Episodes(**columns, episode_ends=np.array([2]))


def with_images(episodes: Episodes, first: int = 0) -> Episodes:
    """Every pixel is the step's index, and 100 more in the second camera."""
    steps = np.arange(first, first + episodes.num_steps, dtype=np.uint8)[:, None, None, None]
    front = np.broadcast_to(steps, (episodes.num_steps, 4, 5, 3))
    return dataclasses.replace(episodes, images={"front": front, "wrist": front[:, :2] + np.uint8(100)})


def test_images_stay_with_their_steps() -> None:
    episodes = with_images(make_episodes((3, 2, 4)))
    for part in (
        episodes.select(np.array([2, 0])),
        episodes.newest(6),
        Episodes.concatenate(episodes.select(np.array([1])), episodes.newest(1)),
    ):
        np.testing.assert_array_equal(part.images["front"][:, 3, 4, 2], part.observations[:, 0])
        np.testing.assert_array_equal(part.images["wrist"][:, 0, 0, 0], part.observations[:, 0] + 100)
        assert part.images["wrist"].shape[1:] == (2, 5, 3)
    with pytest.raises(ValueError, match="differ in the cameras and shapes of their `images`"):
        Episodes.concatenate(episodes, make_episodes())


def test_the_history_of_images_is_that_of_observations() -> None:
    windows = with_images(make_episodes((3, 2, 4))).windows(2, num_observation_steps=3)
    indices = torch.tensor([0, 2, 3, 8])
    seen = windows.image_history(indices, ["wrist"])
    assert list(seen) == ["images/wrist"]
    assert seen["images/wrist"].dtype == torch.uint8
    assert seen["images/wrist"].shape == (4, 3, 2, 5, 3)
    torch.testing.assert_close(
        seen["images/wrist"][..., 1, 4, 2].float(), windows.history(indices)[..., 0] + 100, rtol=0, atol=0
    )


def test_missing_columns_and_missing_steps_are_named() -> None:
    dataset = make_episodes().to_dataset()
    with pytest.raises(ValueError, match=r"lacks the columns \['rewards'\]"):
        Episodes.from_dataset(dataset.remove_columns("rewards"))
    with pytest.raises(ValueError, match="has no steps"):
        Episodes.from_dataset(dataset.select([]))


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (np.inf, "inf")])
def test_values_that_are_not_finite_are_located(value: Any, shown: str) -> None:
    observations = [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, value]]
    with pytest.raises(ValueError, match=r"'observations' has NaN or infinite values, first at episode 1, step 1"):
        Episodes.from_dataset(from_rows(observations=observations))
    with pytest.raises(ValueError, match=r"'rewards' has NaN or infinite values, first at episode 0, step 2"):
        Episodes.from_dataset(from_rows(rewards=[0.0, 0.0, value, -value, 0.0]))


def test_wrong_types_and_widths_are_refused() -> None:
    dataset = make_episodes().to_dataset()
    doubles = dataset.cast_column("actions", datasets.List(datasets.Value("float64"), length=1))
    with pytest.raises(ValueError, match=r"'actions' must hold lists of float32, got .*double.* Cast it"):
        Episodes.from_dataset(doubles)
    with pytest.raises(ValueError, match=r"'rewards' must hold float, got double"):
        Episodes.from_dataset(dataset.cast_column("rewards", datasets.Value("float64")))
    ragged = datasets.Features({**episode_features(2, 1), "actions": datasets.List(datasets.Value("float32"))})
    with pytest.raises(
        ValueError, match=r"'actions' must hold lists of one length, at least 1; got the lengths \[1, 2\]"
    ):
        Episodes.from_dataset(from_rows(ragged, actions=[[0.0], [0.0, 1.0], [0.0], [0.0], [0.0]]))
    wide = datasets.Features({**episode_features(2, 1), "next_observations": episode_features(3, 1)["observations"]})
    with pytest.raises(ValueError, match="'next_observations' has width 3, but 'observations' has 2"):
        Episodes.from_dataset(from_rows(wide, next_observations=[[0.0] * 3] * 5))


def test_lists_of_free_length_are_read_when_their_lengths_agree() -> None:
    free = datasets.Features({**episode_features(2, 1), "actions": datasets.List(datasets.Value("float32"))})
    assert_equal(Episodes.from_dataset(from_rows(free)), make_episodes())


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("rewards", [0.0, None, 0.0, 0.0, 0.0]),
        ("actions", [[0.0], None, [0.0], [0.0], [0.0]]),
        ("actions", [[None]] * 5),
    ],
)
def test_null_values_are_refused(column: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{column!r} has .*missing values"):
        Episodes.from_dataset(from_rows(**{column: value}))


def test_episodes_must_be_contiguous_and_ended() -> None:
    with pytest.raises(ValueError, match="episode 0 is in several places"):
        Episodes.from_dataset(from_rows(episode_ids=[0, 1, 0, 1, 1]))
    with pytest.raises(ValueError, match=r"neither terminates nor truncates .*: episode 1, step 1"):
        Episodes.from_dataset(from_rows(truncations=[False] * 5))
    with pytest.raises(ValueError, match="terminates or truncates inside an episode: episode 0, step 1"):
        Episodes.from_dataset(from_rows(terminations=[False, True, True, False, False]))


def test_actions_of_a_window_may_start_before_it() -> None:
    episodes = make_episodes()  # lengths 3 and 2; action of step i is -i - 1
    batch = episodes.windows(4, num_past_actions=2).gather(np.array([0, 1, 2, 3, 4]))
    expected = [[-1, -1, -1, -2], [-1, -1, -2, -3], [-1, -2, -3, 0], [-4, -4, -4, -5], [-4, -4, -5, 0]]
    assert batch["actions"][..., 0].tolist() == expected
    assert batch["observations"][:, 0, 0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"`num_past_actions` must lie in 0..3, got 4"):
        episodes.windows(4, num_past_actions=4)


@pytest.mark.parametrize("horizon", [1, 3])
def test_transitions_over_several_steps(horizon: int) -> None:
    """Against a loop over the steps: an episode that terminates, and one that is cut."""
    random = np.random.default_rng(0)
    lengths, discount = (5, 2), 0.9
    count, ends = sum(lengths), np.cumsum(lengths)
    terminations, truncations = np.zeros((2, count), dtype=bool)
    terminations[ends[0] - 1] = truncations[ends[1] - 1] = True
    episodes = Episodes(
        observations=random.normal(size=(count, 2)).astype(np.float32),
        actions=random.normal(size=(count, 1)).astype(np.float32),
        rewards=random.normal(size=count).astype(np.float32),
        next_observations=random.normal(size=(count, 2)).astype(np.float32),
        terminations=terminations,
        truncations=truncations,
        episode_ends=ends,
    )
    gathered = episodes.windows(horizon).transitions(np.arange(count), discount)
    for step in range(count):
        stop = min(step + horizon, ends[np.searchsorted(ends, step, side="right")])
        rewards = sum(discount**i * episodes.rewards[step + i] for i in range(stop - step))
        assert gathered["rewards"][step].item() == pytest.approx(rewards, abs=1e-6)
        assert gathered["discounts"][step].item() == pytest.approx(discount ** (stop - step))
        assert gathered["terminations"][step].item() == float(terminations[stop - 1])
        np.testing.assert_array_equal(gathered["next_observations"][step], episodes.next_observations[stop - 1])
        np.testing.assert_array_equal(gathered["observations"][step], episodes.observations[step])
        padding = np.zeros((horizon - (stop - step), 1), dtype=np.float32)
        np.testing.assert_array_equal(gathered["actions"][step], np.concatenate([episodes.actions[step:stop], padding]))


def test_first_takes_whole_episodes() -> None:
    episodes = make_episodes((3, 2, 4))
    assert episodes.first(8).episode_lengths.tolist() == [3, 2]
    assert episodes.first(9).num_steps == 9
    with pytest.raises(ValueError, match="`max_steps` 2 is less than the first episode's 3 steps"):
        episodes.first(2)


@pytest.mark.parametrize("lengths", [(3, 1, 9, 4), (2,), (20,)])
@pytest.mark.parametrize(("horizon", "num_past_actions"), [(1, 0), (4, 0), (4, 1), (4, 3), (12, 5)])
def test_windows_are_what_a_loop_over_steps_gives(
    lengths: tuple[int, ...], horizon: int, num_past_actions: int
) -> None:
    episodes = make_episodes(lengths)
    got = episodes.windows(horizon, num_past_actions=num_past_actions).gather(np.arange(episodes.num_steps)[::-1])
    for place, start in enumerate(range(episodes.num_steps - 1, -1, -1)):
        episode = int(np.searchsorted(episodes.episode_ends, start, side="right"))
        first, last = int(episodes.episode_starts[episode]), int(episodes.episode_ends[episode]) - 1
        for offset in range(horizon):
            step, acting = start + offset, start + offset - num_past_actions
            inside = step <= last
            state = episodes.observations[step] if inside else episodes.next_observations[last]
            action = episodes.actions[max(acting, first)] if acting <= last else np.zeros(1)
            np.testing.assert_array_equal(got["observations"][place, offset], state)
            np.testing.assert_array_equal(got["actions"][place, offset], action)
            assert got["rewards"][place, offset] == (episodes.rewards[step] if inside else 0)
            assert got["valid"][place, offset] == inside


def test_images_are_saved_and_mapped_with_their_steps(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 2, 5, 3)).astype(np.uint8)
    seen = dataclasses.replace(make_episodes((3, 2, 4)), images={"wrist": frames})
    seen.to_dataset().save_to_disk(tmp_path)
    loaded = Episodes.from_dataset(datasets.load_from_disk(tmp_path))
    np.testing.assert_array_equal(loaded.images["wrist"], frames)
    assert not loaded.images["wrist"].flags.owndata
    assert not loaded.images["wrist"].flags.writeable, "a view of the file"
    flat = datasets.List(datasets.List(datasets.List(datasets.Value("uint8")), length=5), length=2)
    with pytest.raises(ValueError, match=r"'images.wrist' must hold uint8 images"):
        Episodes.from_dataset(seen.to_dataset().cast_column("images.wrist", flat))
