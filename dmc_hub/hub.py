"""Loading pipelines by what they say they are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers.utils import logging

from dmc_hub import checkpoint
from dmc_hub.pipelines import DiffuserPlannerPipeline, DiffusionPolicyPipeline

PIPELINES: dict[str, type[DiffuserPlannerPipeline] | type[DiffusionPolicyPipeline]] = {
    "DiffuserPlannerPipeline": DiffuserPlannerPipeline,
    "DiffusionPolicyPipeline": DiffusionPolicyPipeline,
}


def load_pipeline(folder: str | os.PathLike[str]) -> DiffuserPlannerPipeline | DiffusionPolicyPipeline:
    """Load a saved planner or policy from a folder, without a progress bar.

    Raises:
        FileNotFoundError: the folder holds no pipeline.
        ValueError: it holds one of another kind, or files that are not those in its manifest, if it has one.
    """
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"`{folder}` is not a pipeline folder: it has no model_index.json.")
    try:
        name = json.loads(index.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`{index}` is not a pipeline's index: {error!r}.") from error
    if not isinstance(name, str) or name not in PIPELINES:
        raise ValueError(f"`{folder}` holds a {name}, not one of {', '.join(PIPELINES)}.")
    verify_if_possible(folder)
    with _without_progress_bar():
        return PIPELINES[name].from_pretrained(folder)


def verify_if_possible(folder: str | os.PathLike[str]) -> None:
    """Compare a folder's files with its manifest; without a manifest there is nothing to compare.

    Raises:
        CheckpointError: a file is missing, truncated or changed.
    """
    if (Path(folder) / checkpoint.MANIFEST_NAME).is_file():
        checkpoint.verify(folder)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    wanted = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if wanted:
            logging.enable_progress_bar()
