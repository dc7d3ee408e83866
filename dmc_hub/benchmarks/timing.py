"""Times that can be compared on a busy machine: what is compared takes turns, so that load hits all alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tqdm.auto import tqdm


class Clock:
    """Wall and processor seconds of named pieces of work, repeat by repeat."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.wall: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}

    def now(self) -> tuple[float, float]:
        """Wall and processor time, after a GPU has finished what it was asked to do."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def add(self, name: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Note one repeat."""
        self.wall.setdefault(name, []).append(end[0] - start[0])
        self.cpu.setdefault(name, []).append(end[1] - start[1])

    def time(self, name: str, run: Callable[[], Any]) -> None:
        """Run, and note how long it took."""
        start = self.now()
        run()
        self.add(name, start, self.now())

    def report(self, floor: str) -> dict[str, Any]:
        """Medians in milliseconds, and by name their ratios to the floor's: of wall time and of processor time, and
        `fastest_ratio`, of the least processor time, which other processes disturb least."""
        wall, cpu = ({name: statistics.median(times) for name, times in each.items()} for each in (self.wall, self.cpu))
        least = {name: min(times) for name, times in self.cpu.items()}
        return {
            "floor": floor,
            "repeats": len(self.wall[floor]),
            "milliseconds": {name: round(1e3 * seconds, 4) for name, seconds in wall.items()},
            "ratio": {name: round(seconds / wall[floor], 4) for name, seconds in wall.items() if name != floor},
            "cpu_milliseconds": {name: round(1e3 * seconds, 4) for name, seconds in cpu.items()},
            "cpu_ratio": {name: round(seconds / cpu[floor], 4) for name, seconds in cpu.items() if name != floor},
            "fastest_ratio": {
                name: round(seconds / least[floor], 4) for name, seconds in least.items() if name != floor
            },
        }


def take_turns(
    runs: Mapping[str, Callable[[], Any]], floor: str, *, repeats: int, device: str = "cpu", warm_up: int = 2
) -> dict[str, Any]:
    """`Clock.report` of runs that take turns, each `repeats` times after `warm_up` that do not count."""
    clock = Clock(device)
    for run in list(runs.values()) * warm_up:
        run()
    for _ in tqdm(range(repeats), desc=" / ".join(runs), leave=False):
        for name, run in runs.items():
            clock.time(name, run)
    return clock.report(floor)


def machine(device: str) -> dict[str, Any]:
    """What a time depends on besides the program."""
    name = torch.cuda.get_device_name() if device != "cpu" else platform.machine()
    return {"device": device, "name": name, "cpu_cores": os.cpu_count(), "threads": torch.get_num_threads()}
