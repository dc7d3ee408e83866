"""What an evaluation remembers of its episodes, on disk: an interrupted one continues, a repeated one costs nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dmc_hub import checkpoint
from dmc_hub.version import __version__


@dataclass(frozen=True)
class EpisodeRecord:
    """What an evaluation keeps of an episode.

    Attributes:
        seed: of the episode.
        episode_return: undiscounted return.
        length: in steps.
        diversity: `candidate_diversity_scores` averaged over the steps.
        coherency: coherency averaged over what counts; None where nothing does.
        num_coherency: how many scores that are.
        success: whether it succeeded, where the task says what success is.
        score: on the scale of the published tables, where the task has one.
    """

    seed: int
    episode_return: float
    length: int
    diversity: float
    coherency: float | None
    num_coherency: int
    success: bool | None
    score: float | None


class EvaluationCache:
    """Records of episodes under one controller, task and way of deciding, a JSON file per batch of seeds.

    The noise of a batch of episodes that run side by side is drawn together, so an episode is a function of its batch.
    The file `<sha256 of settings>/<first seed>.json` holds a batch, and holds for every batch that starts alike.

    Figures are only those of the same kind of machine: thread counts and processors change the last bits of a network's
    outputs. A task of a user's own is known by its name: after a change to its code, use another folder.

    Args:
        folder: of all evaluations.
        settings: all that the episodes depend on besides their seeds, as values that JSON can hold.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.settings = json.loads(json.dumps({**settings, "library_version": __version__}))
        key = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        self.folder = folder / key[:32]

    def read(self, seeds: Sequence[int]) -> list[EpisodeRecord] | None:
        """The records of a batch, in the order of `seeds`, or None if it was not run to its end.

        Raises:
            ValueError: the file is damaged; the message names it and the field.
        """
        path = self._path(seeds)
        if not path.is_file():
            return None
        content = checkpoint.load_json(path)
        if not isinstance(content, dict) or content.get("settings") != self.settings:
            raise ValueError(f"`{path}` is not an evaluation with these settings: delete it.")
        try:
            records = [EpisodeRecord(**values) for values in content["episodes"]]
        except (KeyError, TypeError) as error:
            names = [field.name for field in fields(EpisodeRecord)]
            raise ValueError(f"`{path}`: episodes must hold {names} ({error}): delete the file.") from error
        if [record.seed for record in records[: len(seeds)]] != [int(seed) for seed in seeds]:
            return None
        return records[: len(seeds)]

    def write(self, records: Sequence[EpisodeRecord]) -> None:
        """Keep a whole batch."""
        episodes = [asdict(record) for record in records]
        path = self._path([record.seed for record in records])
        checkpoint.save_json(path, {"settings": self.settings, "episodes": episodes})

    def _path(self, seeds: Sequence[int]) -> Path:
        return self.folder / f"{int(seeds[0])}.json"


def controller_fingerprint(pipeline: Any) -> str:
    """SHA-256 over all that a pipeline decides by: settings and weights of its components, and its adapters' weights.

    `base_fingerprint`, in contrast, covers what an adapter depends on: neither critic nor adapter.
    """
    digest = hashlib.sha256(type(pipeline).__name__.encode())
    _add(digest, "config", _public(pipeline.config))
    for name, component in sorted(pipeline.components.items()):
        if component is None:
            continue
        _add(digest, name, type(component).__name__)
        _add(digest, name, _public(component.config))
        if isinstance(component, nn.Module):
            _add_weights(digest, name, component)
    return digest.hexdigest()


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _add(digest: Any, name: str, value: Any) -> None:
    digest.update(f"{name} {json.dumps(value, sort_keys=True, default=str)}".encode())


def _add_weights(digest: Any, name: str, module: nn.Module) -> None:
    for key, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        _add(digest, f"{name}.{key}", [list(tensor.shape), str(tensor.dtype)])
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    for key, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            adapters = [layer.disable_adapters, list(layer.active_adapters), list(layer.merged_adapters)]
            _add(digest, f"{name}.{key}", [*adapters, getattr(layer, "scaling", {})])
