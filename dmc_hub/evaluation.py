"""How good a controller is: its returns, its coherency (Eq. 15 and 16), the diversity of its candidates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from scipy.stats import bootstrap, trim_mean

from dmc_hub.agent import Agent
from dmc_hub.rollout import Rollouts, run_episodes

COHERENCY_TOLERANCE = 0.1
CONFIDENCE_LEVEL = 0.95
NUM_RESAMPLES = 2000
Dynamics = Callable[[np.ndarray, np.ndarray], np.ndarray]
BehaviorLogProb = Callable[[np.ndarray, np.ndarray], np.ndarray]
CoherencyScores = Callable[[np.ndarray, Any], np.ndarray]


@dataclass(frozen=True)
class ReturnStatistics:
    """Statistics over episodes, of their returns or, where `evaluate` was told so, of their scores.

    num_episodes: number of episodes.
    mean, std: mean and (population) standard deviation.
    iqm: interquartile mean, the mean of the middle half (Agarwal et al., 2021, arXiv:2108.13264).
    ci_low, ci_high: 95 % bootstrap confidence interval of the interquartile mean; None for a single episode.
    mean_ci_low, mean_ci_high: the same of the mean.
    share_of_optimum: mean divided by the optimal return, where that is known.
    success_rate: share of the episodes that succeeded, where the task says what success is.
    normalized_score: mean score on the scale of the published tables, where the task has one.
    """

    num_episodes: int
    mean: float
    std: float
    iqm: float
    ci_low: float | None
    ci_high: float | None
    mean_ci_low: float | None
    mean_ci_high: float | None
    share_of_optimum: float | None
    success_rate: float | None = None
    normalized_score: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as numbers that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured and with which settings.

    statistics: of `outcomes`.
    outcomes: returns or scores, float64 of shape `(num_episodes,)`.
    candidate_diversity: see `candidate_diversity`; averaged over the visited states.
    coherency: mean of the coherency scores over the visited states, or None where none were asked for.
    wall_seconds: seconds spent running the episodes.
    rollouts: the episodes themselves; not part of `to_dict`, which holds their seeds and returns and
        the seeds of those that failed.
    """

    statistics: ReturnStatistics
    outcomes: np.ndarray
    candidate_diversity: float
    coherency: float | None
    num_candidates: int
    action_selection: str
    num_inference_steps: int | None
    num_upsampling_passes: int
    generator_seed: int
    wall_seconds: float
    rollouts: Rollouts

    def to_dict(self) -> dict[str, Any]:
        """Everything but the episodes' steps, as values that JSON can hold."""
        values = {
            name: value for name, value in vars(self).items() if name not in ("rollouts", "statistics", "outcomes")
        }
        rollouts = {name: getattr(self.rollouts, name).tolist() for name in ("seeds", "returns", "failed_seeds")}
        return {**values, "statistics": self.statistics.to_dict(), **rollouts}


def return_statistics(
    returns: np.ndarray,
    *,
    optimal_return: float | None = None,
    successes: np.ndarray | None = None,
    scores: np.ndarray | None = None,
    seed: int = 0,
) -> ReturnStatistics:
    """Summarise the returns of episodes.

    Args:
        returns: of shape `(num_episodes,)`.
        optimal_return: the known optimum, for `share_of_optimum`.
        successes: bool of shape `(num_episodes,)`, for `success_rate`.
        scores: of shape `(num_episodes,)`, for `normalized_score`.
        seed: seed of the bootstrap (2000 resamples, percentile intervals).
    """
    returns = np.asarray(returns, dtype=np.float64)
    if returns.ndim != 1 or len(returns) == 0 or not np.isfinite(returns).all():
        raise ValueError(f"`returns` must be finite and of shape (num_episodes,), got {returns!r}.")
    iqm_low, iqm_high = _confidence_interval(returns, interquartile_mean, seed)
    mean_low, mean_high = _confidence_interval(returns, np.mean, seed)
    mean = float(returns.mean())
    return ReturnStatistics(
        num_episodes=len(returns),
        mean=mean,
        std=float(returns.std()),
        iqm=float(interquartile_mean(returns)),
        ci_low=iqm_low,
        ci_high=iqm_high,
        mean_ci_low=mean_low,
        mean_ci_high=mean_high,
        share_of_optimum=None if optimal_return is None else mean / optimal_return,
        success_rate=None if successes is None else float(np.mean(successes)),
        normalized_score=None if scores is None else float(np.mean(scores)),
    )


def interquartile_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of the middle half of the values along `axis`."""
    return trim_mean(values, 0.25, axis=axis)


def _confidence_interval(
    returns: np.ndarray, statistic: Callable[..., Any], seed: int
) -> tuple[float | None, float | None]:
    if len(returns) < 2:
        return None, None
    interval = bootstrap(
        (returns,),
        statistic,
        n_resamples=NUM_RESAMPLES,
        confidence_level=CONFIDENCE_LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def planner_coherency_scores(
    trajectories: np.ndarray,
    dynamics: Dynamics,
    observation_dim: int,
    tolerance: float = COHERENCY_TOLERANCE,
) -> np.ndarray:
    """Coherency of every planned transition (Eq. 15 of Huh & Mohapatra, 2025, arXiv:2502.12198).

    The paper's `Pr(s' = T(s, a))` is read as the kernel `exp(-gap^2 / (2 tolerance^2))` of the Euclidean gap
    between the planned next state and the one the true dynamics lead to from the planned state under the
    planned action.

    Args:
        trajectories: plans of shape `(..., horizon, observation_dim + action_dim)`, unnormalised.
        dynamics: maps planned observations `(..., horizon, observation_dim)` and actions `(..., horizon,
            action_dim)` to true next states `(..., horizon - 1, num_compared)`: of the observation's first
            `num_compared` coordinates, which are the ones compared, and NaN for transitions that do not
            count.
        observation_dim: number of leading entries of a plan's step that are the observation.
        tolerance: gap, in units of the observation, at which the score is `exp(-1/2)`.

    Returns:
        Scores in `[0, 1]` of shape `(..., horizon - 1)`; NaN for transitions that do not count.
    """
    if tolerance <= 0.0:
        raise ValueError(f"`tolerance` must be positive, got {tolerance}.")
    trajectories = np.asarray(trajectories, dtype=np.float64)
    observations, actions = np.split(trajectories, [observation_dim], axis=-1)
    expected = dynamics(observations, actions)
    gap = observations[..., 1:, : expected.shape[-1]] - expected
    return np.exp(-0.5 * np.square(gap / tolerance).sum(axis=-1))


def planner_coherency(
    trajectories: np.ndarray,
    dynamics: Dynamics,
    observation_dim: int,
    tolerance: float = COHERENCY_TOLERANCE,
) -> float:
    """Mean of `planner_coherency_scores` over the planned transitions that count."""
    return _mean_that_counts(planner_coherency_scores(trajectories, dynamics, observation_dim, tolerance))


def policy_coherency_scores(
    observations: np.ndarray,
    actions: np.ndarray,
    behavior_log_prob: BehaviorLogProb,
    action_grid: np.ndarray | None = None,
) -> np.ndarray:
    """Coherency of every action with the behaviour policy (Eq. 16 of Huh & Mohapatra, 2025,
    arXiv:2502.12198).

    The score is the behaviour policy's density at the action divided by its maximum over the actions at that
    state, searched on a grid; it is 0 where the behaviour policy has no density at all.

    Args:
        observations: of shape `(batch, observation_dim)`.
        actions: of shape `(batch, ..., action_dim)`.
        behavior_log_prob: maps observations `(n, observation_dim)` and actions `(n, action_dim)` to
            log-densities `(n,)`.
        action_grid: actions `(num_points, action_dim)` among which the maximum is searched; 401 points of
            `[-1, 1]` for one-dimensional actions, otherwise it has to be given.

    Returns:
        Scores in `[0, 1]` of shape `(batch, ...)`.
    """
    action_dim = actions.shape[-1]
    if action_grid is None:
        if action_dim != 1:
            raise ValueError(f"`action_grid` must be given for actions of {action_dim} dimensions.")
        action_grid = np.linspace(-1.0, 1.0, 401)[:, None]
    flat = actions.reshape(len(actions), -1, action_dim)
    log_prob = _per_pair(behavior_log_prob, observations, flat)
    grid = np.broadcast_to(action_grid, (len(actions), *action_grid.shape))
    maximum = np.maximum(
        _per_pair(behavior_log_prob, observations, grid).max(axis=1, keepdims=True),
        log_prob.max(axis=1, keepdims=True),
    )
    is_possible = np.isfinite(maximum)
    scores = np.where(is_possible, np.exp(log_prob - np.where(is_possible, maximum, 0.0)), 0.0)
    return scores.reshape(actions.shape[:-1])


def policy_coherency(
    observations: np.ndarray,
    actions: np.ndarray,
    behavior_log_prob: BehaviorLogProb,
    action_grid: np.ndarray | None = None,
) -> float:
    """Mean of `policy_coherency_scores`."""
    return _mean_that_counts(policy_coherency_scores(observations, actions, behavior_log_prob, action_grid))


def _per_pair(behavior_log_prob: BehaviorLogProb, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    batch, num_actions, action_dim = actions.shape
    repeated = np.repeat(observations, num_actions, axis=0)
    return behavior_log_prob(repeated, actions.reshape(-1, action_dim)).reshape(batch, num_actions)


def _mean_that_counts(scores: np.ndarray) -> float:
    counted = scores[~np.isnan(scores)]
    if counted.size == 0:
        raise ValueError("No transition counts towards coherency: all lie past the end of the task.")
    return float(counted.mean())


def candidate_diversity_scores(candidates: np.ndarray) -> np.ndarray:
    """Standard deviation over candidates `(B, C, ...)`, averaged over dimensions: one number per state."""
    return np.asarray(candidates, dtype=np.float64).std(axis=1).reshape(len(candidates), -1).mean(axis=1)


def candidate_diversity(candidates: np.ndarray) -> float:
    """Mean of `candidate_diversity_scores` over the states."""
    return float(candidate_diversity_scores(candidates).mean())


def evaluate(
    pipeline: Callable[..., Any],
    vector_env: VectorEnv[Any, Any, Any],
    *,
    seeds: Sequence[int],
    num_candidates: int,
    action_selection: str,
    num_inference_steps: int | None = None,
    num_upsampling_passes: int = 0,
    generator_seed: int = 0,
    optimal_return: float | None = None,
    coherency: CoherencyScores | None = None,
    success: str | None = None,
    score: Callable[[Rollouts], np.ndarray] | None = None,
    objective: Literal["return", "score"] = "return",
    progress: bool = False,
) -> Evaluation:
    """Run one episode per seed with a pipeline and summarise them.

    Args:
        pipeline: a pipeline, or an `Agent` around one, which is reset when episodes start. It is called with
            observations `(num_envs, observation_dim)` and the keywords `num_candidates`, `action_selection`,
            `num_inference_steps` and `generator`; its output has `action` and `candidates`.
        vector_env: see `dmc_hub.rollout.run_episodes`.
        seeds: one seed per episode.
        num_candidates: candidates per state.
        action_selection: `"greedy"`, `"expectation"` or `"softmax"`.
        num_inference_steps: denoising steps; None for the pipeline's own number.
        num_upsampling_passes: passes through the pipeline's up-sampler; 0, and the pipeline need not know the keyword.
        generator_seed: seed of the one `torch.Generator` that all calls draw from.
        optimal_return: the known optimum, for `share_of_optimum`.
        coherency: maps observations `(num_envs, observation_dim)` and the pipeline's output to scores
            `(num_envs, ...)`, NaN where nothing counts; see `planner_coherency_scores`,
            `policy_coherency_scores`.
        success: when an episode is a success, see `Rollouts.succeeded`; None for environments that don't say it.
        score: `Rollouts -> scores (num_episodes,)`, for `normalized_score`.
        objective: of what the statistics are: the returns, or the scores.
        progress: whether to show a bar.
    """
    if objective == "score" and score is None:
        raise ValueError("`objective` 'score' needs `score`: a function of the rollouts.")
    cascade = {"num_upsampling_passes": num_upsampling_passes} if num_upsampling_passes else {}
    diversity: list[np.ndarray] = []
    scores: list[np.ndarray] = []

    def controller(observations: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        output = pipeline(
            observations,
            num_candidates=num_candidates,
            action_selection=action_selection,
            num_inference_steps=num_inference_steps,
            generator=generator,
            **cascade,
        )
        diversity.append(candidate_diversity_scores(output.candidates))
        if coherency is not None:
            scores.append(coherency(observations, output))
        return output.action

    generator = torch.Generator().manual_seed(generator_seed)
    started = time.perf_counter()
    on_reset = pipeline.reset if isinstance(pipeline, Agent) else None
    rollouts = run_episodes(
        controller, vector_env, seeds=seeds, generator=generator, on_reset=on_reset, progress=progress
    )
    wall_seconds = time.perf_counter() - started
    visited = rollouts.visited
    normalized = None if score is None else score(rollouts)
    outcomes = rollouts.returns if objective == "return" or normalized is None else normalized
    return Evaluation(
        statistics=return_statistics(
            outcomes,
            optimal_return=optimal_return,
            successes=None if success is None else rollouts.succeeded(success),
            scores=normalized,
        ),
        outcomes=outcomes,
        candidate_diversity=float(np.stack(diversity)[visited].mean()),
        coherency=None if coherency is None else _mean_that_counts(np.stack(scores)[visited]),
        num_candidates=num_candidates,
        action_selection=action_selection,
        num_inference_steps=num_inference_steps,
        num_upsampling_passes=num_upsampling_passes,
        generator_seed=generator_seed,
        wall_seconds=wall_seconds,
        rollouts=rollouts,
    )
