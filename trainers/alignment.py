"""Sequential alignment: passes of RL, DPO and SFT on one LoRA, each stage kept only if it held up."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from dmc_hub import checkpoint
from dmc_hub.conditions import episodes_that_fit
from dmc_hub.divergence import candidate_spread, denoising_kl
from dmc_hub.errors import CollapseError
from dmc_hub.output_folder import save_error
from dmc_hub.rewards import NonFiniteRewardError, RewardFunction
from dmc_hub.trainers.base import DiffusionTrainer
from dmc_hub.trainers.iql import IQLConfig
from dmc_hub.trainers.joint import SINGLE_METHODS, JointConfig, JointTrainer
from dmc_hub.trainers.loop import last_metrics, verify_part
from dmc_hub.trainers.online import EnvironmentMaker, OnlineCollector, OnlineConfig
from dmc_hub.trainers.sampling import SamplingConfig
from dmc_hub.trainers.sft import NoSamplesLeftError

METHODS: dict[str, tuple[type[DiffusionTrainer], type[SamplingConfig]]] = {
    **SINGLE_METHODS,
    "joint": (JointTrainer, JointConfig),
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
    max_passes: int = field(default=3, metadata={"help": "Passes through the methods at most."})
    min_gain: float = field(
        default=0.01,
        metadata={"help": "A pass that raises the best return by less than this share of it is the last."},
    )
    validations_per_stage: int = field(
        default=4, metadata={"help": "Validations of a stage, evenly over its steps; the stage ends at the best one."}
    )
    patience: int = field(
        default=2, metadata={"help": "A stage has converged after so many validations without a better return."}
    )
    max_return_drop: float = field(
        default=0.0, metadata={"help": "A stage that ends below (1 - this) times the best return is rolled back."}
    )
    max_coherency_drop: float = field(
        default=0.1,
        metadata={"help": "States below (1 - this) times the foundation's coherency are not kept."},
    )
    max_divergence: float | None = field(
        default=None,
        metadata={"help": "delta of Eq. 6: states of a larger denoising KL to the foundation, in nats, are not kept."},
    )
    min_diversity: float | None = field(
        default=None,
        metadata={"help": "States whose candidates spread less than this share of the foundation's are not kept."},
    )
    bound_bisections: int = field(
        default=3,
        metadata={
            "help": "Where a stage leaves a bound, the way there from its best state is halved so many times, to end "
            "close to the bound."
        },
    )
    collapse_drop: float = field(
        default=0.2, metadata={"help": "A return below (1 - this) times the best is a collapse and ends the stage."}
    )
    spike_factor: float = field(
        default=1000.0,
        metadata={"help": "A gradient so many times the median of the stage's steps before it is a collapse."},
    )
    num_retries: int = field(
        default=1, metadata={"help": "Times a collapsed stage is tried again, at a lower learning rate."}
    )
    num_rollbacks: int = field(
        default=1, metadata={"help": "A method is skipped once so many of its stages in a row were rolled back."}
    )
    retry_learning_rate: float = field(default=0.3, metadata={"help": "Factor on the learning rate of each retry."})
    learning_rate_decay: float = field(
        default=0.5, metadata={"help": "Factor on a method's learning rate after each of its stages."}
    )
    seed: int = field(default=0, metadata={"help": "Every stage's seed is derived from it."})
    on_save_error: str = field(
        default="raise",
        metadata={"help": '"raise", or "warn" and go on without, when a checkpoint or a stage cannot be written.'},
    )

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods:
            raise ValueError(f"`methods` must be a list of {', '.join(METHODS)}; got {self.methods}.")
        if self.on_save_error not in ("raise", "warn"):
            raise ValueError(f"`on_save_error` must be 'raise' or 'warn', got {self.on_save_error!r}.")
        for name in ("max_passes", "validations_per_stage", "patience", "num_rollbacks"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in (
            "min_gain",
            "max_return_drop",
            "max_coherency_drop",
            "collapse_drop",
            "num_retries",
            "bound_bisections",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        for name in ("max_divergence", "spike_factor"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        for name in ("learning_rate_decay", "retry_learning_rate", "min_diversity"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"`{name}` must lie in (0, 1], got {value}.")


@dataclass(frozen=True)
class Measured:
    """One validation.

    Attributes:
        step: optimizer step of the stage.
        return_mean: of the validation; likewise `return_std` and `coherency`.
        divergence: `denoising_kl` to the foundation, in nats per entry.
        diversity: `candidate_spread`.
    """

    step: int
    return_mean: float
    return_std: float
    coherency: float | None
    divergence: float
    diversity: float


@dataclass(frozen=True)
class StageResult:
    """What one stage did. `decision` is "start", "kept", "rolled back" or "skipped", `reason` says why.

    The figures are those of the state that was kept, or of what was discarded; of a skipped stage the best state's.
    """

    stage: int
    name: str
    decision: str
    reason: str
    return_mean: float
    return_std: float
    coherency: float | None
    wall_seconds: float
    divergence: float = 0.0
    diversity: float = 0.0
    num_steps: int = 0
    learning_rate: float | None = None
    validations: list[dict[str, Any]] = field(default_factory=list)
    retries: list[str] = field(default_factory=list)
    train_metrics: dict[str, float] = field(default_factory=dict)


class SequentialAligner:
    """Runs passes of alignment methods one after the other on one LoRA (section 3.5 of arXiv:2502.12198), by itself.

    The controller is validated as a stage goes on. A stage ends when its steps are done, when it has converged, when it
    has left a bound (coherency, divergence from the foundation, diversity) or when it has collapsed (NaN, a spike of
    the gradient, a lost return); the best of its states within the bounds goes on, or the state before it if there is
    none. The states between the best one and one that left a bound are searched by bisection: adapters in between cost
    a validation, and no training. A collapsed stage is tried again at a lower learning rate, and a method that was
    rolled back is skipped from then on. Passes go on until one gains next to nothing, and the best state of all is
    restored.

    Finished stages are written to `output_dir` one by one, each in one step, and checkpoints on the way: an interrupted
    run continues where it was. It runs in one process.

    Args:
        pipeline: a foundation with a critic; after `run` it carries the adapter.
        config: see `AlignmentConfig`.
        train_dataset: `Episodes` or a `datasets.Dataset`; alignment draws conditions from its observations.
        validate: see `Validation`. Use other seeds than for the results you report.
        stage_configs: the config of each method; the method's defaults where missing.
        reward_function: by default the critic's advantage of the first action.
        peft_config: rank 16 on all layers by default.
        callbacks: passed to every trainer.
        online: with it, episodes are collected between the stages; see `OnlineCollector`. They join `train_dataset`,
            and the pipeline's critic is trained on.
        make_env: makes the environments of a collection.
        critic_config: of the critic's training after each collection; IQL's defaults with 1000 steps where missing.
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
        online: OnlineConfig | None = None,
        make_env: EnvironmentMaker | None = None,
        critic_config: IQLConfig | None = None,
    ) -> None:
        refuse_several_processes("SequentialAligner")
        self.pipeline = pipeline
        self.config = config
        self.train_dataset = episodes_that_fit(pipeline, train_dataset)
        self.validate = validate
        self.stage_configs = dict(stage_configs or {})
        for method, stage_config in self.stage_configs.items():
            if method not in METHODS or not isinstance(stage_config, METHODS[method][1]):
                raise ValueError(f"`stage_configs` has {method!r}: {type(stage_config).__name__}, which do not fit.")
        self.reward_function = reward_function
        self.peft_config = peft_config or LoraConfig(r=16, lora_alpha=16)
        self.callbacks = callbacks
        self.folder = None if config.output_dir is None else Path(config.output_dir)  # None: nothing more is written
        self.collector = self._collector(online, make_env, critic_config)
        self.results: list[StageResult] = []
        self.num_resumed = 0  # how many of the results an earlier process left
        self.end_reason = ""
        self._best: tuple[float, dict[str, Tensor]] = (float("-inf"), {})

    @property
    def stage_names(self) -> list[str]:
        """The methods of all passes in order."""
        return self.config.methods * self.config.max_passes

    @property
    def best_return(self) -> float:
        """Validated return of the best state so far, which `run` ends with."""
        return self._best[0]

    def run(self) -> list[StageResult]:
        """Align, and return one result per stage, the foundation's first."""
        if not self.pipeline.lora_names:
            self.pipeline.add_lora(self.peft_config, seed=self.config.seed)
        self._resume()
        if not self.results:
            self._finish(_result(0, "foundation", "start", "before alignment", self.measure(0)))
        while not self._is_over():
            stage = len(self.results)
            method = self.stage_names[stage - 1]
            self._collect_before(stage)
            if self._is_hopeless(method):
                self._skip(stage, method)
            else:
                self._run_stage(stage, method)
        self._write_log()
        self._set_adapter(self._best[1])
        return self.results

    def _collector(
        self, online: OnlineConfig | None, make_env: EnvironmentMaker | None, critic_config: IQLConfig | None
    ) -> OnlineCollector | None:
        if (online is None) != (make_env is None):
            raise ValueError("`online` and `make_env` belong together: pass both, or none to align on logged data.")
        if online is None or make_env is None:
            return None
        return OnlineCollector(
            self.pipeline,
            online,
            logged=self.train_dataset,
            make_env=make_env,
            critic_config=critic_config or IQLConfig(output_dir=None, max_steps=1000),
            seed=self.config.seed,
            folder=None if self.folder is None else self.folder / "stages",
            saving=self.saving,
        )

    def _collect_before(self, stage: int) -> None:
        if self.collector is not None and stage > 1:
            self.collector.collect_before(stage)
            self._write_log()

    def measure(self, step: int) -> Measured:
        """Validate the controller as it is.

        Raises:
            FloatingPointError: it generates NaN: the last update, whose gradient was finite, left weights that are not.
        """
        was_training = self.pipeline.denoiser.training
        self.pipeline.denoiser.eval()
        try:
            with torch.random.fork_rng(), torch.no_grad():
                condition = self._conditions()
                diversity = candidate_spread(self.pipeline, condition, seed=self.config.seed)
                if not math.isfinite(diversity):
                    raise CollapseError("The controller generates NaN or infinite actions: its weights collapsed.")
                divergence = denoising_kl(self.pipeline, condition, seed=self.config.seed)
                measured = self.validate(self.pipeline)
        finally:
            self.pipeline.denoiser.train(was_training)
        coherency = measured.get("coherency")
        return Measured(
            step=step,
            return_mean=float(measured["return_mean"]),
            return_std=float(measured["return_std"]),
            coherency=None if coherency is None else float(coherency),
            divergence=divergence,
            diversity=diversity,
        )

    def violation(self, measured: Measured) -> str:
        """Which bound the state breaks; empty if none."""
        foundation, config = self.results[0], self.config
        if measured.coherency is not None and foundation.coherency is not None:
            bound = (1 - config.max_coherency_drop) * foundation.coherency
            if not measured.coherency >= bound:
                return f"coherency {measured.coherency:.3f} fell below {bound:.3f}"
        if config.max_divergence is not None and not measured.divergence <= config.max_divergence:
            return f"divergence {measured.divergence:.3f} rose above {config.max_divergence:.3f}"
        if config.min_diversity is not None and not measured.diversity >= config.min_diversity * foundation.diversity:
            return f"diversity {measured.diversity:.3f} fell below {config.min_diversity * foundation.diversity:.3f}"
        return ""

    def collapse(self, measured: Measured) -> str:
        """Whether the return has collapsed, in words; empty if it has not."""
        bound = self._best[0] - self.config.collapse_drop * abs(self._best[0])
        return "" if measured.return_mean >= bound else f"return {measured.return_mean:.3f} fell below {bound:.3f}"

    def _is_over(self) -> bool:
        """After the last pass, and after one that gained too little."""
        done, length = len(self.results) - 1, len(self.config.methods)
        if done and done % length == 0:
            before, after = (self._best_return(count) for count in (done - length + 1, done + 1))
            gain = (after - before) / max(abs(before), 1e-12)
            if gain < self.config.min_gain:
                self.end_reason = (
                    f"pass {done // length} raised the return by {gain:.1%}, less than {self.config.min_gain:.1%}"
                )
                return True
        if done == len(self.stage_names):
            self.end_reason = f"all {self.config.max_passes} passes are done"
        return done == len(self.stage_names)

    def _best_return(self, count: int) -> float:
        """The best of the first `count` results that were not discarded."""
        return max(row.return_mean for row in self.results[:count] if row.decision != "rolled back")

    def _is_hopeless(self, method: str) -> bool:
        """Whether the method's last stages were all rolled back, or skipped for that reason."""
        decisions = [row.decision for row in self.results if row.name == method][-self.config.num_rollbacks :]
        return len(decisions) == self.config.num_rollbacks and not {"start", "kept"} & set(decisions)

    def _skip(self, stage: int, method: str) -> None:
        best = max((row for row in self.results if row.decision != "rolled back"), key=lambda row: row.return_mean)
        figures = {name: getattr(best, name) for name in ("return_mean", "return_std", "coherency")}
        figures |= {"divergence": best.divergence, "diversity": best.diversity}
        self._set_adapter(self._best[1])
        self._finish(
            StageResult(stage, method, "skipped", "its last stage was rolled back", **figures, wall_seconds=0.0)
        )

    def _run_stage(self, stage: int, method: str) -> None:
        start, retries = time.perf_counter(), list[str]()
        attempt, before = self._first_attempt(stage, method), self._adapter()
        while True:
            config = self._stage_config(stage, method, attempt)
            trainer = self._trainer(method, config)
            watch = _StageWatch(self, trainer, self._work_folder(stage, method, attempt))
            try:
                self._train(trainer, watch)
            except (FloatingPointError, NonFiniteRewardError, NoSamplesLeftError) as error:
                watch.collapse = str(error)  # FloatingPointError: NaN in loss, gradient or samples
            if not (watch.collapse and watch.best is None) or attempt >= self.config.num_retries:
                break
            retries.append(watch.collapse)
            self._set_adapter(before)
            attempt += 1
        self._approach_bound(watch, before)
        decision, reason, measured = self._decide(watch)
        result = _result(
            stage,
            method,
            decision,
            reason,
            measured,
            wall_seconds=time.perf_counter() - start,
            num_steps=watch.step,
            learning_rate=config.learning_rate,
            validations=[dataclasses.asdict(row) for row in watch.validations],
            retries=retries,
            train_metrics=last_metrics(trainer.history),
        )
        self._finish(result)
        self._remove_work_folders(stage, method)

    def _approach_bound(self, watch: _StageWatch, before: dict[str, Tensor]) -> None:
        """Bisect the way from the stage's best state, or the one before the stage, to the state that left a bound."""
        if watch.outside is None:
            return
        reason, outside, (first, last) = watch.violation, watch.outside, (0, watch.step)
        inside = before
        if watch.best is not None:
            inside, first = watch.best[1], watch.best[0].step
        for _ in range(self.config.bound_bisections):
            middle = {name: torch.lerp(tensor, outside[name], 0.5) for name, tensor in inside.items()}
            self._set_adapter(middle)
            step = (first + last) // 2
            if watch.judge(self.measure(step), partial(dict, middle)):
                inside, first = middle, step
            else:
                outside, last = middle, step
        watch.violation, watch.collapse = reason, ""

    def _decide(self, watch: _StageWatch) -> tuple[str, str, Measured]:
        """Keep the stage's best state, or go back to the best of all."""
        bound = self._best[0] - self.config.max_return_drop * abs(self._best[0])
        problem = watch.collapse or watch.violation
        if watch.best is not None and watch.best[0].return_mean >= bound:
            measured, adapter = watch.best
            self._set_adapter(adapter)
            ended = problem or watch.converged
            return "kept", f"within bounds at step {measured.step}; {ended}" if ended else "within bounds", measured
        self._set_adapter(self._best[1])
        last = watch.validations[-1] if watch.validations else self.measure(0)
        return "rolled back", problem or f"return {last.return_mean:.3f} fell below {bound:.3f}", last

    def _stage_config(self, stage: int, method: str, attempt: int) -> Any:
        config_type = METHODS[method][1]
        config: Any = self.stage_configs.get(method) or config_type(output_dir=None)
        earlier = self.stage_names[: stage - 1].count(method)
        factor = self.config.learning_rate_decay**earlier * self.config.retry_learning_rate**attempt
        changes: dict[str, Any] = {
            "seed": self.config.seed * 1000 + stage + 100 * attempt,
            "learning_rate": config.learning_rate * factor,
            "on_save_error": self.config.on_save_error,
        }
        if self.folder is not None and self.config.validations_per_stage > 1:
            changes["output_dir"] = str(self._work_folder(stage, method, attempt))
            changes["save_strategy"] = "steps"
            changes["save_steps"] = self._interval(config.max_steps)
        return dataclasses.replace(config, **changes)

    def _interval(self, max_steps: int) -> int:
        return math.ceil(max_steps / self.config.validations_per_stage)

    def _trainer(self, method: str, config: Any) -> DiffusionTrainer:
        return METHODS[method][0](
            self.pipeline,
            config,
            train_dataset=self.train_dataset if self.collector is None else self.collector.episodes,
            reward_function=self.reward_function,
            callbacks=self.callbacks,
        )

    def _train(self, trainer: DiffusionTrainer, watch: _StageWatch) -> None:
        """Train to the end of the stage, from the last checkpoint of an interrupted run."""
        folder = trainer.args.output_dir
        newest = None if folder is None else checkpoint.latest_checkpoint(folder)
        watch.begin(
            self._interval(trainer.args.max_steps), None if newest is None else int(newest.name.rpartition("-")[2])
        )
        trainer.add_callback(watch)
        if not watch.is_over:
            trainer.train(resume_from_checkpoint=newest is not None)

    def _conditions(self) -> dict[str, Tensor]:
        """The same in every validation."""
        tensors: dict[str, Tensor] = self.pipeline.observation_condition(
            self._observations.to(self.pipeline.denoiser.device)
        )
        return tensors

    @cached_property
    def _observations(self) -> Tensor:
        """64 observations from the logged data."""
        windows = self.train_dataset.windows(self.pipeline.config.horizon, self.pipeline.num_observation_steps)
        generator = torch.Generator().manual_seed(self.config.seed)
        return windows.history(torch.randint(len(windows), (64,), generator=generator))

    def _finish(self, result: StageResult) -> None:
        """Remember the stage, and the adapter if it is the best so far; write both in one step."""
        if result.decision != "rolled back" and result.return_mean > self._best[0]:
            self._best = (result.return_mean, self._adapter())
        self.results.append(result)
        if self.folder is None:
            return
        folder, facts = self._stage_folder(result.stage, result.name), {"stage": result.stage, "seed": self.config.seed}
        with self.saving(folder), checkpoint.write_folder_atomically(folder, facts) as stage:
            if result.stage:
                self.pipeline.save_lora_weights(stage)
            checkpoint.save_json(stage / "stage.json", dataclasses.asdict(result))
        self._write_log()

    @contextmanager
    def saving(self, folder: Path) -> Iterator[None]:
        """Around what writes to `folder`: where that fails, alignment ends, or goes on and writes no more.

        What is there stays as it was, so that a run in the same folder goes on from there.

        Raises:
            SaveError: it failed, and `config.on_save_error` is "raise".
        """
        try:
            yield
        except (OSError, SafetensorError) as raised:
            error = save_error(folder, raised)
            if self.config.on_save_error == "raise":
                raise error from raised
            warnings.warn(f"Alignment goes on, and writes no more stages: {error}", stacklevel=3)
            self.folder = None
            if self.collector is not None:
                self.collector.folder = None

    def _write_log(self) -> None:
        if self.folder is None:
            return
        rows = [] if self.collector is None else [dataclasses.asdict(row) for row in self.collector.results]
        rows += [dataclasses.asdict(row) for row in self.results]
        rows.sort(key=lambda row: row["stage"])  # stable: a collection stands before the stage that it precedes
        if self.end_reason:
            rows.append({"name": "end", "decision": "stopped", "reason": self.end_reason})
        with self.saving(self.folder):
            checkpoint.write_text(self.folder / "alignment_log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def _resume(self) -> None:
        """Take up the finished stages of an earlier run in the same folder."""
        if self.folder is None or self.results:
            return
        if (unfinished := self.folder / "unfinished").is_dir():
            checkpoint.remove_stale(unfinished)
        for stage, name in enumerate(["foundation", *self.stage_names]):
            folder = self._stage_folder(stage, name)
            if not folder.is_dir():
                return
            verify_part(folder, self.config.seed)
            self._resume_collection(stage)
            result = StageResult(**checkpoint.load_json(folder / "stage.json"))
            if stage:
                self._load_adapter(folder)
            if result.decision != "rolled back" and result.return_mean > self._best[0]:
                self._best = (result.return_mean, self._adapter())
            self.results.append(result)
            self.num_resumed = len(self.results)
            self._remove_work_folders(stage, name)  # of a run that ended between the two

    def _resume_collection(self, stage: int) -> None:
        is_online = self.collector is not None and stage > 1
        if self._stage_folder(stage, "online").is_dir() != is_online:
            raise ValueError(
                f"`output_dir` {self.config.output_dir!r} holds a run {'without' if is_online else 'with'} online "
                "collection: choose another folder."
            )
        if self.collector is not None and is_online:
            self.collector.collect_before(stage)

    def _stage_folder(self, stage: int, name: str) -> Path:
        return Path(str(self.config.output_dir)) / "stages" / f"{stage:02d}-{name}"

    def _work_folder(self, stage: int, name: str, attempt: int) -> Path:
        """Where a stage that is not finished keeps its checkpoints and validations."""
        return Path(str(self.config.output_dir)) / "unfinished" / f"{stage:02d}-{name}-{attempt}"

    def _first_attempt(self, stage: int, method: str) -> int:
        """The attempt that an interrupted run was at."""
        if self.folder is None:
            return 0
        attempts = range(self.config.num_retries + 1)
        return max((i for i in attempts if self._work_folder(stage, method, i).is_dir()), default=0)

    def _remove_work_folders(self, stage: int, method: str) -> None:
        if self.folder is not None:
            for attempt in range(self.config.num_retries + 1):
                checkpoint.remove_folder(self._work_folder(stage, method, attempt))

    def _load_adapter(self, folder: Path) -> None:
        self.pipeline.unload_lora()
        self.pipeline.load_lora_weights(folder)

    def _adapter(self) -> dict[str, Tensor]:
        state = get_peft_model_state_dict(self.pipeline.denoiser)
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def _set_adapter(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            set_peft_model_state_dict(self.pipeline.denoiser, state)


class _StageWatch(TrainerCallback):
    """Validates the controller while a stage trains, remembers its best state, and says when to end the stage.

    What it has seen is written to the stage's work folder before each checkpoint, so that a resumed stage sees it too.
    """

    def __init__(self, aligner: SequentialAligner, trainer: DiffusionTrainer, folder: Path) -> None:
        self.aligner = aligner
        self.trainer = trainer
        self.folder = folder
        self.validations: list[Measured] = []
        self.best: tuple[Measured, dict[str, Tensor]] | None = None
        self.outside: dict[str, Tensor] | None = None  # the state that left a bound
        self.collapse = self.violation = self.converged = ""
        self.interval = 1
        self._norms: list[float] = []

    @property
    def step(self) -> int:
        """The last step that was validated."""
        return max((row.step for row in self.validations), default=0)

    @property
    def is_over(self) -> bool:
        """Whether the stage should end here."""
        return bool(self.collapse or self.violation or self.converged)

    def begin(self, interval: int, resumed_step: int | None) -> None:
        """Before training: take up what was seen until the checkpoint that training resumes from."""
        self.interval = interval
        if resumed_step is None:
            return
        seen = [Measured(**row) for row in checkpoint.load_json(self.folder / "validations.json")]
        for measured in seen:
            if measured.step <= resumed_step:
                self.judge(measured, partial(checkpoint.load_tensors, self._state_file(measured.step)))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        spike = self._spike(self.trainer.grad_norm, state.global_step)
        if not spike and state.global_step % self.interval and state.global_step < state.max_steps:
            return
        if spike:
            self.collapse = spike
        else:
            self.judge(self.aligner.measure(state.global_step), self.aligner._adapter)
        control.should_training_stop = control.should_training_stop or self.is_over
        if not self._write(state.global_step):
            control.should_save = False  # a checkpoint without its validations would be resumed to another end

    def _spike(self, norm: float, step: int) -> str:
        """Whether the gradient is out of all proportion to those of the stage's steps so far, in words."""
        usual = statistics.median(self._norms[-50:]) if len(self._norms) >= 3 else 0.0
        self._norms.append(norm)
        if 0 < usual * self.aligner.config.spike_factor < norm:
            return f"gradient of norm {norm:.3g} at step {step}, usually {usual:.3g}"
        return ""

    def judge(self, measured: Measured, adapter: Callable[[], dict[str, Tensor]]) -> bool:
        """Take a validation in; returns whether the state is within the bounds and has not collapsed."""
        self.validations.append(measured)
        self.collapse = self.aligner.collapse(measured)
        self.violation = "" if self.collapse else self.aligner.violation(measured)
        if self.violation:
            self.outside = adapter()
        if self.violation or self.collapse:
            return False
        if self.best is None or measured.return_mean > self.best[0].return_mean:
            self.best = (measured, adapter())
        waited = sum(row.step > self.best[0].step for row in self.validations)
        if waited >= self.aligner.config.patience:
            self.converged = f"converged: {waited} validations without a better return"
        return True

    def _state_file(self, step: int) -> Path:
        return self.folder / f"state-{step}.safetensors"

    def _write(self, step: int) -> bool:
        """Returns whether what was seen is there for a resumed stage."""
        if self.aligner.folder is None or self.aligner.config.validations_per_stage == 1:
            return False
        with self.aligner.saving(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            state = self.outside
            if self.best is not None and self.best[0].step == step:
                state = self.best[1]
            if state is not None:
                checkpoint.save_tensors(self._state_file(step), state)
            checkpoint.save_json(
                self.folder / "validations.json", [dataclasses.asdict(row) for row in self.validations]
            )
        return self.aligner.folder is not None


def _result(stage: int, name: str, decision: str, reason: str, measured: Measured, **others: Any) -> StageResult:
    figures = {key: value for key, value in dataclasses.asdict(measured).items() if key != "step"}
    return StageResult(stage, name, decision, reason, **{"wall_seconds": 0.0, **figures, **others})


def refuse_several_processes(name: str) -> None:
    """Raise a ValueError where a launcher started more than one process, which would all write the same files."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ValueError(
            f"`{name}` runs in one process, not {world_size}: start it without a launcher. The single methods "
            "(`dmc-hub train-ddpo` and its kin) take several."
        )
