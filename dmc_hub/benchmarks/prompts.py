"""Millions of prompts as a stream: how long until the first batch, and what memory holds."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dmc_hub.benchmarks.digits import DIGITS, TONES, prompt_of, tiny_stable_diffusion
from dmc_hub.prompt_files import stream_of_rows
from dmc_hub.text_to_image import TextToImagePolicy

BATCH = 64


class OneOfEach(TextToImagePolicy):
    """Encodes one prompt of each batch while `skips`."""

    skips = False

    def prompt_condition(
        self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, Tensor]:
        """The condition of each prompt, or of the first."""
        end = 1 if self.skips else len(prompts)
        return super().prompt_condition(prompts[:end], None if metadata is None else metadata[:end])


def write_prompts(path: Path, count: int) -> None:
    """A Parquet file with a column `prompt`, all of them different."""
    tones = list(TONES)
    with pyarrow.parquet.ParquetWriter(path, pyarrow.schema([("prompt", pyarrow.string())])) as writer:
        for start in range(0, count, 100_000):
            numbers = range(start, min(count, start + 100_000))
            prompts = [f"{n} {prompt_of(n % len(DIGITS), tones[n % len(tones)], 'the')}" for n in numbers]
            writer.write_table(pyarrow.table({"prompt": prompts}))


def stream_prompts(folder: Path, *, count: int, seed: int) -> dict[str, Any]:
    """Draw every prompt of a file once, as trainers do; a tiny Stable Diffusion encodes the first batch, and of the
    others one prompt each.

    Args:
        folder: gets the file.
        count: of prompts.
        seed: of the networks and of the order.

    Returns:
        `seconds_to_first_batch` from opening the file to `batch` encoded prompts, `prompts_per_second` of reading, and
        `memory`: the resident bytes after each tenth of the prompts, with `growth` from the first to the last.
    """
    write_prompts(folder / "prompts.parquet", count)
    policy, generator = OneOfEach(tiny_stable_diffusion(seed)), torch.Generator().manual_seed(seed)
    memory: list[int] = []
    with torch.no_grad():
        started = time.perf_counter()
        source = policy.condition_source(stream_of_rows(str(folder / "prompts.parquet"), seed=seed))
        source.conditions(BATCH, generator)
        first = time.perf_counter() - started
        policy.skips = True
        for index in tqdm(range(1, count // BATCH), desc="batches of prompts"):
            source.conditions(BATCH, generator)
            if index % max(1, count // BATCH // 10) == 0:
                memory.append(resident_bytes())
    return {
        "count": count,
        "batch": BATCH,
        "seconds_to_first_batch": first,
        "prompts_per_second": count / (time.perf_counter() - started),
        "memory": memory,
        "growth": memory[-1] / memory[0] - 1,
    }


def resident_bytes() -> int:
    """Memory of this process, on Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
