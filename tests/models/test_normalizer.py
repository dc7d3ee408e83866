"""Statistics per dimension: what they map to, that no cast rounds them, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmc_hub.models.normalizer import Normalizer

OBSERVATIONS = np.array([[0.0, 7.0, -1000.0], [4.0, 7.0, 3000.0], [1.0, 7.0, 0.0]], dtype=np.float32)
ACTIONS = np.array([[-0.5], [1.5], [0.0]], dtype=np.float32)


def fitted(mode: str = "limits") -> Normalizer:
    return Normalizer.from_data(OBSERVATIONS, ACTIONS, mode)


def test_limits_by_hand_and_a_constant_dimension_maps_to_0() -> None:
    normalized = fitted().normalize_observations(torch.from_numpy(OBSERVATIONS))
    expected = torch.tensor([[-1, 0, -1], [1, 0, 1], [-0.5, 0, -0.5]])
    torch.testing.assert_close(normalized, expected)
    assert fitted().normalize_actions(torch.tensor([[0.5]])).tolist() == [[0]]


def test_gaussian_has_mean_0_and_std_1() -> None:
    data = np.random.default_rng(0).normal([5.0, -2.0], [3.0, 0.01], (2000, 2)).astype(np.float32)
    normalizer = Normalizer.from_data(data, data[:, :1], "gaussian")
    normalized = normalizer.normalize_observations(torch.from_numpy(data))
    torch.testing.assert_close(normalized.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalized.std(0, correction=0), torch.ones(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["limits", "gaussian"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_round_trips(mode: str, shape: tuple[int, ...]) -> None:
    normalizer, source = fitted(mode), torch.Generator().manual_seed(0)
    observations, actions = torch.randn(*shape, 3, generator=source), torch.randn(*shape, 1, generator=source)
    there = normalizer.unnormalize_observations(normalizer.normalize_observations(observations))
    torch.testing.assert_close(there, observations, atol=1e-3, rtol=0)  # float32 beside a range of 4000
    torch.testing.assert_close(there[..., :2], observations[..., :2], atol=1e-5, rtol=0)
    back = normalizer.normalize_actions(normalizer.unnormalize_actions(actions))
    torch.testing.assert_close(back, actions)


def test_a_normalizer_without_statistics_refuses_everything() -> None:
    normalizer = Normalizer(3, 1)
    calls: list[Any] = [normalizer.normalize_observations, normalizer.unnormalize_observations]
    for call in (*calls, normalizer.normalize_actions, normalizer.unnormalize_actions):
        with pytest.raises(ValueError, match=r"has no statistics: build it with `Normalizer\.from_data`"):
            call(torch.zeros(2, 3 if call in calls else 1))


def statistics(normalizer: Normalizer) -> dict[str, torch.Tensor]:
    state = normalizer.state_dict()
    assert len(state) == 4
    return state


@pytest.mark.parametrize("cast", ["to", "bfloat16", "half", "double"])
def test_no_cast_rounds_the_statistics(cast: str) -> None:
    before, normalizer = statistics(fitted()), fitted()
    normalizer = normalizer.to(torch.bfloat16) if cast == "to" else getattr(normalizer, cast)()
    for name, value in statistics(normalizer).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["limits", "gaussian"])
def test_saved_statistics_are_read_bit_for_bit(tmp_path: Path, dtype: torch.dtype | None, mode: str) -> None:
    fitted(mode).save_pretrained(tmp_path)
    loaded = Normalizer.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.config.mode == mode
    for name, value in statistics(loaded).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, statistics(fitted(mode))[name])


@pytest.mark.parametrize(
    ("observations", "actions", "message"),
    [
        (OBSERVATIONS[:0], ACTIONS[:0], "`observations` must be finite and not empty"),
        (np.where(OBSERVATIONS == 7, np.nan, OBSERVATIONS), ACTIONS, "`observations` must be finite"),
        (OBSERVATIONS, np.full((3, 1), np.inf), "`actions` must be finite"),
        (OBSERVATIONS[:, 0], ACTIONS, r"must have shapes .* got \(3,\) and \(3, 1\)"),
        (OBSERVATIONS, ACTIONS[:2], r"must have shapes .* got \(3, 3\) and \(2, 1\)"),
        (OBSERVATIONS[None], ACTIONS, r"must have shapes .* got \(1, 3, 3\)"),
    ],
)
def test_bad_data_is_refused(observations: np.ndarray, actions: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Normalizer.from_data(observations, actions)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="`mode` must be 'limits' or 'gaussian', got 'minmax'"):
        Normalizer(1, 1, "minmax")


READ_ONLY = np.broadcast_to(np.float32(0.5), (3,))


@pytest.mark.parametrize(
    ("observation", "rows"),
    [
        (np.zeros(3, np.float32), 1),
        (np.zeros((5, 3), np.float64), 5),
        (torch.zeros(2, 3, dtype=torch.float16), 2),
        ([0.0, 1.0, 2.0], 1),
        (READ_ONLY, 1),
        (np.arange(6.0).reshape(2, 3)[:, ::-1], 2),
    ],
)
def test_observations_become_a_float32_batch(observation: Any, rows: int) -> None:
    batch = fitted().observation_batch(observation)
    assert batch.dtype == torch.float32
    assert batch.tolist() == np.reshape(np.asarray(observation), (rows, 1, 3)).tolist()


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (np.zeros(4), r"`observation` must have shape \(3,\) or \(batch, 3\), got \(4,\)"),
        (np.zeros((2, 2, 3)), r"got \(2, 2, 3\)"),
        (np.zeros((0, 3)), r"got \(0, 3\)"),
        (np.float32(1.0), r"got \(\)"),
        (np.zeros(3, np.int64), r"must be floating point, got torch.int64: use `.astype\('float32'\)`"),
        (np.zeros(3, bool), "must be floating point, got torch.bool"),
        (np.zeros(3, complex), "must be floating point, got torch.complex128"),
        (np.array([None, 1.0, 2.0]), "must be an array of floating point numbers: can't convert"),
        ("abc", "must be an array of floating point numbers: can't convert"),
        ([[0.0, 1.0, 2.0], [0.0, 1.0]], "must be an array of floating point numbers: setting an array element"),
        (np.array([[0, 0, 0], [0, np.nan, 0]]), "has NaN or infinite entries in row 1: "),
        (np.array([0, np.inf, 0]), "has NaN or infinite entries in row 0: "),
        (np.array([0, 1e300, 0]), "has NaN or infinite entries in row 0: "),
    ],
)
def test_bad_observations_are_refused(observation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted().observation_batch(observation)
