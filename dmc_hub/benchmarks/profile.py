"""A trace of a run, and its most expensive operations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def profiled(path: str | os.PathLike[str] | None, count: int = 10) -> Iterator[list[dict[str, Any]]]:
    """Write a trace of the block, for chrome://tracing or Perfetto; without a path nothing is traced.

    Yields:
        A list that is filled at the end: `name`, `calls`, `milliseconds` and `share` of the operations with the most
        time of their own.
    """
    found: list[dict[str, Any]] = []
    if path is None:
        yield found
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        yield found
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.json")
    try:
        profiler.export_chrome_trace(str(unfinished))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    found += most_expensive(profiler, count, on_gpu=on_gpu)


def most_expensive(profiler: profile, count: int, *, on_gpu: bool) -> list[dict[str, Any]]:
    """The operations with the most time of their own, on the GPU if there is one."""
    events = profiler.key_averages()
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
