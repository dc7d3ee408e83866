"""The one base of all trainers: `transformers.Trainer`, put right for diffusion models.

An algorithm's file adds a config, `make_batch` and `compute_loss`; this file holds everything else that
differs from the stock trainer: batches and noise that are a function of (seed, rank, step), checkpoints that
diffusers and peft can read and that are verified before they are loaded, a finite check before each optimizer
step, and EMA. What overrides nothing is in loop.py.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import TrainOutput

from dmc_hub import checkpoint, profiling
from dmc_hub.adapters import PEFT_PREFIX
from dmc_hub.checkpoint import CheckpointError
from dmc_hub.errors import CollapseError, DmcHubError, SaveError, StoppedBySignal
from dmc_hub.output_folder import alone_in, free_bytes, require_space
from dmc_hub.publish import ADAPTER_WEIGHTS
from dmc_hub.trainers.loop import (
    MicroSteps,
    ProgressBar,
    StepEnd,
    activate_alone,
    adapter_to_train,
    freeze_all_but,
    hash_seed,
    join_processes_on_cpu,
    leave_process_group_at_exit,
    stop_signals,
)
from dmc_hub.trainers.sharding import shard

_SHARDING = ("FSDP", "DEEPSPEED")
"""What `accelerate launch` turns on by ACCELERATE_USE_*; sampling calls the network whole, outside its wrapper."""

_NO_SHARDING = (
    "`fsdp` and `deepspeed` are not supported: start several processes, with `shard_optimizer` if memory is short."
)


class NonFiniteLossError(CollapseError):
    """The loss or the gradient was NaN or infinite in several steps in a row; raised on all processes."""


class SkippedStepWarning(UserWarning):
    """A step whose loss or gradient was NaN or infinite left the weights as they were, on all processes."""


@dataclass(kw_only=True)
class DiffusionConfig(TrainingArguments):
    """What all trainers share. Training runs for `max_steps` optimizer steps: there are no epochs.

    `output_dir=None` means that nothing is written. `save_strategy="steps"` turns checkpoints on.
    """

    per_device_train_batch_size: int = field(default=64, metadata={"help": "Batch per process and micro-step."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    save_strategy: str = field(default="no", metadata={"help": '"no", "steps" or "best".'})
    report_to: None | str | list[str] = field(  # noqa: RUF036 (the order that HfArgumentParser reads)
        default="none", metadata={"help": "Trackers, e.g. trackio."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay of the averaged weights that replace the last at the end."}
    )
    num_eval_batches: int = field(default=8, metadata={"help": "Batches per process in an evaluation."})
    max_skipped_steps: int = field(
        default=3,
        metadata={
            "help": "A step whose loss or gradient is not finite on any process is skipped on all; so many in a row "
            "end the run."
        },
    )
    on_save_error: str = field(
        default="raise", metadata={"help": '"raise" or "warn" when a checkpoint cannot be written.'}
    )
    shard_optimizer: bool = field(
        default=False,
        metadata={"help": "Each process keeps the optimizer's state of a part of the weights alone (ZeRO stage 1)."},
    )
    ddp_timeout: int = field(
        default=600, metadata={"help": "Seconds after which processes give up waiting for one that hangs."}
    )

    if TYPE_CHECKING:
        output_dir: str | None = None
        _n_gpu: int = 0

    def __post_init__(self) -> None:
        without_output = self.output_dir is None
        launched = any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true") for name in _SHARDING)
        self._check(not launched, _NO_SHARDING)
        if self.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
            join_processes_on_cpu(self.ddp_backend, self.ddp_timeout)
        super().__post_init__()
        if without_output:
            self.output_dir = None
        _check_trackers(self.report_to)
        self._n_gpu = min(self._n_gpu, 1)  # one process per device: nn.DataParallel never
        # The stock data path and its filter that logs NaN as 0.0 are not used.
        self.remove_unused_columns, self.ignore_data_skip, self.logging_nan_inf_filter = False, True, False
        self._check(self.max_steps > 0, "`max_steps` must be positive, got {}.", self.max_steps)
        self._check(self.num_eval_batches > 0, "`num_eval_batches` must be positive, got {}.", self.num_eval_batches)
        self._check(self.max_skipped_steps > 0, "`max_skipped_steps` must be positive, got {}.", self.max_skipped_steps)
        known = self.on_save_error in ("raise", "warn")
        self._check(known, "`on_save_error` must be 'raise' or 'warn', got {!r}.", self.on_save_error)
        decay = 0.5 if self.ema_decay is None else self.ema_decay
        self._check(0 < decay < 1, "`ema_decay` must be between 0 and 1, got {}.", decay)
        for name in ("save_strategy", "eval_strategy", "logging_strategy"):
            self._check(getattr(self, name) != "epoch", "`{}` must be 'steps': there are no epochs.", name)
        saves = self.save_strategy != "no"
        self._check(not (without_output and saves), "`output_dir` is None, but `save_strategy` is not 'no'.")
        self._check(not self.push_to_hub, "`push_to_hub` must be False: use `pipeline.push_to_hub`.")
        self._check(
            not self.activation_checkpointing_kwargs,
            "`activation_checkpointing_kwargs` must be empty, got {}: there is one way to recompute.",
            self.activation_checkpointing_kwargs,
        )
        self._check(not (self.fsdp or self.deepspeed), _NO_SHARDING)

    @staticmethod
    def _check(valid: bool, message: str, *values: object) -> None:
        if not valid:
            raise ValueError(message.format(*values))

    @property
    def should_save(self) -> bool:
        """Whether this process writes checkpoints."""
        return self.output_dir is not None and super().should_save


def _check_trackers(names: Any) -> None:
    missing = [name for name in names if name in ("trackio", "tensorboard") and find_spec(name) is None]
    if missing:
        raise ValueError(
            f'`report_to` names {", ".join(missing)}, which is not installed: `pip install "dmc_hub[trackers]"`.'
        )


class DiffusionTrainer(Trainer, ABC):
    """Trains one component of a pipeline; each algorithm is a subclass with `make_batch` and `compute_loss`.

    Args:
        pipeline: A `ControlPipeline`, or what has its `components`, `denoiser` and LoRA methods. One
            component is trained in place, the others are frozen and put in eval mode.
        args: The trainer's config.
        train_dataset: The data, in the form the algorithm wants.
        reward_function: A callable, for algorithms that need one.
        eval_dataset: Data for `make_eval_batch`.
        peft_config: Adds a LoRA named "default" by `pipeline.add_lora`, unless the denoiser already has an
            adapter. A denoiser with an adapter trains only that: one LoRA can go through several trainers.
        callbacks: `transformers.TrainerCallback` objects.
    """

    args: DiffusionConfig
    control: TrainerControl
    optimizer: Any
    loss_is_scaled_for_ga = False  # `compute_loss` returns the mean of its micro-batch

    def __init__(
        self,
        pipeline: Any,
        args: DiffusionConfig,
        *,
        train_dataset: Any,
        reward_function: Callable[..., Any] | None = None,
        eval_dataset: Any = None,
        peft_config: LoraConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.pipeline = pipeline
        self.reward_function: Any = reward_function
        if peft_config is not None and adapter_to_train(pipeline.denoiser) is None:
            pipeline.add_lora(peft_config, seed=args.seed)
        self._trainable = freeze_all_but(pipeline, self.trainable_parameters, args.device)
        super().__init__(
            model=self.trainable_module(),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[StepEnd(self._after_step), *callbacks],
        )
        # Without DDP, which syncs only what passes through its own forward: `_average_over_processes` syncs
        # any loss, be it of several forwards or of none through `model`.
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        if args.world_size > 1:
            leave_process_group_at_exit()
        self.remove_callback(PrinterCallback)
        self.remove_callback(DEFAULT_PROGRESS_CALLBACK)
        self._progress = ProgressBar()
        if not args.disable_tqdm:
            self.add_callback(self._progress)
        self.micro_step = 0
        self._ema: EMAModel | None = None
        self._metrics: dict[str, tuple[Tensor, int]] = {}
        self._window_loss = torch.zeros((), device=args.device)
        # The mean loss of the step, and the share of the processes that were told to stop:
        self._step_report = torch.zeros(2, device=args.device)
        self._stop_signal: int | None = None
        self._stop_agreed = False
        self._num_skipped = 0  # steps in a row until now
        self._inputs: dict[str, Tensor] = {}  # of the micro-step at hand
        self.grad_norm = 0.0  # of the last step, before clipping

    # ---- What an algorithm defines -------------------------------------------------------------------------

    @abstractmethod
    def make_batch(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the inputs of one micro-step, on any device, with this CPU generator as the only
        randomness."""

    @abstractmethod
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean loss, a scalar, of one micro-batch. Calling `self.pipeline`'s components instead of
        `model` is fine: gradients are averaged over processes after the backward pass, not by a wrapper's
        forward."""

    def make_eval_batch(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the inputs of one batch of `self.eval_dataset`; the same generators come in every
        evaluation."""
        raise ValueError(f"`{type(self).__name__}` has no evaluation: leave `eval_strategy` at 'no'.")

    def trainable_module(self) -> nn.Module:
        """The component that is trained; a trainer of the critic returns `self.pipeline.critic`."""
        result: nn.Module = self.pipeline.denoiser
        return result

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained: those of the adapter if the module has one, else all of the
        module."""
        module: Any = self.trainable_module()
        adapter = adapter_to_train(module)
        if adapter is None:
            return list(module.parameters())
        activate_alone(module, adapter)
        return [parameter for parameter in module.parameters() if parameter.requires_grad]

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors of this process to keep in checkpoints besides weights: rollout buffers, target
        networks."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `extra_state` returned; called before the first step of a resumed run, on CPU
        tensors."""

    def recompute_activations(self) -> None:
        """Called before training with `activation_checkpointing`: by default diffusers' own checkpointing."""
        if not self.model._supports_gradient_checkpointing:
            raise ValueError(
                f"`activation_checkpointing` must be False: `{type(self.model).__name__}` has no checkpointing."
            )
        self.model.enable_gradient_checkpointing()

    def after_optimizer_step(self) -> None:
        """Called after each optimizer step, before a checkpoint is written: to move a target network, say."""

    # ---- What an algorithm uses ----------------------------------------------------------------------------

    def generator(self, purpose: str) -> torch.Generator:
        """A new CPU generator that is a function of (`args.seed`, process, micro-step, `purpose`).

        The same purpose in the same micro-step gives the same stream: use one name per use.
        """
        return self._seeded(purpose, self.micro_step)

    def common_generator(self, purpose: str) -> torch.Generator:
        """As `generator`, but the same stream in all processes: that of the first."""
        return self._seeded(purpose, self.micro_step, process=0)

    def log_metric(self, name: str, value: Tensor | float) -> None:
        """Add to the mean of `name` (over steps, elements and processes) in the next log. Does not wait for a
        GPU."""
        added = torch.as_tensor(value, device=self.args.device).detach().float().mean()
        total, count = self._metrics.get(name, (torch.zeros((), device=self.args.device), 0))
        self._metrics[name] = (total + added, count + 1)

    @property
    def history(self) -> list[dict[str, float]]:
        """The rows logged so far, each with its `step`."""
        result: list[dict[str, float]] = self.state.log_history
        return result

    # ---- Training ------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
    ) -> TrainOutput:
        """Train for `args.max_steps` steps, counted from the start of the run.

        A first Ctrl-C or SIGTERM ends the current step, saves a checkpoint if saving is on, and stops; a
        second one stops at once. A step whose loss or gradient is not finite is skipped with a
        `SkippedStepWarning`.

        Args:
            resume_from_checkpoint: A checkpoint folder, True for the newest one in `args.output_dir` that
                verifies, or "auto" for that one if there is any. The resumed run equals an uninterrupted one
                bit for bit on the same hardware.

        Raises:
            CheckpointError: if the checkpoint is corrupt or does not fit. The weights are then unchanged.
            FolderInUseError: if another process trains into `args.output_dir`.
            NonFiniteLossError: if loss or gradient is not finite in `args.max_skipped_steps` steps in a row.
                The weights are those of the last finite step.
            SaveError: if a checkpoint cannot be written, and `args.on_save_error` is "raise".
            StoppedBySignal: a KeyboardInterrupt, after an interrupted run has stopped.
        """
        with self._alone():
            return self._train_alone(resume_from_checkpoint)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside the block no other process trains into the same folder."""
        with ExitStack() as stack:
            with self._all_or_none("The run did not start"):
                if self.args.output_dir is not None and self.is_world_process_zero():
                    stack.enter_context(alone_in(self.args.output_dir))
            yield

    def _train_alone(self, resume_from_checkpoint: str | Path | bool | None) -> TrainOutput:
        resume = self._checkpoint_to_resume(resume_from_checkpoint)
        set_seed(hash_seed("global", self.args.seed, self.args.process_index) % 2**32)
        self.optimizer = None
        self._metrics, self._ema = {}, None
        self._window_loss.zero_()
        self._stop_signal, self._stop_agreed, self._num_skipped = None, False, 0
        try:
            with stop_signals(self._request_stop), self._gradient_checkpointing():
                output = super().train(None if resume is None else str(resume))
        finally:
            self._progress.close()
            self._inputs = {}
            self.is_in_train = False
            self.model.eval()
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # out of training's autocast
        if self._ema is not None:
            self._ema.copy_to(self._trainable)
        self._check_processes_agree()
        if self._stop_signal is not None or self._stop_agreed:
            message = f"Stopped at step {self.state.global_step} of {self.args.max_steps}."
            raise StoppedBySignal(message, self._stop_signal or signal.SIGTERM)
        return output

    def _check_processes_agree(self) -> None:
        """Raise if the trained weights differ between processes, which no later step would notice."""
        if self.args.world_size == 1:
            return
        digest = hashlib.sha256()
        for parameter in self._trainable:
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
        digests = gather_object([digest.hexdigest()])
        if len(set(digests)) > 1:
            raise RuntimeError(f"After step {self.state.global_step} the weights of the processes differ: {digests}.")

    def create_optimizer(self, model: Any = None) -> Any:
        optimizer = super().create_optimizer(model)
        if self._is_sharded:
            shard(optimizer)
        return optimizer

    @property
    def _is_sharded(self) -> bool:
        return self.args.shard_optimizer and self.args.world_size > 1

    def get_train_dataloader(self) -> MicroSteps:
        """The numbers of the remaining micro-steps; `_prepare_inputs` turns each into its batch."""
        return MicroSteps(self)

    def num_examples(self, dataloader: Any) -> int:
        number: int = self.args.max_steps * self.get_total_train_batch_size(self.args)
        return number

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        self.micro_step = inputs["micro_step"]
        self._inputs = super()._prepare_inputs(self.make_batch(self._seeded("batch", self.micro_step)))
        return self._inputs

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._window_loss += loss.float()
        if self.accelerator.sync_gradients:
            self._average_over_processes()
            self._window_loss.zero_()
        return cast(Tensor, loss)

    def _average_over_processes(self) -> None:
        """One collective per optimizer step: the mean gradient, the mean loss, and whether a process is to
        stop."""
        stop = torch.full_like(self._window_loss, float(self._stop_signal is not None))
        self._step_report = torch.stack([self._window_loss, stop])
        if self.args.world_size == 1:
            return
        for parameter in self._trainable:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in self._trainable if parameter.grad is not None]
        flat = torch.cat([*(grad.float().flatten() for grad in grads), self._step_report])
        torch.distributed.all_reduce(flat)
        flat /= self.args.world_size
        *means, self._step_report = flat.split([*(grad.numel() for grad in grads), 2])
        for grad, mean in zip(grads, means, strict=True):
            grad.copy_(mean.view_as(grad))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As the stock trainer's. On a CPU gradients that are short enough are not multiplied by 1."""
        if self.args.device.type == "cpu":
            self.accelerator.unscale_gradients()
            grads = [parameter.grad for parameter in self._trainable if parameter.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) if grads else torch.zeros(())
            if norm <= self.args.max_grad_norm:
                return norm
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last call before the optimizer steps. NaN and infinity survive the averaging, so all processes
        agree on what to skip."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = torch.as_tensor(grad_norm, dtype=torch.float32, device=self._step_report.device)
        norm_value, loss, stop = torch.cat([norm.reshape(1), self._step_report]).tolist()
        self._stop_agreed, self.grad_norm = stop > 0, norm_value
        scaler = self.accelerator.scaler
        # A loss scaler skips steps with infinite gradients by itself.
        is_scaled = scaler is not None and scaler.is_enabled()
        if not math.isfinite(loss) or not (is_scaled or math.isfinite(norm_value)):
            self._skip_step(
                f"Step {self.state.global_step + 1}: the loss is {loss} and the norm of the gradient {norm_value}."
            )
        else:
            self._num_skipped = 0
        return grad_norm

    def _skip_step(self, problem: str) -> None:
        """Optimizers pass over parameters without a gradient: neither weights nor their own state change."""
        for parameter in self._trainable:
            parameter.grad = None
        self._num_skipped += 1
        if self._num_skipped < self.args.max_skipped_steps:
            warnings.warn(f"{problem} It is skipped: the weights stay as they are.", SkippedStepWarning, stacklevel=3)
            return
        raise NonFiniteLossError(
            f"{problem} There were {self._num_skipped} such steps in a row (`max_skipped_steps`). The weights are "
            f"those of the last finite step. {self._kept_batch()}Lower `learning_rate`, or check the data and rewards."
        )

    def _kept_batch(self) -> str:
        """Write the batch of each process beside the checkpoints, and say where."""
        if self.args.output_dir is None:
            return ""
        folder = Path(self.args.output_dir) / "non-finite"
        path = folder / f"step-{self.state.global_step + 1}-process-{self.args.process_index}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value for name, value in self._inputs.items() if isinstance(value, Tensor)}
        checkpoint.save_tensors(path, tensors)
        return f"The last batch is in `{path}`. "

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.args.world_size > 1:
            for tensor in self.model.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)
        if self.args.ema_decay is not None:
            self._ema = EMAModel(self._trainable, decay=self.args.ema_decay, foreach=True)
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            self._load_ema(folder)
            extra = folder / f"extra-{self.args.process_index}.safetensors"
            if extra.is_file():
                self.load_extra_state(checkpoint.load_tensors(extra))
        return prepared

    def _init_training_state(self, max_steps: int, *args: Any) -> Any:
        result = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)  # this run's intervals, not those of the checkpoint
        return result

    def _after_step(self, control: TrainerControl) -> None:
        profiling.end_step(type(self).__name__)
        self.after_optimizer_step()
        if self._ema is not None:
            self._ema.step(self._trainable)
        if self._stop_agreed:
            control.should_training_stop = True
            control.should_save = self.args.save_strategy != "no"

    def _request_stop(self, number: int) -> None:
        self._stop_signal = number

    @contextmanager
    def _gradient_checkpointing(self) -> Iterator[None]:
        """Hide the setting from the stock trainer, which would call a method that diffusers models don't have."""
        wanted, was_on = self.args.activation_checkpointing, self.model.is_gradient_checkpointing
        if wanted:
            self.recompute_activations()
        self.args.activation_checkpointing = False
        try:
            yield
        finally:
            self.args.activation_checkpointing = wanted
            if wanted and not was_on:
                self.model.disable_gradient_checkpointing()

    def _seeded(self, purpose: str, micro_step: int, process: int | None = None) -> torch.Generator:
        process = self.args.process_index if process is None else process
        return torch.Generator().manual_seed(hash_seed(purpose, self.args.seed, process, micro_step))

    # ---- Logging and evaluation ----------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.state.epoch = None  # there are none
        logs.pop("total_flos", None)
        logs.update(self._drain_metrics())
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The stock trainer subtracts what it has logged, which NaN survives."""
        is_logged = self.control.should_log
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
        if is_logged:
            tr_loss.zero_()

    def _drain_metrics(self) -> dict[str, float]:
        mine = {name: (total.item(), count) for name, (total, count) in self._metrics.items()}
        self._metrics = {}
        sums: dict[str, tuple[float, int]] = {}
        for metrics in gather_object([mine]):
            for name, (total, count) in metrics.items():
                previous = sums.get(name, (0.0, 0))
                sums[name] = (previous[0] + total, previous[1] + count)
        return {name: total / count for name, (total, count) in sums.items()}

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean loss, and the metrics that `compute_loss` logs, on `args.num_eval_batches` batches.

        During training with EMA the averaged weights are evaluated.
        """
        training_metrics, self._metrics = self._metrics, {}
        micro_step, was_training = self.micro_step, self.model.training
        self.model.eval()
        try:
            with self._averaged_weights(), self._kept_rng(), torch.no_grad():
                for index in range(self.args.num_eval_batches):
                    self.micro_step = -1 - index  # evaluation shares no randomness with training
                    batch = self._prepare_input(self.make_eval_batch(self._seeded("batch", self.micro_step)))
                    self.log_metric("loss", self.compute_loss(self.model, batch))
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._drain_metrics().items()}
            self.log(dict(metrics))
        finally:
            self._metrics, self.micro_step = training_metrics, micro_step
            self.model.train(was_training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _kept_rng(self) -> AbstractContextManager[None]:
        """Evaluation shall not change what training draws from torch's global generators."""
        return torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else [])

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        if self._ema is None or not self.is_in_train:
            yield
            return
        self._ema.store(self._trainable)
        self._ema.copy_to(self._trainable)
        try:
            yield
        finally:
            self._ema.restore(self._trainable)

    # ---- Checkpoints: writing ------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return "" if self.args.output_dir is None else self.args.output_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write `checkpoint-<step>`, or say why that cannot be done."""
        try:
            self._write_checkpoint(self._folder(self.state.global_step))
        except SaveError as error:
            if self.args.on_save_error == "raise":
                raise
            warnings.warn(f"Training goes on without a checkpoint: {error}", stacklevel=2)

    def _write_checkpoint(self, folder: Path) -> None:
        """Each process writes its own files, then the main process the rest and the manifest."""
        is_main = self.is_world_process_zero()
        stage: Path | None = None
        with self._all_or_none():
            if is_main:
                require_space(folder, self._checkpoint_bytes())
                stage = checkpoint.open_stage(folder)
        [stage] = broadcast_object_list([stage])
        assert stage is not None
        try:
            with self._all_or_none():
                self._write_rank_files(stage)
                if is_main:
                    self._write_shared_files(stage)
            with self._all_or_none():
                if is_main:
                    checkpoint.commit_stage(stage, folder, self._metadata())
                    self._prune()
        finally:
            if is_main:
                checkpoint.discard_stage(stage)

    def _checkpoint_bytes(self) -> int:
        """About what a checkpoint takes: its tensors, and a little for everything else."""
        adapter = adapter_to_train(self.model)
        weights = self._trainable if adapter is not None else list(self.model.parameters())
        states = {} if self.optimizer is None else self.optimizer.state
        held = [value for entries in states.values() for value in entries.values()]
        held *= self.args.world_size if self._is_sharded else 1
        averaged = [] if self._ema is None else self._ema.shadow_params
        tensors = [*weights, *held, *averaged, *self.extra_state().values()]
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor)]
        copies = sum(sizes[: len(weights)]) if adapter is not None else 0  # peft's file and diffusers'
        return sum(sizes) + copies + (1 << 16)

    def _folder(self, step: int) -> Path:
        return Path(self._get_output_dir(None)) / f"checkpoint-{step}"

    @contextmanager
    def _all_or_none(self, what: str = "The checkpoint was not written") -> Iterator[None]:
        """Wait for all processes at the end of the block; if it failed on one, it fails on all.

        Raises:
            SaveError: something could not be written, here or elsewhere.
        """
        error: Exception | None = None
        try:
            yield
        except DmcHubError as raised:
            error = raised
        except (OSError, SafetensorError) as raised:
            free = free_bytes(self.args.output_dir or ".")
            error = SaveError(
                f"{what}: `{self._folder(self.state.global_step)}` cannot be written ({raised}). It takes about "
                f"{self._checkpoint_bytes():,} bytes, and {free:,} are free. Earlier checkpoints are as they were."
            )
            error.__cause__ = raised
        except Exception as raised:
            error = raised
        errors = gather_object([None if error is None else f"process {self.args.process_index}: {error}"])
        if error is not None:
            raise error
        if any(errors):
            raise SaveError(f"{what}: {'; '.join(filter(None, errors))}")

    def _write_rank_files(self, stage: Path) -> None:
        extra = self.extra_state()
        if extra:
            checkpoint.save_tensors(stage / f"extra-{self.args.process_index}.safetensors", extra)
        checkpoint.save_rng_state(stage / f"rng-{self.args.process_index}.safetensors")
        if self._is_sharded:
            checkpoint.save_optimizer(self.optimizer.optimizer, stage, part=f"-{self.args.process_index}")

    def _write_shared_files(self, stage: Path) -> None:
        self._save(str(stage))
        if not self._is_sharded:
            checkpoint.save_optimizer(self.optimizer.optimizer, stage)
        checkpoint.save_json(stage / "scheduler.json", self.lr_scheduler.state_dict())
        if self.accelerator.scaler is not None:
            checkpoint.save_json(stage / "scaler.json", self.accelerator.scaler.state_dict())
        if self._ema is not None:
            shadow = {str(index): tensor for index, tensor in enumerate(self._ema.shadow_params)}
            checkpoint.save_tensors(stage / "ema.safetensors", shadow)
        best = self.state.best_global_step
        if best and (best == self.state.global_step or self._folder(best).is_dir()):
            self.state.best_model_checkpoint = str(self._folder(best))
        self.state.epoch = None
        self.state.save_to_json(str(stage / "trainer_state.json"))

    def _metadata(self) -> dict[str, Any]:
        exact, others = self._run_facts()
        return {"step": self.state.global_step, **exact, **others}

    def _run_facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a resumed run must share with that of its checkpoint, and what it must share to equal it."""
        exact: dict[str, Any] = {"trainer": type(self).__name__, "world_size": self.args.world_size}
        exact["ema"] = self.args.ema_decay is not None
        # The states of optimizer and schedule bring their old values back: a new one would be ignored.
        for name in ("optim", "learning_rate", "weight_decay", "lr_scheduler_type"):
            exact[name] = getattr(self.args, name)
        if adapter_to_train(self.model) is not None:
            exact["base_fingerprint"] = self.pipeline.base_fingerprint()
        others = ["seed", "gradient_accumulation_steps", "per_device_train_batch_size"]
        if self.args.lr_scheduler_type != "constant":
            others.append("max_steps")
        return exact, {name: getattr(self.args, name) for name in others}

    def _prune(self) -> None:
        if self.args.save_total_limit is not None:
            best = self.state.best_model_checkpoint
            protect = [] if best is None else [Path(best)]
            checkpoint.prune(self._get_output_dir(None), max(1, self.args.save_total_limit), protect)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the weights: `<component>/` as diffusers does, or of an adapter the two files that peft
        reads."""
        if output_dir is None and self.args.output_dir is None:
            raise ValueError("`output_dir` is None: say where to save the model.")
        if not self.is_world_process_zero():
            return
        folder = Path(output_dir or self.args.output_dir or "")
        adapter = adapter_to_train(self.model)
        if adapter is None:
            for name, component in self._trained_components().items():
                component.save_pretrained(folder / name)
        else:  # `save_pretrained` of a model with a LoRA attached would write a file that cannot be loaded
            self.pipeline.save_lora_weights(folder, adapter_name=adapter)

    def _trained_components(self) -> dict[str, Any]:
        """The pipeline's components that are trained whole, by name: the model, or what it consists of."""
        parts = list(self.model.modules())
        named = {n: part for n, part in self.pipeline.components.items() if any(part is each for each in parts)}
        return named or {"model": self.model}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the card is written for the whole alignment, not for one trainer."""

    # ---- Checkpoints: reading ------------------------------------------------------------------------------

    def _checkpoint_to_resume(self, resume: str | Path | bool | None) -> Path | None:
        """The verified folder to resume from, or None to start afresh. Nothing has been loaded yet."""
        output_dir = self.args.output_dir
        if resume == "auto":
            resume = output_dir is not None and bool(checkpoint.checkpoints(output_dir))
        if resume is None or resume is False:
            saves = output_dir is not None and self.args.save_strategy != "no"
            existing = checkpoint.checkpoints(output_dir or "") if saves else []
            if existing:
                raise ValueError(
                    f"`output_dir` {output_dir!r} already holds {existing[-1].name}: continue that run with "
                    "`resume_from_checkpoint=True`, or choose another folder."
                )
            return None
        if resume is True:
            folder = None if output_dir is None else checkpoint.latest_checkpoint(output_dir)
            if folder is None:
                raise ValueError(f"`resume_from_checkpoint` is True, but {output_dir!r} holds no usable checkpoint.")
            manifest = checkpoint.read_manifest(folder)
        else:
            folder = Path(resume)
            manifest = checkpoint.verify(folder)
            self._refuse_rewinding(folder)
        self._check_run_facts(folder, manifest.metadata)
        return folder

    def _refuse_rewinding(self, folder: Path) -> None:
        """Two timelines in one folder would make "the newest checkpoint" mean nothing."""
        output_dir = self.args.output_dir
        if output_dir is None or self.args.save_strategy == "no":
            return
        if folder.parent.resolve() != Path(output_dir).resolve():
            return
        newest = checkpoint.latest_checkpoint(output_dir)
        if newest is not None and newest.name != folder.name:
            raise ValueError(
                f"`resume_from_checkpoint` is {folder.name}, but {output_dir!r} also holds {newest.name}: "
                "move the newer checkpoints away, or choose another `output_dir`."
            )

    def _check_run_facts(self, folder: Path, written: Mapping[str, Any]) -> None:
        exact, others = self._run_facts()
        for name, value in exact.items():
            if written.get(name) != value:
                raise CheckpointError(f"`{folder}` is of a run with {name} {written.get(name)!r}, not {value!r}.")
        pairs = {name: (written.get(name), value) for name, value in others.items()}
        changed = [f"`{name}` from {old} to {new}" for name, (old, new) in pairs.items() if old != new]
        if changed:
            text = f"Resuming from `{folder}` with {', '.join(changed)}: the result will differ from"
            warnings.warn(f"{text} that of an uninterrupted run.", stacklevel=4)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Copy the weights in, after all names and shapes have been compared."""
        folder = Path(resume_from_checkpoint)
        adapter = adapter_to_train(self.model)
        if adapter is not None:
            expected = get_peft_model_state_dict(self.model, adapter_name=adapter)
            loaded = checkpoint.load_tensors(folder / ADAPTER_WEIGHTS)
            loaded = {key.removeprefix(PEFT_PREFIX): value for key, value in loaded.items()}
            checkpoint.check_same_tensors(folder, loaded, expected)
            set_peft_model_state_dict(self.model, loaded, adapter_name=adapter)
            return
        states: dict[str, dict[str, Tensor]] = {}
        for name, component in self._trained_components().items():
            files = sorted((folder / name).glob("*.safetensors"))
            states[name] = {key: value for file in files for key, value in checkpoint.load_tensors(file).items()}
            checkpoint.check_same_tensors(folder, states[name], component.state_dict())
        for name, component in self._trained_components().items():
            component.load_state_dict(states[name])

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            checkpoint.load_optimizer(self.optimizer.optimizer, Path(checkpoint_folder))
            schedule = checkpoint.load_json(Path(checkpoint_folder) / "scheduler.json")
            self.lr_scheduler.load_state_dict(schedule)

    def _load_scaler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None and self.accelerator.scaler is not None:
            state = checkpoint.load_json(Path(checkpoint_folder) / "scaler.json")
            self.accelerator.scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            name = f"rng-{self.args.process_index}.safetensors"
            checkpoint.load_rng_state(Path(checkpoint_folder) / name)

    def _load_ema(self, folder: Path) -> None:
        if self._ema is None:
            return
        loaded = checkpoint.load_tensors(folder / "ema.safetensors")
        expected = {str(index): tensor for index, tensor in enumerate(self._ema.shadow_params)}
        checkpoint.check_same_tensors(folder, loaded, expected)
        for name, tensor in expected.items():
            tensor.copy_(loaded[name])
        self._ema.optimization_step = self.state.global_step

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        folder = Path(self.state.best_model_checkpoint)
        checkpoint.verify(folder)
        self._load_from_checkpoint(str(folder))
        self._load_ema(folder)
