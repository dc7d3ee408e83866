"""Online fine-tuning: between the stages of an alignment the controller collects episodes and the critic goes on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
from gymnasium.vector import VectorEnv

from dmc_hub import checkpoint
from dmc_hub.agent import Agent
from dmc_hub.conditions import episodes_that_fit
from dmc_hub.data import Episodes
from dmc_hub.data.episodes import IMAGE_PREFIX
from dmc_hub.rollout import Rollouts, run_episodes
from dmc_hub.trainers.iql import IQLConfig, IQLTrainer
from dmc_hub.trainers.loop import hash_seed, last_metrics, verify_part

EnvironmentMaker = Callable[[], VectorEnv[Any, Any, Any]]


@dataclass(kw_only=True)
class OnlineConfig:
    """What is collected between the stages of an alignment (section 3.6 of arXiv:2502.12198), and what is kept."""

    num_episodes: int = field(default=64, metadata={"help": "Episodes collected before each stage but the first."})
    buffer_size: int = field(
        default=100_000,
        metadata={
            "help": "Transitions of collected episodes that are kept at most: the oldest collected episodes are "
            "dropped, the logged data never."
        },
    )
    num_candidates: int = field(default=1, metadata={"help": "Candidates per decision while collecting."})
    action_selection: Literal["greedy", "expectation", "softmax"] = field(
        default="greedy", metadata={"help": "How one action is chosen among the candidates while collecting."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the selection 'softmax', in units of the return."})
    first_seed: int = field(
        default=3_000_000, metadata={"help": "Seed of the first collected episode; the others count up from it."}
    )

    def __post_init__(self) -> None:
        for name in ("num_episodes", "buffer_size", "num_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        choices = get_args(get_type_hints(type(self))["action_selection"])
        if self.action_selection not in choices:
            raise ValueError(f"`action_selection` must be one of {', '.join(choices)}; got {self.action_selection!r}.")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}.")
        if self.first_seed < 0:
            raise ValueError(f"`first_seed` must not be negative, got {self.first_seed}.")


@dataclass(frozen=True)
class CollectionResult:
    """One collection, as a row of alignment_log.jsonl.

    Attributes:
        stage: the stage that it precedes.
        name: "online".
        decision: "collected".
        reason: in words.
        num_episodes: episodes collected.
        num_steps: their transitions.
        failed_seeds: seeds of the episodes that were given up because their environment failed again and again.
        num_buffer_episodes: collected episodes in the buffer now; likewise `num_buffer_steps`.
        return_mean: of the new episodes, with the action selection of the collection; likewise `return_std`.
        critic_metrics: the critic's last ones.
        wall_seconds: of collecting and of the critic.
    """

    stage: int
    name: str
    decision: str
    reason: str
    num_episodes: int
    num_steps: int
    failed_seeds: list[int]
    num_buffer_episodes: int
    num_buffer_steps: int
    return_mean: float
    return_std: float
    wall_seconds: float
    critic_metrics: dict[str, float] = field(default_factory=dict)


class OnlineCollector:
    """Collects episodes with a controller, keeps the newest within a bound, and trains its critic on all there are.

    Each collection is written to `folder`, its episodes and its critic in one step each, and found again there.

    Args:
        pipeline: the controller with its critic.
        config: see `OnlineConfig`.
        logged: the data that alignment started from.
        make_env: makes the environments of one collection, which are closed after it. Where they may raise, die or
            hang, a `RestartingVectorEnv`; where they are cheap, a vector environment of this process.
        critic_config: of the critic's further training; `max_steps` is that of one collection.
        seed: with the number of the stage it determines the controller's noise and the critic's batches.
        folder: where collections are kept; None keeps none.
        saving: makes a context around what writes to a folder, for errors to be dealt with.

    Raises:
        ValueError: the pipeline has no critic.
    """

    def __init__(
        self,
        pipeline: Any,
        config: OnlineConfig,
        *,
        logged: Episodes,
        make_env: EnvironmentMaker,
        critic_config: IQLConfig,
        seed: int,
        folder: Path | None,
        saving: Callable[[Path], AbstractContextManager[None]] = lambda folder: nullcontext(),
    ) -> None:
        if pipeline.critic is None:
            raise ValueError("`pipeline` has no critic to train on collected episodes: train one with IQLTrainer.")
        self.pipeline = pipeline
        self.config = config
        self.logged = logged
        self.make_env = make_env
        self.critic_config = critic_config
        self.seed = seed
        self.folder = folder
        self.saving = saving
        self.collected: Episodes | None = None
        self.results: list[CollectionResult] = []
        self.num_found = 0  # how many of them an earlier process has left

    @property
    def episodes(self) -> Episodes:
        """The logged episodes and behind them the collected ones that are kept."""
        return self.logged if self.collected is None else Episodes.concatenate(self.logged, self.collected)

    def collect_before(self, stage: int) -> CollectionResult:
        """Collect with the controller as it is and train the critic, or take up what an earlier process has left.

        Raises:
            CheckpointError: what it left is damaged.
            ValueError: it was left by a run with another seed, or `buffer_size` does not hold a single episode.
            RuntimeError: all episodes failed.
        """
        new, facts = self._found(stage) or self._collect(stage)
        self.collected = self._bounded(new)
        training = self._continue_critic(stage)
        result = CollectionResult(
            stage=stage,
            name="online",
            decision="collected",
            reason=f"{new.num_episodes} episodes with {self.config.action_selection} selection among "
            f"{self.config.num_candidates}",
            num_episodes=new.num_episodes,
            num_steps=new.num_steps,
            failed_seeds=facts["failed_seeds"],
            num_buffer_episodes=self.collected.num_episodes,
            num_buffer_steps=self.collected.num_steps,
            return_mean=float(new.returns().mean()),
            return_std=float(new.returns().std()),
            wall_seconds=facts["wall_seconds"] + training["wall_seconds"],
            critic_metrics=training["metrics"],
        )
        self.results.append(result)
        return result

    def _bounded(self, new: Episodes) -> Episodes:
        joined = new if self.collected is None else Episodes.concatenate(self.collected, new)
        length = int(new.episode_lengths[-1])
        if length > self.config.buffer_size:
            raise ValueError(
                f"`buffer_size` must hold at least one episode: the last one has {length} steps, more than "
                f"{self.config.buffer_size}."
            )
        return joined.newest(self.config.buffer_size)

    def _found(self, stage: int) -> tuple[Episodes, dict[str, Any]] | None:
        """The episodes that an earlier process has left."""
        folder = self._part(stage, "online")
        if folder is None or not folder.is_dir():
            return None
        verify_part(folder, self.seed)
        self.num_found += 1
        return load_episodes(folder / "episodes.safetensors"), checkpoint.load_json(folder / "collection.json")

    def _collect(self, stage: int) -> tuple[Episodes, dict[str, Any]]:
        start = time.perf_counter()
        rollouts = self._run_episodes(stage)
        episodes = episodes_that_fit(self.pipeline, rollouts.to_episodes())
        facts = {
            "seeds": rollouts.seeds.tolist(),
            "failed_seeds": rollouts.failed_seeds.tolist(),
            "wall_seconds": time.perf_counter() - start,
        }
        folder = self._part(stage, "online")
        if folder is not None:
            with self.saving(folder), checkpoint.write_folder_atomically(folder, self._metadata(stage)) as part:
                save_episodes(part / "episodes.safetensors", episodes)
                checkpoint.save_json(part / "collection.json", facts)
        return episodes, facts

    def _run_episodes(self, stage: int) -> Rollouts:
        """One episode per seed; a stage's seeds follow those of the stage before."""
        agent = Agent(self.pipeline)
        options = {name: getattr(self.config, name) for name in ("num_candidates", "action_selection", "temperature")}
        first = self.config.first_seed + len(self.results) * self.config.num_episodes
        environments = self.make_env()
        try:
            return run_episodes(
                lambda observations, generator: agent(observations, generator=generator, **options).action,
                environments,
                seeds=range(first, first + self.config.num_episodes),
                generator=torch.Generator().manual_seed(hash_seed("collect", self.seed, stage)),
                on_reset=lambda _: agent.reset(),
                record_images=self.pipeline.components.get("vision_encoder") is not None,
            )
        finally:
            environments.close()

    def _continue_critic(self, stage: int) -> dict[str, Any]:
        folder, critic = self._part(stage, "critic"), self.pipeline.critic
        if folder is not None and folder.is_dir():
            verify_part(folder, self.seed)
            weights = checkpoint.load_tensors(folder / "critic.safetensors")
            checkpoint.check_same_tensors(folder, weights, critic.state_dict())
            critic.load_state_dict(weights)
            result: dict[str, Any] = checkpoint.load_json(folder / "training.json")
            return result
        start = time.perf_counter()
        settings: dict[str, Any] = {"seed": hash_seed("critic", self.seed, stage) % 2**31, "output_dir": None}
        config = dataclasses.replace(self.critic_config, save_strategy="no", **settings)
        trainer = IQLTrainer(self.pipeline, config, train_dataset=self.episodes)
        trainer.train()
        facts = {"metrics": last_metrics(trainer.history), "wall_seconds": time.perf_counter() - start}
        if folder is not None:
            with self.saving(folder), checkpoint.write_folder_atomically(folder, self._metadata(stage)) as part:
                checkpoint.save_tensors(part / "critic.safetensors", critic.state_dict())
                checkpoint.save_json(part / "training.json", facts)
        return facts

    def _part(self, stage: int, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{stage:02d}-{name}"

    def _metadata(self, stage: int) -> dict[str, Any]:
        return {"stage": stage, "seed": self.seed}


def save_episodes(path: Path, episodes: Episodes) -> None:
    """Write episodes as one safetensors file, a tensor for each of their arrays."""
    names = [field.name for field in dataclasses.fields(episodes) if field.name != "images"]
    arrays = {name: getattr(episodes, name) for name in names}
    arrays |= {IMAGE_PREFIX + camera: frames for camera, frames in episodes.images.items()}
    checkpoint.save_tensors(path, {name: torch.from_numpy(array) for name, array in arrays.items()})


def load_episodes(path: Path) -> Episodes:
    """Read what `save_episodes` wrote. Raises `CheckpointError` if the file is missing or unreadable."""
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in checkpoint.load_tensors(path).items()}
    cameras = [name for name in arrays if name.startswith(IMAGE_PREFIX)]
    images = {name.removeprefix(IMAGE_PREFIX): arrays.pop(name) for name in cameras}
    return Episodes(**arrays, images=images)
