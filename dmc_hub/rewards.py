"""Rewards are plain functions of what a controller generates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor


class NonFiniteRewardError(ValueError):
    """A reward function returned NaN or infinity."""


class SharedRewardError(RuntimeError):
    """A reward could not be had on some process, so it is raised on all."""


RewardFunction = Callable[..., Any]
"""Takes what the pipeline's `decode` returns and gives `B` finite numbers, as a tensor, array or list.

Of a controller: `(observations, actions) -> rewards` in the environment's units, of shapes `(B, T, observation_dim)`
and `(B, T, action_dim)`. A planner's observations are the planned ones (`T` is the horizon), a policy's the single one
it acted on (`(B, 1, observation_dim)`). Of text-to-image: `(images, prompts, metadata) -> rewards`, see
`dmc_hub.text_to_image`. Only `RewardGradientTrainer` needs gradients."""


@runtime_checkable
class DeferredReward(Protocol):
    """A reward function that can be asked without waiting: `submit` returns what waits for the answer."""

    def submit(self, *samples: Any) -> Callable[[], Any]:
        """Ask for the rewards of samples."""


@runtime_checkable
class StatefulReward(Protocol):
    """A reward function with a state that a resumed run needs, and with figures of its last call for the log."""

    def state(self) -> dict[str, Tensor]:
        """Tensors by name."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""

    def metrics(self) -> dict[str, float]:
        """Figures of the last call by name."""


def critic_reward(pipeline: Any, *, num_steps: int = 1, subtract_value: bool = True) -> RewardFunction:
    """Reward by the pipeline's critic: the mean advantage of the first `num_steps` pairs of state and action, or of
    state and action sequence for a critic of several action steps.

    The advantage `Q(s, a) - V(s)` asks each action to be better than the data's at *its own* state; a bare Q would also
    pay a planner for imagining better states than the dynamics allow.

    Args:
        pipeline: its normaliser and critic are used.
        num_steps: pairs that count; 1 rewards the action about to be executed.
        subtract_value: False rewards the bare Q.
    """
    if pipeline.critic is None:
        raise ValueError("`pipeline` has no critic to reward with: train one with IQLTrainer.")
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")

    def reward(observations: Tensor, actions: Tensor) -> Tensor:
        chunks = action_chunks(pipeline.critic, pipeline.normalizer.normalize_actions(actions))
        steps = min(num_steps, observations.shape[1], chunks.shape[1])
        states = pipeline.normalizer.normalize_observations(observations[:, :steps])
        values = pipeline.critic(states, chunks[:, :steps])
        if subtract_value:
            values = values - pipeline.critic.value(states)
        return values.mean(1)

    return reward


def action_chunks(critic: Any, actions: Tensor) -> Tensor:
    """What the critic takes at each step: the actions `(B, T, action_dim)`, or the sequences that start there, of shape
    `(B, T - num_action_steps + 1, num_action_steps, action_dim)`."""
    length = getattr(critic.config, "num_action_steps", 1)
    return actions if length == 1 else actions.unfold(1, length, 1).transpose(-1, -2)


def call_reward(reward_function: RewardFunction, *samples: Any) -> Tensor:
    """Call a reward function and check what it returns: float32 of shape `(B,)` on the samples' device.

    `samples` is what the pipeline's `decode` returns: observations and actions, or images, prompts and metadata.

    Raises:
        ValueError: the wrong number of rewards, or (`NonFiniteRewardError`) NaN or infinite ones.
        FloatingPointError: the samples to be rewarded are not finite: the controller has collapsed.
    """
    return submit_reward(reward_function, *samples)()


def submit_reward(reward_function: RewardFunction, *samples: Any) -> Callable[[], Tensor]:
    """As `call_reward`, but a `DeferredReward` is only asked: the function returned waits for its answer."""
    tensors = [values for values in samples if isinstance(values, Tensor)]
    names = ("images",) if len(tensors) == 1 else ("observations", "actions")
    for name, values in reversed(list(zip(names, tensors, strict=True))):
        if not torch.isfinite(values).all():
            raise FloatingPointError(f"The controller generates NaN or infinite {name}: its weights have collapsed.")
    answer = ask(reward_function, *samples)
    return lambda: on_all_processes(lambda: _checked(answer(), tensors[-1]))


def ask(reward_function: RewardFunction, *samples: Any) -> Callable[[], Any]:
    """Ask for rewards, without waiting if the function can do so; the function returned gives them, unchecked."""
    if isinstance(reward_function, DeferredReward):
        return reward_function.submit(*samples)
    returned = reward_function(*samples)
    return lambda: returned


def on_all_processes(answer: Callable[[], Any]) -> Any:
    """What `answer` gives; if it fails on one process, `SharedRewardError` is raised on all. Collective."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return answer()
    value, cause = None, None
    try:
        value = answer()
    except Exception as error:
        cause = error
    problems: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, None if cause is None else f"{type(cause).__name__}: {cause}")
    named = [f"process {index}: {problem}" for index, problem in enumerate(problems) if problem is not None]
    if named:
        raise SharedRewardError("; ".join(named)) from cause
    return value


def _checked(returned: Any, samples: Tensor) -> Tensor:
    if not isinstance(returned, Tensor):
        try:
            returned = torch.as_tensor(np.asarray(returned, dtype=np.float32))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"`reward_function` must return numbers, got {type(returned).__name__}: {error}"
            ) from error
    count = len(samples)
    rewards = returned.to(samples.device, torch.float32)
    if rewards.shape != (count,):
        raise ValueError(
            f"`reward_function` must return one reward per sample, shape ({count},), got {tuple(rewards.shape)}."
        )
    if not torch.isfinite(rewards).all():
        bad = (~torch.isfinite(rewards)).nonzero().flatten()
        raise NonFiniteRewardError(
            f"`reward_function` returned {rewards[bad[0]].item()} for {len(bad)} of {len(rewards)} samples, the first "
            f"at index {int(bad[0])}: return finite numbers."
        )
    return rewards
