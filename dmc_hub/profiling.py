"""Traces of what runs, and their most expensive operations."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dmc_hub import checkpoint

NUM_SKIPPED = 3
NUM_STEPS = 5
NUM_OPERATIONS = 10


class NothingTracedWarning(UserWarning):
    """A run that was to be profiled was over before its first window."""


@contextmanager
def profiled(path: str | os.PathLike[str] | None, count: int = NUM_OPERATIONS) -> Iterator[list[dict[str, Any]]]:
    """Write a trace of the block, for chrome://tracing or Perfetto; without a path nothing is traced.

    Yields:
        A list that is filled at the end, as `most_expensive` returns it.
    """
    found: list[dict[str, Any]] = []
    if path is None:
        yield found
        return
    with tracer() as profiler:
        yield found
    _write_trace(profiler, Path(path))
    found += most_expensive(profiler, count)


def tracer() -> profile:
    """Of the processor and, if there is one, of the GPU."""
    on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return profile(activities=[ProfilerActivity.CPU, *on_gpu])


def most_expensive(profiler: profile, count: int = NUM_OPERATIONS) -> list[dict[str, Any]]:
    """`name`, `calls`, `milliseconds` and `share` of the operations with the most time of their own, on the GPU if
    there is one."""
    events, on_gpu = profiler.key_averages(), torch.cuda.is_available()
    own = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    total = sum(own.values()) or 1.0
    ranked = sorted(events, key=lambda event: -own[event.key])[:count]
    return [
        {
            "name": event.key,
            "calls": event.count,
            "milliseconds": round(own[event.key] / 1e3, 3),
            "share": round(own[event.key] / total, 4),
        }
        for event in ranked
    ]


def operations_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| operation | calls | share of the time |", "|---|---|---|"]
    return lines + [f"| `{row['name'][:60]}` | {row['calls']:,} | {row['share']:.1%} |" for row in rows]


@contextmanager
def profile_steps(
    folder: str | os.PathLike[str] | None, *, num_skipped: int = NUM_SKIPPED, num_steps: int = NUM_STEPS
) -> Iterator[None]:
    """Trace a few steps of everything in the block that calls `end_step`; without a folder nothing is traced.

    Of each path a window of `num_steps` steps is traced, after `num_skipped` that warm up; it ends before if another
    path goes on or the block ends. The folder gets `<path>.json`, for chrome://tracing or Perfetto, and the most
    expensive operations of all paths as `most_expensive.json` and `.md`.

    Of several processes the first alone is traced.

    Raises:
        ValueError: the folder is there already.
    """
    if folder is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    if Path(folder).exists():
        raise ValueError(f"`profile` {folder} exists already: choose another folder.")
    windows = _Windows(Path(folder), num_skipped, num_steps)
    token = _WINDOWS.set(windows)
    try:
        yield
    finally:
        _WINDOWS.reset(token)
        windows.close()


def end_step(path: str) -> None:
    """Say that a step of `path` is over: of a trainer, or a decision of an evaluation."""
    windows = _WINDOWS.get()
    if windows is not None:
        windows.end_step(path)


class _Windows:
    """One traced window for each path; at most one is open."""

    def __init__(self, folder: Path, num_skipped: int, num_steps: int) -> None:
        folder.mkdir(parents=True)
        self.folder, self.num_skipped, self.num_steps = folder, num_skipped, num_steps
        self.tables: dict[str, dict[str, Any]] = {}
        self._counts: Counter[str] = Counter()
        self._open: tuple[str, int, profile] | None = None  # path, its steps until then, what traces

    def end_step(self, path: str) -> None:
        self._counts[path] += 1
        if self._open is not None:
            opened, start, _ = self._open
            if opened != path or self._counts[path] - start == self.num_steps:
                self._end_window()
        if self._open is None and path not in self.tables and self._counts[path] >= self.num_skipped:
            profiler = tracer()
            profiler.start()
            self._open = path, self._counts[path], profiler

    def _end_window(self) -> None:
        assert self._open is not None
        (path, start, profiler), self._open = self._open, None
        profiler.stop()
        if self._counts[path] > start:
            self.tables[path] = {"steps": self._counts[path] - start, "operations": most_expensive(profiler)}
            _write_trace(profiler, self.folder / f"{path}.json")

    def close(self) -> None:
        """Write the tables."""
        if self._open is not None:
            self._end_window()
        if not self.tables:
            warnings.warn(
                f"`profile`: nothing was traced, because no part of the run has more than {self.num_skipped} steps.",
                NothingTracedWarning,
                stacklevel=4,
            )
            return
        checkpoint.save_json(self.folder / "most_expensive.json", self.tables)
        parts = [
            "\n".join([f"{path}, {table['steps']} steps", "", *operations_table(table["operations"]), ""])
            for path, table in self.tables.items()
        ]
        checkpoint.write_text(self.folder / "most_expensive.md", "\n".join(parts))


_WINDOWS: ContextVar[_Windows | None] = ContextVar("windows", default=None)


def _write_trace(profiler: profile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.json")
    try:
        profiler.export_chrome_trace(str(unfinished))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
