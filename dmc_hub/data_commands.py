"""The commands `dmc-hub data ...`: their arguments, and what they do."""

from __future__ import annotations

import json
import os
import tempfile
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dmc_hub import checkpoint
from dmc_hub.cards import one_line
from dmc_hub.data import (
    DEFECTS,
    READERS,
    DatasetCardText,
    DatasetConfig,
    Episodes,
    convert,
    dataset_statistics,
    open_dataset,
    open_source,
    push_dataset,
    refuse_defects,
    save_dataset,
    split_episodes,
    validate_dataset,
)
from dmc_hub.data.conversion import FACTS_NAME, is_converted
from dmc_hub.data.readers import detect_format
from dmc_hub.data.validation import missing_shards
from dmc_hub.plots import plot_episodes
from dmc_hub.tasks import action_bounds, get_task

if TYPE_CHECKING:
    from datasets import Dataset

_OPTIONS = (
    "observation_keys",
    "action_key",
    "image_keys",
    "reward",
    "terminal",
    "filter_key",
    "max_episode_steps",
    "append_goal",
    "time_axis",
)


@dataclass(kw_only=True)
class SourceArguments:
    """What the commands on data read."""

    source: str = field(
        metadata={"help": "A raw file or folder, a converted or saved folder, or a repo `user/name` on the Hub."}
    )
    format: str | None = field(
        default=None, metadata={"help": f"Format of a raw file, from {', '.join(READERS)}; found out by default."}
    )
    configuration: str | None = field(default=None, metadata={"help": "Configuration of a saved folder or repo."})
    split: str = field(default="train", metadata={"help": "Split of a saved folder or repo."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a repo."})
    observation_keys: list[str] | None = field(
        default=None, metadata={"help": "Arrays of a raw file that are joined to the observation."}
    )
    action_key: str | None = field(default=None, metadata={"help": "Array of a zarr file that is the action."})
    image_keys: list[str] | None = field(default=None, metadata={"help": "Arrays of a raw file that are images."})
    reward: Literal["zero"] | None = field(default=None, metadata={"help": "Rewards of a raw file that has none."})
    terminal: bool | None = field(
        default=None, metadata={"help": "Whether demonstrations of a raw file end by themselves, instead of being cut."}
    )
    filter_key: str | None = field(default=None, metadata={"help": "Filter key of a robomimic file, such as train."})
    max_episode_steps: int | None = field(
        default=None, metadata={"help": "Time limit of a D4RL file without time-outs, such as 280 for Kitchen."}
    )
    append_goal: bool | None = field(
        default=None, metadata={"help": "Whether a D4RL file's infos/goal is appended to the observation."}
    )
    time_axis: int | None = field(
        default=None, metadata={"help": "Axis that is time in relay-kitchen's files, where the mask does not tell."}
    )

    def reader_options(self) -> dict[str, Any]:
        """The options that were given."""
        options = {name: getattr(self, name) for name in _OPTIONS if getattr(self, name) is not None}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}

    def load(self) -> Episodes:
        """The episodes."""
        return Episodes.from_dataset(self.open())

    def open(self, defaults: Mapping[str, Any] = types.MappingProxyType({})) -> Dataset:
        """The dataset, whatever is wrong with it. `defaults` are options of the reader that were not given."""
        return open_dataset(
            self.source,
            format=self.format,
            config=self.configuration,
            split=self.split,
            revision=self.revision,
            **{**defaults, **self.reader_options()},
        )


@dataclass(kw_only=True)
class ConvertArguments:
    """Where `dmc-hub data convert` writes."""

    output_dir: str = field(metadata={"help": "New folder for the converted data."})


@dataclass(kw_only=True)
class ValidateArguments:
    """What `dmc-hub data validate` compares with."""

    task: str | None = field(
        default=None,
        metadata={"help": "Task that the data are for: how to read them, its action space, what its data may have."},
    )
    allow_defects: list[str] = field(
        default_factory=list, metadata={"help": f"Kinds that are no failure, from {', '.join(DEFECTS)}."}
    )


@dataclass(kw_only=True)
class ViewArguments:
    """Where `dmc-hub data view` draws."""

    output: str = field(metadata={"help": "PNG file to write."})


@dataclass(kw_only=True)
class PushDataArguments:
    """What `dmc-hub data push` says of the data."""

    repo_id: str = field(metadata={"help": "Repo `user/name` of the dataset."})
    title: str = field(metadata={"help": "Heading of the card."})
    description: str = field(metadata={"help": "A paragraph on what the data are and where they come from."})
    license: str = field(metadata={"help": "Licence of the data, as the Hub calls it, such as apache-2.0."})
    validation_fraction: float = field(
        default=0.0, metadata={"help": "Share of the episodes that become the split validation; 0: no such split."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the split."})
    private: bool | None = field(
        default=None, metadata={"help": "Whether a new repo is private; as the account has it by default."}
    )


@dataclass(kw_only=True)
class ExportDataArguments:
    """Arguments of `dmc-hub data export`."""

    task: str = field(metadata={"help": "The task; `dmc-hub tasks` lists them."})
    output_dir: str = field(metadata={"help": "The folder to write; for minari, the one its datasets lie in."})
    format: Literal["datasets", "lerobot", "minari"] = field(
        default="datasets", metadata={"help": "Parquet with a card for `datasets`, a LeRobotDataset v3.0, or Minari."}
    )
    repo_id: str = field(
        default="user/dataset", metadata={"help": "The repository that the card's examples load, as owner/name."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the data."})


def data_info(arguments: SourceArguments) -> None:
    """Say what data are, without reading a raw file's steps."""
    path = Path(arguments.source)
    kind = arguments.format or (detect_format(path) if path.exists() else None)
    if kind is not None and not is_converted(path):
        lines = _describe_source(arguments)
    else:
        episodes = arguments.load()
        facts = checkpoint.load_json(path / FACTS_NAME) if (path / FACTS_NAME).is_file() else {}
        lines = {"kind": "converted" if facts else "dataset"}
        lines |= {f"source {name}": value for name, value in facts.items() if name != "statistics"}
        lines |= {
            "observation_dim": episodes.observation_dim,
            "action_dim": episodes.action_dim,
            "steps": episodes.num_steps,
            "episodes": episodes.num_episodes,
            "images": {camera: frames.shape[1:] for camera, frames in episodes.images.items()},
        }
    print(one_line(arguments.source))
    for name, value in lines.items():
        print(f"  {one_line(name)}: {one_line(value if isinstance(value, str) else json.dumps(value))}")


def data_convert(source: SourceArguments, arguments: ConvertArguments) -> None:
    """Convert a raw file."""
    folder = Path(arguments.output_dir)
    if folder.exists():
        raise ValueError(f"`output_dir` {folder} is there already: choose another folder.")
    convert(open_source(source.source, source.format, **source.reader_options()), folder)
    print(json.dumps(checkpoint.load_json(folder / FACTS_NAME)["statistics"]["episodes"], indent=2))


def data_validate(source: SourceArguments, arguments: ValidateArguments) -> None:
    """Say everything that is wrong with data."""
    defects = missing_shards(Path(source.source)) if Path(source.source).is_dir() else []
    task = None if arguments.task is None else get_task(arguments.task)
    if not defects:
        options, bounds = ({}, None) if task is None else (task.options_for(source.source), action_bounds(task))
        defects = validate_dataset(source.open(options), action_bounds=bounds)
    print(f"{one_line(source.source)}: {len(defects) or 'no'} defects of {len(DEFECTS)} kinds")
    for defect in defects:
        print(f"  {one_line(str(defect))}")
    allowed = () if task is None else task.allowed_defects
    refuse_defects(source.source, defects, [*allowed, *arguments.allow_defects])


def data_stats(arguments: SourceArguments) -> None:
    """Print the statistics of data."""
    print(json.dumps(dataset_statistics(arguments.load().to_dataset()), indent=2))


def data_view(source: SourceArguments, arguments: ViewArguments) -> None:
    """Draw data."""
    episodes = source.load()
    plot_episodes(episodes, arguments.output, title=Path(source.source).name)
    print(f"{episodes.num_episodes} episodes, {episodes.num_steps} steps; see {arguments.output}")


def data_push(source: SourceArguments, arguments: PushDataArguments) -> None:
    """Push data to the Hub, with a card."""
    text = DatasetCardText(
        title=arguments.title,
        description=arguments.description,
        repo_id=arguments.repo_id,
        command=f"dmc-hub data push --source {Path(source.source).name} --repo-id {arguments.repo_id}",
        license=arguments.license,
    )
    episodes = source.load()
    if arguments.validation_fraction:
        fraction, seed = arguments.validation_fraction, arguments.seed
        splits = split_episodes(episodes, validation_fraction=fraction, seed=seed)
    else:
        splits = {"train": episodes.to_dataset()}
    with tempfile.TemporaryDirectory() as scratch:
        save_dataset(Path(scratch) / "data", [DatasetConfig("default", arguments.title, splits)], text)
        revision = push_dataset(Path(scratch) / "data", arguments.repo_id, private=arguments.private)
    print(f"pushed {arguments.repo_id} at {revision[:12]}")


def data_export(arguments: ExportDataArguments) -> None:
    """Write a task's data in a format of others."""
    from dmc_hub.interop import save_lerobot_dataset, save_minari_dataset

    task, folder = get_task(arguments.task), Path(arguments.output_dir)
    data = task.dataset(arguments.seed)
    scores = {} if task.optimal_return is None else {"optimum": task.optimal_return()}
    if arguments.format == "datasets":
        text = DatasetCardText(
            title=task.name,
            description=f"Offline data of {task.summary}.",
            repo_id=arguments.repo_id,
            command=f"dmc-hub data export --task {task.name} --seed {arguments.seed} --output-dir {task.name}",
            scores=scores,
        )
        splits = split_episodes(data, seed=arguments.seed)
        save_dataset(folder, [DatasetConfig(task.name, task.summary, splits)], text)
    elif arguments.format == "lerobot":
        save_lerobot_dataset(data, folder, task=task.summary, fps=1, state_dim=1, reference_scores=scores)
    else:
        os.environ["MINARI_DATASETS_PATH"] = str(folder)
        save_minari_dataset(data, f"{task.name}-v0", env_id=task.env_id, description=task.summary)
    print(f"saved {folder}")


def _describe_source(arguments: SourceArguments) -> dict[str, Any]:
    source = open_source(arguments.source, arguments.format, **arguments.reader_options())
    contents = source.contents
    lines: dict[str, Any] = {
        "kind": f"raw, {source.format}",
        "observation_dim": contents.observation_dim,
        "action_dim": contents.action_dim,
        "steps": "unknown before it is read" if contents.num_steps is None else contents.num_steps,
        "episodes": "unknown before it is read" if contents.num_episodes is None else contents.num_episodes,
        "images": contents.image_shapes,
        "options": ", ".join(source.option_names()),
    }
    return {**lines, **{f"array {key}": value for key, value in contents.arrays.items()}}
