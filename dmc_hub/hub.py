"""Loading pipelines by what they say they are."""

from __future__ import annotations

import json
import os
from pathlib import Path

from dmc_hub.pipelines import DiffuserPlannerPipeline, DiffusionPolicyPipeline

PIPELINES: dict[str, type[DiffuserPlannerPipeline] | type[DiffusionPolicyPipeline]] = {
    "DiffuserPlannerPipeline": DiffuserPlannerPipeline,
    "DiffusionPolicyPipeline": DiffusionPolicyPipeline,
}


def load_pipeline(folder: str | os.PathLike[str]) -> DiffuserPlannerPipeline | DiffusionPolicyPipeline:
    """Load a saved planner or policy from a folder, without a progress bar.

    Raises:
        FileNotFoundError: the folder holds no pipeline.
        ValueError: it holds one of another kind.
    """
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"`{folder}` is not a pipeline folder: it has no model_index.json.")
    try:
        name = json.loads(index.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`{index}` is not a pipeline's index: {error!r}.") from error
    if name not in PIPELINES:
        raise ValueError(f"`{folder}` holds a {name}, not one of {', '.join(PIPELINES)}.")
    return PIPELINES[name].from_pretrained(folder)
