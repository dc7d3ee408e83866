"""Sequential alignment: passes of RL, DPO and SFT on one LoRA, each stage kept only if it held up."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import TrainerCallback

from dmc_hub import checkpoint
from dmc_hub.data import Episodes
from dmc_hub.rewards import RewardFunction
from dmc_hub.trainers.ddpo import DDPOConfig, DDPOTrainer
from dmc_hub.trainers.dpo import DiffusionDPOConfig, DiffusionDPOTrainer
from dmc_hub.trainers.nft import NFTConfig, NFTTrainer
from dmc_hub.trainers.reward_gradient import RewardGradientConfig, RewardGradientTrainer
from dmc_hub.trainers.sampling import SamplingConfig, SamplingTrainer
from dmc_hub.trainers.sft import NoSamplesLeftError, SFTConfig, SFTTrainer

METHODS: dict[str, tuple[type[SamplingTrainer], type[SamplingConfig]]] = {
    "ddpo": (DDPOTrainer, DDPOConfig),
    "reward_gradient": (RewardGradientTrainer, RewardGradientConfig),
    "nft": (NFTTrainer, NFTConfig),
    "dpo": (DiffusionDPOTrainer, DiffusionDPOConfig),
    "sft": (SFTTrainer, SFTConfig),
}

Validation = Callable[[Any], Mapping[str, float]]
"""`pipeline -> {"return_mean": ..., "return_std": ..., "coherency": ...}` on validation seeds."""


@dataclass(kw_only=True)
class AlignmentConfig:
    """Settings of `SequentialAligner`."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the stages and of alignment_log.jsonl; None writes nothing."}
    )
    methods: list[str] = field(
        default_factory=lambda: ["ddpo", "dpo", "sft"],
        metadata={"help": f"Methods of one pass, in order; from {', '.join(METHODS)}."},
    )
    num_passes: int = field(default=2, metadata={"help": "Passes through the methods."})
    max_return_drop: float = field(
        default=0.02, metadata={"help": "A stage that ends below (1 - this) times the best return is rolled back."}
    )
    max_coherency_drop: float = field(
        default=0.1,
        metadata={"help": "A stage that ends below (1 - this) times the foundation's coherency is rolled back."},
    )
    learning_rate_decay: float = field(
        default=0.5, metadata={"help": "Factor on a method's learning rate after each of its stages."}
    )
    seed: int = field(default=0, metadata={"help": "Every stage's seed is derived from it."})

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods:
            raise ValueError(f"`methods` must be a list of {', '.join(METHODS)}; got {self.methods}.")
        if self.num_passes < 1:
            raise ValueError(f"`num_passes` must be at least 1, got {self.num_passes}.")
        for name in ("max_return_drop", "max_coherency_drop"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if not 0 < self.learning_rate_decay <= 1:
            raise ValueError(f"`learning_rate_decay` must lie in (0, 1], got {self.learning_rate_decay}.")


@dataclass(frozen=True)
class StageResult:
    """What one stage did. `decision` is "start", "kept" or "rolled back", `reason` says why."""

    stage: int
    name: str
    decision: str
    reason: str
    return_mean: float
    return_std: float
    coherency: float | None
    wall_seconds: float
    train_metrics: dict[str, float] = field(default_factory=dict)


class SequentialAligner:
    """Runs passes of alignment methods one after the other on one LoRA (section 3.5 of arXiv:2502.12198).

    After each stage the controller is validated. A stage whose loss became NaN, whose samples were all rejected, whose
    return fell or whose coherency left its bound is rolled back to the best state; at the end the best state of all
    stages is restored. Finished stages are written to `output_dir` one by one, each in one step; an interrupted run
    continues after the last. It runs in one process.

    Args:
        pipeline: a foundation with a critic; after `run` it carries the adapter.
        config: see `AlignmentConfig`.
        train_dataset: `Episodes` or a `datasets.Dataset`; alignment draws conditions from its observations.
        validate: see `Validation`. Use other seeds than for the results you report.
        stage_configs: the config of each method; the method's defaults where missing.
        reward_function: by default the critic's advantage of the first action.
        peft_config: rank 16 on all layers by default.
        callbacks: passed to every trainer.
    """

    def __init__(
        self,
        pipeline: Any,
        config: AlignmentConfig,
        *,
        train_dataset: Any,
        validate: Validation,
        stage_configs: Mapping[str, SamplingConfig] | None = None,
        reward_function: RewardFunction | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        refuse_several_processes("SequentialAligner")
        self.pipeline = pipeline
        self.config = config
        self.train_dataset = Episodes.ensure(train_dataset)
        self.validate = validate
        self.stage_configs = dict(stage_configs or {})
        for method, stage_config in self.stage_configs.items():
            if method not in METHODS or not isinstance(stage_config, METHODS[method][1]):
                raise ValueError(f"`stage_configs` has {method!r}: {type(stage_config).__name__}, which do not fit.")
        self.reward_function = reward_function
        self.peft_config = peft_config or LoraConfig(r=16, lora_alpha=16)
        self.callbacks = callbacks
        self.results: list[StageResult] = []
        self.num_resumed = 0  # how many of the results an earlier process left
        self._best: tuple[float, dict[str, Tensor]] = (float("-inf"), {})

    @property
    def stage_names(self) -> list[str]:
        """The methods of all passes in order."""
        return self.config.methods * self.config.num_passes

    def run(self) -> list[StageResult]:
        """Align, and return one result per stage, the foundation's first."""
        if not self.pipeline.lora_names:
            self.pipeline.add_lora(self.peft_config, seed=self.config.seed)
        self._resume()
        if not self.results:
            self._finish(StageResult(0, "foundation", "start", "before alignment", **self._validated(0.0)))
        for stage in range(len(self.results), len(self.stage_names) + 1):
            self._run_stage(stage, self.stage_names[stage - 1])
        self._set_adapter(self._best[1])
        return self.results

    def _run_stage(self, stage: int, method: str) -> None:
        start = time.perf_counter()
        metrics: dict[str, float] = {}
        try:
            metrics = self._train(stage, method)
            measured = self._validated(start)
            reason = self._collapse(measured)
        except (FloatingPointError, NoSamplesLeftError) as error:  # FloatingPointError: NaN in the loss or in samples
            reason, measured = str(error), {}
        if reason:
            self._set_adapter(self._best[1])
            measured = measured or self._validated(start)
        decision = "rolled back" if reason else "kept"
        self._finish(StageResult(stage, method, decision, reason or "within bounds", **measured, train_metrics=metrics))

    def _train(self, stage: int, method: str) -> dict[str, float]:
        trainer_type, config_type = METHODS[method]
        earlier = self.stage_names[: stage - 1].count(method)
        config: Any = self.stage_configs.get(method) or config_type(output_dir=None)
        decay = self.config.learning_rate_decay**earlier
        config = dataclasses.replace(
            config, seed=self.config.seed * 1000 + stage, learning_rate=config.learning_rate * decay
        )
        trainer = trainer_type(
            self.pipeline,
            config,
            train_dataset=self.train_dataset,
            reward_function=self.reward_function,
            callbacks=self.callbacks,
        )
        trainer.train()
        self._check_samples(trainer)
        rows = [row for row in trainer.history if "train_runtime" not in row]
        return {name: float(value) for row in rows for name, value in row.items()}

    def _check_samples(self, trainer: SamplingTrainer) -> None:
        """Raise a FloatingPointError if the last update, whose gradient was finite, left a controller that is not."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            samples = self.pipeline.sample(trainer.conditions(64, generator), generator=generator)
        if not torch.isfinite(samples).all():
            raise FloatingPointError("The controller generates NaN or infinite actions: its weights have collapsed.")

    def _validated(self, start: float) -> dict[str, Any]:
        measured = self.validate(self.pipeline)
        return {
            "return_mean": float(measured["return_mean"]),
            "return_std": float(measured["return_std"]),
            "coherency": None if measured.get("coherency") is None else float(measured["coherency"]),
            "wall_seconds": time.perf_counter() - start if start else 0.0,
        }

    def _collapse(self, measured: Mapping[str, Any]) -> str:
        """Why the stage cannot be kept; empty if it can."""
        best_return, coherency, foundation = self._best[0], measured["coherency"], self.results[0].coherency
        bound = best_return - self.config.max_return_drop * abs(best_return)
        if not measured["return_mean"] >= bound:
            return f"return {measured['return_mean']:.3f} fell below {bound:.3f}"
        if coherency is not None and foundation is not None:
            bound = (1 - self.config.max_coherency_drop) * foundation
            if coherency < bound:
                return f"coherency {coherency:.3f} fell below {bound:.3f}"
        return ""

    def _finish(self, result: StageResult) -> None:
        """Remember the stage, and the adapter if it is the best so far; write both in one step."""
        if result.decision != "rolled back" and result.return_mean > self._best[0]:
            self._best = (result.return_mean, self._adapter())
        self.results.append(result)
        if self.config.output_dir is None:
            return
        folder = self._stage_folder(result.stage, result.name)
        stage = checkpoint.open_stage(folder)
        try:
            if result.stage:
                self.pipeline.save_lora_weights(stage)
            checkpoint.save_json(stage / "stage.json", dataclasses.asdict(result))
            checkpoint.commit_stage(stage, folder, {"stage": result.stage, "seed": self.config.seed})
        finally:
            checkpoint.discard_stage(stage)
        self._write_log()

    def _write_log(self) -> None:
        path = Path(str(self.config.output_dir)) / "alignment_log.jsonl"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in self.results))
        os.replace(temporary, path)

    def _resume(self) -> None:
        """Take up the finished stages of an earlier run in the same folder."""
        if self.config.output_dir is None or self.results:
            return
        for stage, name in enumerate(["foundation", *self.stage_names]):
            folder = self._stage_folder(stage, name)
            if not folder.is_dir():
                return
            self._check_stage(folder)
            result = StageResult(**checkpoint.load_json(folder / "stage.json"))
            if stage:
                self._load_adapter(folder)
            if result.decision != "rolled back" and result.return_mean > self._best[0]:
                self._best = (result.return_mean, self._adapter())
            self.results.append(result)
            self.num_resumed = len(self.results)

    def _check_stage(self, folder: Path) -> None:
        try:
            seed = checkpoint.verify(folder).metadata.get("seed")
        except checkpoint.CheckpointError as error:
            raise checkpoint.CheckpointError(
                f"{error} To run this stage and those after it again, delete their folders in `{folder.parent}`."
            ) from error
        if seed != self.config.seed:
            raise ValueError(
                f"`output_dir` {self.config.output_dir!r} holds a run with seed {seed}, not {self.config.seed}: choose "
                "another folder."
            )

    def _stage_folder(self, stage: int, name: str) -> Path:
        return Path(str(self.config.output_dir)) / "stages" / f"{stage:02d}-{name}"

    def _load_adapter(self, folder: Path) -> None:
        self.pipeline.unload_lora()
        self.pipeline.load_lora_weights(folder)

    def _adapter(self) -> dict[str, Tensor]:
        state = get_peft_model_state_dict(self.pipeline.denoiser)
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def _set_adapter(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            set_peft_model_state_dict(self.pipeline.denoiser, state)


def refuse_several_processes(name: str) -> None:
    """Raise a ValueError where a launcher started more than one process, which would all write the same files."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ValueError(
            f"`{name}` runs in one process, not {world_size}: start it without a launcher. The single methods "
            "(`dmc-hub train-ddpo` and its kin) take several."
        )
