"""Prompts in files and on the Hub, as streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import load_dataset


def stream_of_rows(source: str, *, seed: int) -> Any:
    """Rows of a file or of a dataset on the Hub, streamed and shuffled in a buffer of a thousand.

    Raises:
        ValueError: a file of another kind.
        FileNotFoundError: there is no such file.
    """
    kinds = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
    path = Path(source)
    if path.suffix in kinds:
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {source}.")
        rows = load_dataset(kinds[path.suffix], data_files=source, split="train", streaming=True)
        rows = rows.rename_column("text", "prompt") if path.suffix == ".txt" else rows
    elif path.exists():
        raise ValueError(f"`{source}` must end in {', '.join(kinds)}, or be a dataset on the Hub.")
    else:
        rows = load_dataset(source, split="train", streaming=True)
    return rows.shuffle(seed=seed, buffer_size=1000)
