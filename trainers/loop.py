"""What the trainers' base stands on besides the stock trainer's own methods: the stream of micro-steps, seeds, stop
signals, the progress bar, and the choice of what is trained, on what.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from dmc_hub import checkpoint


class MicroSteps:
    """Stands where the stock trainer has its dataloader: yields the number of each micro-step from the current one on.

    The numbering is global_step * gradient_accumulation_steps + position, so a resumed run goes on where it stopped.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __len__(self) -> int:
        number: int = self.trainer.args.max_steps * self.trainer.args.gradient_accumulation_steps
        return number

    def __iter__(self) -> Iterator[dict[str, int]]:
        start = self.trainer.state.global_step * self.trainer.args.gradient_accumulation_steps
        return ({"micro_step": number} for number in range(start, len(self)))


class StepEnd(TrainerCallback):
    """Calls `work(control)` at the end of each step, before a checkpoint may be written."""

    def __init__(self, work: Callable[[TrainerControl], None]) -> None:
        self.work = work

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.work(control)


class ProgressBar(TrainerCallback):
    """One bar of steps on stderr, with the latest metrics behind it."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if self.bar is not None and "train_runtime" not in logs:
            self.bar.set_postfix({key: f"{value:.3g}" for key, value in logs.items() if key != "learning_rate"})

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def hash_seed(*key: str | int) -> int:
    """A 63-bit seed that is the same on every machine and in every version of Python."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def adapter_to_train(module: nn.Module) -> str | None:
    """The adapter to train: "default", or the only one; None without adapters."""
    if not isinstance(module, PeftAdapterMixin) or not module._hf_peft_config_loaded:
        return None
    names = list(module.peft_config)
    if "default" in names:
        return "default"
    if len(names) > 1:
        raise ValueError(f"The model has the adapters {names}: name the one to train 'default', or delete the others.")
    return names[0] if names else None


def activate_alone(module: Any, adapter: str) -> None:
    """Make an adapter the only active one, at weight 1, and its parameters the only ones with gradients.

    Raises:
        ValueError: adapters are fused into the weights that should stay as they are.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError("The adapters are fused: call `unfuse_lora()` before training.")
    module.set_adapter(adapter)
    module.enable_adapters()
    for layer in layers:
        layer.set_scale(adapter, 1.0)


def freeze_all_but(
    pipeline: Any, trainable_parameters: Callable[[], list[nn.Parameter]], device: torch.device
) -> list[nn.Parameter]:
    """Move the pipeline's components to `device`, in eval mode and without gradients but for the parameters given."""
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval().to(device)
    trainable = trainable_parameters()
    if not trainable:
        raise ValueError("The pipeline has no parameter to train.")
    for parameter in trainable:
        parameter.requires_grad_(True)
    return trainable


def join_processes_on_cpu(backend: str | None, seconds: int) -> None:
    """Join the process group that a launcher describes, if any: on a CPU transformers would not pass on the timeout."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend or "gloo", timeout=timedelta(seconds=seconds))


@cache
def leave_process_group_at_exit() -> None:
    """gloo's threads may release tensors when Python is already gone, which aborts a finished process."""
    if torch.distributed.get_backend() == "gloo":
        atexit.register(lambda: torch.distributed.is_initialized() and torch.distributed.destroy_process_group())


@contextmanager
def stop_signals(request_stop: Callable[[int], None]) -> Iterator[None]:
    """Turn the first Ctrl-C and the first SIGTERM into `request_stop(number)`; a second one ends the process at
    once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        request_stop(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def require_transitions(pipeline: Any) -> None:
    """Raise a ValueError if the pipeline's scheduler is not one that training can use."""
    scheduler = pipeline.scheduler
    if not hasattr(scheduler, "transition"):
        raise ValueError(
            f"`pipeline.scheduler` is a {type(scheduler).__name__}, which samples but has neither log-probabilities "
            "nor training targets: train with a TransitionScheduler of the same noise schedule and prediction type, "
            "and put the other one in afterwards."
        )


def last_metrics(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """The last value of every metric in a trainer's history."""
    return {name: float(value) for row in history if "train_runtime" not in row for name, value in row.items()}


def verify_part(folder: Path, seed: int) -> None:
    """Verify a finished part of an alignment that an earlier process has left.

    Raises:
        CheckpointError: a file is missing or was changed; the message says how to run the part again.
        ValueError: it is of a run with another seed.
    """
    try:
        written = checkpoint.verify(folder).metadata.get("seed")
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(
            f"{error} To run this stage and those after it again, delete their folders in `{folder.parent}`."
        ) from error
    if written != seed:
        raise ValueError(
            f"`output_dir` {str(folder.parent.parent)!r} holds a run with seed {written}, not {seed}: choose another "
            "folder."
        )
