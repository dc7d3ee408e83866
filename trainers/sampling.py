"""What trainers that learn from their own samples share: a buffer that is filled, trained on, and filled again."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from dmc_hub.losses import denoising_loss, group_advantages
from dmc_hub.rewards import RewardFunction, SharedRewardError, StatefulReward, critic_reward, submit_reward
from dmc_hub.trainers.base import DiffusionConfig, DiffusionTrainer
from dmc_hub.trainers.loop import require_transitions


@dataclass(kw_only=True)
class SamplingConfig(DiffusionConfig):
    """What all trainers that sample from the controller share."""

    lr_scheduler_type: str = field(default="linear", metadata={"help": "Schedule of the learning rate."})
    num_inference_steps: int | None = field(
        default=None, metadata={"help": "Denoising steps while sampling; the pipeline's own by default."}
    )
    reward_timeout: float = field(
        default=60.0, metadata={"help": "Seconds that a call of a reward function of your own may take."}
    )
    pretraining_coefficient: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the denoising loss on data, in a backward pass of its own of the same optimizer step."
        },
    )
    pretraining_batch_size: int | None = field(
        default=None, metadata={"help": "Its batch per process and micro-step; the training batch size by default."}
    )
    buffer_on_cpu: bool = field(
        default=False,
        metadata={"help": "Keep samples in the computer's memory; a micro-step moves its part to the accelerator."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("per_device_train_batch_size", "num_inference_steps", "pretraining_batch_size")
        self.require_not_negative("pretraining_coefficient")
        if not self.reward_timeout > 0:
            raise ValueError(f"`reward_timeout` must be positive, got {self.reward_timeout}.")
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                raise ValueError(f"`{name}` must be one of {', '.join(get_args(hint))}; got {getattr(self, name)!r}.")

    def require_positive(self, *names: str) -> None:
        """Raise a ValueError for each named setting that is neither None nor at least 1."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")

    def require_not_negative(self, *names: str) -> None:
        """Raise a ValueError for each named setting that is below 0 or NaN."""
        for name in names:
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")


class SamplingTrainer(DiffusionTrainer):
    """Draws conditions from the data, samples with the controller, and trains for a while on what it got.

    A subclass says how many micro-steps one buffer serves (`micro_steps_per_buffer`), how it is filled (`collect`) and
    which part a micro-step takes (`draw`). The buffer is part of the checkpoint, so that a run can be resumed in the
    middle of one.

    `train_dataset` is what the pipeline's `condition_source` takes: for planners and policies `Episodes` or a
    `datasets.Dataset` with its columns, of which only the observations are used, as conditions. `reward_function` is
    `critic_reward(pipeline)` by default.

    `pretraining_dataset` is for `pretraining_coefficient`: data with examples, which is `train_dataset` by default. The
    loss is that of pretraining, without guidance; its gradient is added to that of the algorithm before the optimizer
    steps, as if both were one loss, at the memory of the larger.
    """

    args: Any

    def __init__(
        self,
        pipeline: Any,
        args: Any,
        *,
        train_dataset: Any,
        reward_function: RewardFunction | None = None,
        pretraining_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if reward_function is not None and not callable(reward_function):
            raise ValueError(f"`reward_function` must be callable, got {type(reward_function).__name__}.")
        require_transitions(pipeline)
        processes = {"process_index": args.process_index, "num_processes": args.world_size}
        self.source: Any = pipeline.condition_source(train_dataset, **processes)
        self._pretraining_source = self.source
        if pretraining_dataset is not None:
            self._pretraining_source = pipeline.condition_source(pretraining_dataset, **processes)
        if args.pretraining_coefficient > 0 and not self._pretraining_source.has_examples:
            raise ValueError("`pretraining_coefficient` needs data with clean samples: pass `pretraining_dataset`.")
        super().__init__(pipeline, args, train_dataset=self.source.data, **kwargs)
        self.reward_function: RewardFunction = reward_function or critic_reward(pipeline)
        self._reward_timeout = None if reward_function is None else args.reward_timeout
        self._buffer: dict[str, Tensor] = {}
        self._check_reward_function()

    @property
    @abstractmethod
    def micro_steps_per_buffer(self) -> int:
        """After so many micro-steps the buffer is filled anew."""

    @abstractmethod
    def collect(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Fill the buffer. Runs without gradient."""

    @abstractmethod
    def draw(self, buffer: dict[str, Tensor], position: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The inputs of micro-step `position` (from 0) of this buffer."""

    def make_batch(self, generator: torch.Generator) -> dict[str, Tensor]:
        position = self.micro_step % self.micro_steps_per_buffer
        if position == 0 or not self._buffer:
            was_training = self.model.training
            self.model.eval()  # dropout is no part of the controller that acts
            with torch.no_grad(), self._kept_if_rewards_fail():
                self._buffer = self.kept(self.collect(generator))
            self.model.train(was_training)
        return self.draw(self._buffer, position, self.generator("draw"))

    @contextmanager
    def _kept_if_rewards_fail(self) -> Iterator[None]:
        """If collecting fails, as when a reward server is down, write a checkpoint from which the run goes on exactly.

        Of several processes only an error that is raised on all of them allows one. In the middle of the micro-steps of
        an optimizer step there is none either: their gradients would be lost.
        """
        before = {name: part.state() for name, part in self._parts().items()}
        try:
            yield
        except FloatingPointError:  # the controller has collapsed: there is nothing to keep
            raise
        except Exception as error:
            for name, part in self._parts().items():
                part.load_state(before[name])
            if self.args.world_size == 1 or isinstance(error, SharedRewardError):
                self._save_before_stopping(error)
            raise

    def _save_before_stopping(self, error: Exception) -> None:
        is_between_steps = self.micro_step % self.args.gradient_accumulation_steps == 0
        if self.args.save_strategy == "no" or not is_between_steps or self.state.global_step == 0:
            return
        folder = self._folder(self.state.global_step)
        if not folder.is_dir():
            self._save_checkpoint(self.model)
        note = f"The run is kept in {folder}: go on with `resume_from_checkpoint=True`."
        error.__notes__ = [*getattr(error, "__notes__", ()), note]  # `add_note`, which Python 3.10 has not

    def extra_state(self) -> dict[str, Tensor]:
        buffer = {name: tensor.contiguous() for name, tensor in self._buffer.items()}
        return {**buffer, **{k: v for name, part in self._parts().items() for k, v in pack(name, part.state()).items()}}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        parts = self._parts()
        for name, part in parts.items():
            part.load_state(unpack(name, state))
        buffer = {name: tensor for name, tensor in state.items() if name.partition(".")[0] not in parts}
        self._buffer = self.kept({name: tensor.to(self.args.device) for name, tensor in buffer.items()})

    def _parts(self) -> dict[str, Any]:
        """What keeps a state of its own."""
        parts = {"source": self.source}
        if self._pretraining_source is not self.source:
            parts["pretraining"] = self._pretraining_source
        if isinstance(self.reward_function, StatefulReward):
            parts["reward_function"] = self.reward_function
        return parts

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if self.args.pretraining_coefficient > 0:
            self.micro_step = inputs["micro_step"]
            with self.compute_loss_context_manager():
                loss = self._pretraining_loss(self.generator("pretraining"))
            self.log_metric("pretraining_loss", loss)
            share = self.args.pretraining_coefficient / self.args.gradient_accumulation_steps
            self.accelerator.backward(share * loss)
        return super().training_step(model, inputs, num_items_in_batch)

    def _pretraining_loss(self, generator: torch.Generator) -> Tensor:
        size = self.args.pretraining_batch_size or self.args.per_device_train_batch_size
        x0, condition = self._pretraining_source.examples(size, generator)
        condition = self.pipeline.complete_condition(condition, generator)
        levels = {name: value.to(x0.device) for name, value in self.noise_levels(size, generator).items()}
        scheduler, timesteps, noise = self.pipeline.scheduler, levels["timesteps"], levels["noise"]
        with self.pipeline.unguided():
            prediction = self.pipeline.predict(scheduler.add_noise(x0, noise, timesteps), timesteps, condition)
        target = scheduler.training_target(x0, noise, timesteps)
        return denoising_loss(prediction, target, self.pipeline.free_entries(condition)).mean()

    def _run_facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """A buffer that was filled under other settings of the algorithm means nothing under these."""
        exact, others = super()._run_facts()
        own = {option.name for option in fields(self.args)} - {option.name for option in fields(DiffusionConfig)}
        own.discard("reward_timeout")
        return {**exact, **{name: getattr(self.args, name) for name in sorted(own)}}, others

    # What subclasses use

    def kept(self, samples: dict[str, Tensor]) -> dict[str, Tensor]:
        """Samples where the buffer is kept."""
        return {n: tensor.cpu() for n, tensor in samples.items()} if self.args.buffer_on_cpu else samples

    def conditions(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`count` conditions drawn from the data."""
        tensors: dict[str, Tensor] = self.pipeline.complete_condition(
            self.source.conditions(count, generator), generator
        )
        return tensors

    def rewards(self, latents: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Checked rewards `(B,)` of latents."""
        return self.rewards_to_come(latents, condition)()

    def rewards_to_come(self, latents: Tensor, condition: dict[str, Tensor]) -> Callable[[], Tensor]:
        """As `rewards`, but a `DeferredReward` is only asked; the function returned waits for the answer."""
        samples = self.pipeline.decode(latents, condition)
        answer = submit_reward(self.reward_function, *samples, timeout=self._reward_timeout)

        def wait() -> Tensor:
            rewards = answer()
            if isinstance(self.reward_function, StatefulReward):
                for name, value in self.reward_function.metrics().items():
                    self.log_metric(name, value)
            return rewards

        return wait

    def noise_levels(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What noises `size` samples: their `timesteps` and `noise`."""
        return {
            "timesteps": self.pipeline.scheduler.sample_timesteps(size, generator),
            "noise": torch.randn(self.pipeline.latent_shape(size), generator=generator),
        }

    def advantages(self, rewards: Tensor, group_size: int, scale: Literal["group", "global", "none"]) -> Tensor:
        """`group_advantages` of this process's rewards `(B,)`, in the scale of those of all processes."""
        everyone = group_advantages(self.accelerator.gather(rewards), group_size, scale=scale)
        result: Tensor = everyone.chunk(self.args.world_size)[self.args.process_index]
        return result

    def require_reference(self) -> None:
        """Raise a ValueError if the controller has no adapter whose switched-off state is the foundation."""
        if not self.pipeline.lora_names:
            raise ValueError(
                f"`{type(self).__name__}` compares with the foundation: pass `peft_config`, say LoraConfig()."
            )

    def warn_without_reference(self, name: str) -> None:
        """Warn if the setting `name` asks for a reference and there is none."""
        if getattr(self.args, name) > 0 and not self.pipeline.lora_names:
            warnings.warn(
                f"`{name}` is ignored: without a LoRA adapter there is no foundation to stay near. Pass `peft_config`, "
                f"or set `{name}` to 0.",
                stacklevel=3,
            )

    def reference_if(self, wanted: bool) -> AbstractContextManager[None]:
        """Inside the block the controller is the foundation if `wanted`."""
        return self.pipeline.lora_disabled() if wanted else nullcontext()

    def sample_ranked(
        self, num_conditions: int, num_candidates: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Sample candidates per condition and order them by reward, the best first.

        Returns:
            Latents `(num_conditions, num_candidates, horizon, dim)`, the conditions (one per group), and the rewards
            `(num_conditions, num_candidates)`.
        """
        condition = self.conditions(num_conditions, generator)
        repeated = self.pipeline.repeat(condition, num_candidates)
        latents = self.pipeline.sample(repeated, num_inference_steps=self.args.num_inference_steps, generator=generator)
        rewards = self.rewards(latents, repeated)
        self.log_metric("reward", rewards)
        ranked, rewards = self.ranked(latents, rewards, num_candidates)
        return ranked, condition, rewards

    def ranked(self, latents: Tensor, rewards: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
        """Groups of `num_candidates` samples in a row, `(B, ...)`, ordered by reward: `(B / num_candidates,
        num_candidates, ...)` and their rewards, the best first."""
        rewards = rewards.reshape(-1, num_candidates)
        order = rewards.argsort(dim=1, descending=True)
        latents = latents.unflatten(0, (-1, num_candidates))
        rows = torch.arange(len(order), device=order.device)[:, None]
        return latents[rows, order], rewards.gather(1, order)

    def _check_reward_function(self) -> None:
        """Call the reward function once on data, so that a broken one is found before anything is trained."""
        state = {name: part.state() for name, part in self._parts().items()}
        with torch.no_grad():
            self.rewards(*self.source.trial())
        self._metrics = {}
        for name, part in self._parts().items():
            part.load_state(state[name])


def pack(prefix: str, condition: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a condition under `prefix.`, to keep them in a buffer."""
    return {f"{prefix}.{name}": value for name, value in condition.items()}


def unpack(prefix: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The condition that `pack` put into a batch."""
    return {name.removeprefix(f"{prefix}."): value for name, value in batch.items() if name.startswith(f"{prefix}.")}
