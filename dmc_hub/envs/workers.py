"""Environments in worker processes that may raise, die or hang: the worker is restarted, the others go on."""

from __future__ import annotations

import math
import multiprocessing
import queue
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import NoAsyncCallError
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.vector.async_vector_env import AsyncState, _async_worker
from gymnasium.vector.utils import CloudpickleWrapper, clear_mpi_env_vars

from dmc_hub.errors import EnvironmentFailedError

WORKER_FAILURE = "worker_failure"


class WorkerFailureWarning(UserWarning):
    """An environment's worker process failed and was restarted."""


class RestartingVectorEnv(AsyncVectorEnv):
    """gymnasium's `AsyncVectorEnv` that survives its workers.

    A worker that raises in `reset` or `step`, that dies, that does not answer in time, or whose answer is NaN, of a
    wrong shape or far outside the observation space is replaced by a new process, with a `WorkerFailureWarning` that
    names the worker, the seed of its episode and the step. Its episode is lost: that call's `info["worker_failure"]`
    says why (`info["_worker_failure"]` is the mask), and until the next `reset` of all environments it answers with
    zeros. `dmc_hub.rollout.run_episodes` then runs the episode again.

    Autoreset is gymnasium's NEXT_STEP.

    Args:
        env_fns: one function per worker that makes its environment; the first is also called in this process.
        timeout: seconds a worker has for one `reset` or `step`, and for making its environment.
        context: how multiprocessing starts workers; its default by default.

    Raises:
        ValueError: `env_fns` is empty or `timeout` is not positive.
        RuntimeError: a worker cannot make its environment at all.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gymnasium.Env[Any, Any]]],
        *,
        timeout: float = 60.0,
        context: str | None = None,
    ) -> None:
        if not env_fns:
            raise ValueError("`env_fns` is empty: pass one function per worker.")
        if not timeout > 0:
            raise ValueError(f"`timeout` must be positive, got {timeout}.")
        self.timeout = timeout
        self._pending: list[str | None] = [None] * len(env_fns)  # what each worker was asked to do
        self._is_lost = np.zeros(len(env_fns), dtype=bool)  # the episode's worker failed
        self._is_over = np.zeros(len(env_fns), dtype=bool)
        self._seeds: list[int | None] = [None] * len(env_fns)
        self._num_steps = np.zeros(len(env_fns), dtype=np.int64)
        # Autoreset is done here, not in the workers: without shared memory theirs survives an explicit reset.
        super().__init__(env_fns, shared_memory=False, context=context, autoreset_mode=AutoresetMode.DISABLED)
        self.autoreset_mode = self.metadata["autoreset_mode"] = AutoresetMode.NEXT_STEP

    def reset_async(
        self, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> None:
        """Start an episode in every environment; see `AsyncVectorEnv.reset_async`, whose `reset_mask` is refused."""
        self._assert_is_running()
        if options is not None and "reset_mask" in options:
            raise ValueError("`options` has 'reset_mask': this vector environment resets all its environments at once.")
        if seed is None or isinstance(seed, (int, np.integer)):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"`seed` must hold one seed per environment: got {len(seeds)} for {self.num_envs}.")
        self._seeds = seeds
        self._is_lost[:], self._is_over[:], self._num_steps[:] = False, False, 0
        for index, each in enumerate(seeds):
            self._send(index, "reset", {"seed": each, "options": options})
        self._state = AsyncState.WAITING_RESET

    def reset_wait(self, timeout: float | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """The first observations, zeros where a worker failed."""
        answers, infos = self._receive(AsyncState.WAITING_RESET, timeout)
        observations = np.zeros(self._batch_shape, dtype=self._dtype)
        for index, (observation, info) in answers.items():
            observations[index] = observation
            infos = self._add_info(infos, info, index)
        return observations, infos

    def step_async(self, actions: np.ndarray) -> None:
        """Step every environment; one whose episode ended is reset instead."""
        self._assert_is_running()
        self._num_steps += 1
        for index, action in enumerate(np.asarray(actions)):
            if self._is_lost[index]:
                continue
            if self._is_over[index]:
                self._seeds[index], self._num_steps[index] = None, 0
                self._send(index, "reset", {})
            else:
                self._send(index, "step", action)
        self._state = AsyncState.WAITING_STEP

    def step_wait(
        self, timeout: float | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """What the step brought; zeros where a worker failed in this step or an earlier one of the episode."""
        asked = list(self._pending)
        answers, infos = self._receive(AsyncState.WAITING_STEP, timeout)
        observations, rewards = np.zeros(self._batch_shape, dtype=self._dtype), np.zeros(self.num_envs)
        terminations, truncations = np.zeros(self.num_envs, dtype=bool), np.zeros(self.num_envs, dtype=bool)
        for index, answer in answers.items():
            if asked[index] == "reset":
                observations[index], info = answer
            else:
                observations[index], rewards[index], terminations[index], truncations[index], info = answer
            infos = self._add_info(infos, info, index)
        self._is_over = terminations | truncations
        return observations, rewards, terminations, truncations, infos

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Ask the workers to close their environments, and kill those that have not after the worker's timeout."""
        for pipe in self.parent_pipes:
            with suppress(OSError):
                pipe.send(("close", None))
        end = time.monotonic() + (0.0 if terminate else self.timeout if timeout is None else timeout)
        for process, pipe in zip(self.processes, self.parent_pipes, strict=True):
            process.join(max(0.0, end - time.monotonic()))
            _kill(process)
            pipe.close()

    @property
    def _batch_shape(self) -> tuple[int, ...]:
        shape = self.single_observation_space.shape
        assert shape is not None
        return self.num_envs, *shape

    @property
    def _dtype(self) -> Any:
        return self.single_observation_space.dtype

    def _check_spaces(self) -> None:
        """The base's last act of construction, which would wait for a hanging worker for ever."""
        self.call_async("__str__")
        try:
            self._names = self.call_wait(self.timeout)
        except (EOFError, OSError, multiprocessing.TimeoutError) as error:
            self.close(terminate=True)
            raise EnvironmentFailedError(
                f"A worker could not make its environment within {self.timeout:g} s ({type(error).__name__}): call the "
                "functions in `env_fns` in a process of their own, or raise `timeout`."
            ) from error
        check: Callable[[], None] = super()._check_spaces
        check()

    def _send(self, index: int, command: str, data: Any) -> None:
        self._pending[index] = command
        with suppress(OSError):  # a worker that died between two calls is noticed where its answer is read
            self.parent_pipes[index].send((command, data))

    def _receive(self, state: AsyncState, timeout: float | None) -> tuple[dict[int, Any], dict[str, Any]]:
        """The answers of the workers that were asked, and infos that name those that failed, which are restarted."""
        self._assert_is_running()
        if self._state != state:
            raise NoAsyncCallError(f"Nothing was asked of the environments before `{state.value}_wait`.", state.value)
        self._state = AsyncState.DEFAULT
        end = time.monotonic() + (self.timeout if timeout is None else timeout)
        answers: dict[int, Any] = {}
        infos: dict[str, Any] = {}
        for index in [index for index, command in enumerate(self._pending) if command is not None]:
            answer, failure = self._answer(index, end)
            if failure:
                self._restart(index, failure)
                infos = self._add_info(infos, {WORKER_FAILURE: failure}, index)
            else:
                answers[index] = answer
            self._pending[index] = None
        return answers, infos

    def _answer(self, index: int, end: float) -> tuple[Any, str]:
        """What a worker answers, or why it does not."""
        pipe, process = self.parent_pipes[index], self.processes[index]
        try:
            if not pipe.poll(max(0.0, end - time.monotonic())):
                return None, "it did not answer in time"
            answer, is_success = pipe.recv()
        except (EOFError, OSError):
            process.join(1.0)
            return None, f"its process ended with exit code {process.exitcode}"
        if not is_success:
            return None, self._raised(index)
        problem = self._problem(answer)
        return (None, problem) if problem else (answer, "")

    def _problem(self, answer: tuple[Any, ...]) -> str:
        """What is wrong with an answer to `reset` or `step`; empty if nothing is."""
        space = self.single_observation_space
        try:
            observation = np.asarray(answer[0], dtype=np.float64)
            reward = float(answer[1]) if len(answer) == 5 else 0.0
        except (TypeError, ValueError) as error:
            return f"its observation or reward is no number ({error})"
        if observation.shape != space.shape:
            return f"its observation has the shape {observation.shape} instead of {space.shape}"
        if not np.isfinite(observation).all():
            return f"its observation is not finite: {observation}"
        if not math.isfinite(reward):
            return f"its reward is {reward}"
        if isinstance(space, Box):
            low, high = space.low.astype(np.float64), space.high.astype(np.float64)
            slack = np.where(np.isfinite(high - low), high - low, 0.0)
            if ((observation < low - slack) | (observation > high + slack)).any():
                return f"its observation {observation} is far outside {space}"
        return ""

    def _raised(self, index: int) -> str:
        """The exception of a worker that says it has raised one."""
        end = time.monotonic() + 5.0
        while (left := end - time.monotonic()) > 0:
            with suppress(queue.Empty):
                source, _, error, _ = self.error_queue.get(timeout=left)
                if source == index:
                    self.processes[index].join(left)
                    return f"it raised {error!r}"
        return "it raised an exception that cannot be sent to another process"

    def _restart(self, index: int, failure: str) -> None:
        warnings.warn(
            f"Worker {index} of {self._names[index]} failed at step {self._num_steps[index]} of the episode with seed "
            f"{self._seeds[index]}: {failure}. It is restarted.",
            WorkerFailureWarning,
            stacklevel=2,
        )
        self._is_lost[index] = True
        _kill(self.processes[index])
        self.parent_pipes[index].close()
        context: Any = multiprocessing.get_context(self.context)
        self.parent_pipes[index], child_pipe = context.Pipe()
        arguments = (CloudpickleWrapper(self.env_fns[index]), child_pipe, self.parent_pipes[index], None)
        with clear_mpi_env_vars():
            process = context.Process(
                target=_async_worker,
                name=f"Worker<{type(self).__name__}>-{index}",
                args=(index, *arguments, self.error_queue, AutoresetMode.DISABLED, None),
                daemon=self.daemon,
            )
            process.start()
        self.processes[index] = process
        child_pipe.close()


def _kill(process: Any) -> None:
    if process.is_alive():
        process.kill()
    process.join()
