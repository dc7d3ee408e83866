"""Rewards are plain functions of what a controller generates."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from dmc_hub.errors import CollapseError, DmcHubError, RewardError


class NonFiniteRewardError(DmcHubError, ValueError):
    """A reward function returned NaN or infinity."""

    exit_code = 1


class SharedRewardError(RewardError):
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
        return cast(Tensor, values.mean(1))

    return reward


def action_chunks(critic: Any, actions: Tensor) -> Tensor:
    """What the critic takes at each step: the actions `(B, T, action_dim)`, or the sequences that start there, of shape
    `(B, T - num_action_steps + 1, num_action_steps, action_dim)`."""
    length = getattr(critic.config, "num_action_steps", 1)
    return actions if length == 1 else actions.unfold(1, length, 1).transpose(-1, -2)


def call_reward(reward_function: RewardFunction, *samples: Any, timeout: float | None = None) -> Tensor:
    """Call a reward function and check what it returns: float32 of shape `(B,)` on the samples' device.

    `samples` is what the pipeline's `decode` returns: observations and actions, or images, prompts and metadata.
    `timeout` is how many seconds a plain function may take; None: as long as it likes.

    Raises:
        ValueError: the wrong number of rewards, no real numbers, or (`NonFiniteRewardError`) NaN or infinite ones.
        RewardError: the function raised something else, or did not answer in time.
        CollapseError: the samples to be rewarded are not finite: the controller has collapsed.
    """
    return submit_reward(reward_function, *samples, timeout=timeout)()


def submit_reward(reward_function: RewardFunction, *samples: Any, timeout: float | None = None) -> Callable[[], Tensor]:
    """As `call_reward`, but a `DeferredReward` is only asked: the function returned waits for its answer."""
    tensors = [values for values in samples if isinstance(values, Tensor)]
    names = ("images",) if len(tensors) == 1 else ("observations", "actions")
    for name, values in reversed(list(zip(names, tensors, strict=True))):
        if not torch.isfinite(values).all():
            raise CollapseError(f"The controller generates NaN or infinite {name}: its weights have collapsed.")
    answer = ask(reward_function, *samples)
    if isinstance(reward_function, DeferredReward):  # which keeps a time limit of its own
        return lambda: on_all_processes(lambda: _checked(_answer(answer, None), tensors[-1]))
    rewards = on_all_processes(lambda: _checked(_answer(answer, timeout), tensors[-1]))
    return lambda: rewards


def ask(reward_function: RewardFunction, *samples: Any) -> Callable[[], Any]:
    """Ask for rewards, without waiting if that is a `DeferredReward`; the function returned gives them, unchecked."""
    if isinstance(reward_function, DeferredReward):
        return reward_function.submit(*samples)
    return functools.partial(reward_function, *samples)


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
    if returned.dtype.is_complex or returned.dtype == torch.bool:
        raise ValueError(f"`reward_function` must return real numbers, got {returned.dtype}.")
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
    return cast(Tensor, rewards)


def _answer(answer: Callable[[], Any], timeout: float | None) -> Any:
    try:
        return answer() if timeout is None else call_within(timeout, answer)
    except (DmcHubError, ValueError, FloatingPointError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise RewardError(f"`reward_function` raised {type(error).__name__}: {error}") from error


def call_within(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns or raises, if it does within so many seconds; nobody waits for it any longer then.

    It runs in a thread of its own, with this thread's modes of autograd and autocast.

    Raises:
        RewardError: it did not.
    """
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    with_grad, device = torch.is_grad_enabled(), "cuda" if torch.cuda.is_available() else "cpu"
    autocast = torch.autocast(device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))

    def work() -> None:
        try:
            with torch.set_grad_enabled(with_grad), autocast:
                answers.put((function(*arguments), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=work, name="reward", daemon=True).start()
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise RewardError(
            f"`reward_function` has not answered within {seconds:g} s: make it faster, or raise `reward_timeout`."
        ) from None
    if error is not None:
        raise error
    return result
