"""How fast windows come out of `Episodes`, and how much memory the conversion of a large file takes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dmc_hub.benchmarks.timing import Clock
from dmc_hub.data import Episodes

OBSERVATION_DIM, ACTION_DIM, EPISODE_STEPS = 11, 3, 1000
_ROW_BYTES = 4 * (2 * OBSERVATION_DIM + ACTION_DIM + 1) + 2
_CONVERT = """
import json, re, sys, time
from pathlib import Path
from dmc_hub.data import convert, open_source
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
imported, start = peak(), time.perf_counter()
convert(open_source(sys.argv[1]), sys.argv[2])
print(json.dumps({"seconds": time.perf_counter() - start, "peak_mib": peak(), "peak_after_imports_mib": imported}))
"""


class WindowDataset(Dataset[dict[str, Tensor]]):
    """Windows one at a time, from arrays padded to `(num_episodes, max_steps + horizon, width)` as in the code of
    Diffuser (arXiv:2205.09991), whose items are slices."""

    def __init__(self, episodes: Episodes, horizon: int) -> None:
        starts, lengths = episodes.episode_starts, episodes.episode_lengths
        self.horizon = horizon
        self.places = [(path, step) for path, length in enumerate(lengths) for step in range(length)]
        size = (len(starts), int(lengths.max()) + horizon)
        self.observations = np.zeros((*size, episodes.observation_dim), np.float32)
        self.actions = np.zeros((*size, episodes.action_dim), np.float32)
        self.rewards = np.zeros(size, np.float32)
        self.valid = np.zeros(size, bool)
        for path, (start, length) in enumerate(zip(starts, lengths)):
            self.observations[path, :length] = episodes.observations[start : start + length]
            self.observations[path, length:] = episodes.next_observations[start + length - 1]
            self.actions[path, :length] = episodes.actions[start : start + length]
            self.rewards[path, :length] = episodes.rewards[start : start + length]
            self.valid[path, :length] = True

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        path, start = self.places[index]
        steps = slice(start, start + self.horizon)
        return {
            "observations": torch.from_numpy(self.observations[path, steps]),
            "actions": torch.from_numpy(self.actions[path, steps]),
            "rewards": torch.from_numpy(self.rewards[path, steps]),
            "observation_history": torch.from_numpy(self.observations[path, start : start + 1]),
            "valid": torch.from_numpy(self.valid[path, steps]),
        }


def synthetic_episodes(num_steps: int, seed: int) -> Episodes:
    """Random episodes of Hopper's widths and `EPISODE_STEPS` steps."""
    rng = np.random.default_rng(seed)
    count = num_steps // EPISODE_STEPS
    states = rng.normal(size=(count, EPISODE_STEPS + 1, OBSERVATION_DIM)).astype(np.float32)
    num_steps = count * EPISODE_STEPS
    ends = np.arange(1, count + 1) * EPISODE_STEPS
    is_last = np.isin(np.arange(num_steps), ends - 1)
    return Episodes(
        observations=states[:, :-1].reshape(num_steps, -1),
        actions=rng.uniform(-1, 1, (num_steps, ACTION_DIM)).astype(np.float32),
        rewards=rng.normal(size=num_steps).astype(np.float32),
        next_observations=states[:, 1:].reshape(num_steps, -1),
        terminations=np.zeros(num_steps, bool),
        truncations=is_last,
        episode_ends=ends,
    )


def measure_windows(
    *, num_steps: int = 100_000, horizon: int = 32, batch_size: int = 256, repeats: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Windows per second, in shuffled batches of one epoch, medians over epochs.

    `episodes` is `Windows.gather`; `per_item` the same windows from `WindowDataset` in a `DataLoader`, in this process
    or one worker, whichever is faster; `floor` the bare copying of the windows' observations, actions and rewards,
    without padding, masks and history. `batches` compares single batches of the first and the last, in turns.
    """
    episodes = synthetic_episodes(num_steps, seed)
    windows = episodes.windows(horizon)
    batches = np.array_split(np.random.default_rng(seed).permutation(len(windows)), len(windows) // batch_size)
    arrays = (episodes.observations, episodes.actions, episodes.rewards)
    views = [sliding_window_view(array, horizon, axis=0) for array in arrays]
    runs = [np.moveaxis(view, -1, 1) for view in views]
    starts = [np.minimum(batch, len(runs[0]) - 1) for batch in batches]
    dataset = WindowDataset(episodes, horizon)
    _check_equal(windows.gather(batches[0]), dataset, batches[0])

    def raw(each: np.ndarray) -> list[np.ndarray]:
        return [run[each] for run in runs]

    def floor() -> Iterator[Any]:
        yield from map(raw, starts)

    def per_item(num_workers: int) -> Callable[[], Iterator[Any]]:
        def epoch() -> Iterator[Any]:
            generator = torch.Generator().manual_seed(seed)
            yield from DataLoader(
                dataset, batch_size, shuffle=True, generator=generator, num_workers=num_workers, drop_last=False
            )

        return epoch

    rates = {
        "episodes": _rate(lambda: map(windows.gather, batches), len(windows), repeats),
        "floor": _rate(floor, len(windows), repeats),
        "per_item_in_process": _rate(per_item(0), len(windows), max(1, repeats // 2)),
        "per_item_one_worker": _rate(per_item(1), len(windows), max(1, repeats // 2)),
    }
    clock = Clock()
    for mine, bare in zip(batches[::2] * repeats, starts[1::2] * repeats):  # other windows, so that no cache helps
        clock.time("episodes", partial(windows.gather, mine))
        clock.time("floor", partial(raw, bare))
    fastest_per_item = max(rates["per_item_in_process"], rates["per_item_one_worker"])
    return {
        "num_steps": num_steps,
        "horizon": horizon,
        "batch_size": batch_size,
        "windows_per_second": rates,
        "times_per_item": rates["episodes"] / fastest_per_item,
        "share_of_floor": rates["episodes"] / rates["floor"],
        "batches": clock.report("floor"),
    }


def measure_conversion(gigabytes: float, seed: int = 0) -> dict[str, Any]:
    """Seconds and peak resident memory of a process that converts a D4RL file of about so many GB (10^9 bytes)."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "large.hdf5"
        num_steps = _write_d4rl(path, int(gigabytes * 1e9) // _ROW_BYTES, seed)
        command = [sys.executable, "-c", _CONVERT, str(path), str(Path(scratch) / "converted")]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return {"file_bytes": path.stat().st_size, "num_steps": num_steps, **json.loads(done.stdout.splitlines()[-1])}


def _check_equal(batch: dict[str, Tensor], dataset: WindowDataset, indices: np.ndarray) -> None:
    items = [dataset[int(index)] for index in indices]
    for name, values in batch.items():
        assert torch.equal(values, torch.stack([item[name] for item in items])), name


def _rate(epoch: Callable[[], Iterator[Any]], num_windows: int, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in epoch():
            pass
        seconds.append(time.perf_counter() - start)
    return num_windows / statistics.median(seconds)


def _write_d4rl(path: Path, num_steps: int, seed: int) -> int:
    import h5py

    rng = np.random.default_rng(seed)
    num_steps = num_steps // EPISODE_STEPS * EPISODE_STEPS
    widths = {"observations": OBSERVATION_DIM, "actions": ACTION_DIM, "next_observations": OBSERVATION_DIM}
    with h5py.File(path, "w") as file:
        for key, width in widths.items():
            file.create_dataset(key, (num_steps, width), "f4", chunks=(EPISODE_STEPS, width))
        for key, kind in {"rewards": "f4", "terminals": "?", "timeouts": "?"}.items():
            file.create_dataset(key, (num_steps,), kind, chunks=(EPISODE_STEPS,))
        for start in range(0, num_steps, EPISODE_STEPS):
            rows = slice(start, start + EPISODE_STEPS)
            states = rng.standard_normal((EPISODE_STEPS + 1, OBSERVATION_DIM), dtype=np.float32)
            file["observations"][rows], file["next_observations"][rows] = states[:-1], states[1:]
            file["actions"][rows] = rng.standard_normal((EPISODE_STEPS, ACTION_DIM), dtype=np.float32)
            file["rewards"][rows] = rng.standard_normal(EPISODE_STEPS, dtype=np.float32)
            file["timeouts"][start + EPISODE_STEPS - 1] = True
            file["terminals"][rows] = False
    return num_steps
