"""How good a controller is: its returns, its coherency (Eq. 15 and 16), the diversity of its candidates."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from scipy.stats import bootstrap, trim_mean

from dmc_hub import profiling
from dmc_hub.agent import Agent
from dmc_hub.evaluation_cache import EpisodeRecord, EvaluationCache
from dmc_hub.rollout import Lane, Rollouts, run_lanes

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
    records: of every episode, in the order of the seeds; those that failed are left out.
    failed_seeds: theirs.
    candidate_diversity: see `candidate_diversity`; averaged over the visited states.
    coherency: mean of the coherency scores over the visited states, or None where none were asked for.
    early_ranking: see the pipelines' call; `candidate_diversity` is then of the candidates that were finished.
    wall_seconds: seconds spent running the episodes.
    steps: the episodes step by step, those that were found in a cache left out; None where all were. Not part of
        `to_dict`.
    """

    statistics: ReturnStatistics
    outcomes: np.ndarray
    records: tuple[EpisodeRecord, ...]
    failed_seeds: tuple[int, ...]
    candidate_diversity: float
    coherency: float | None
    num_candidates: int
    action_selection: str
    num_inference_steps: int | None
    num_upsampling_passes: int
    generator_seed: int
    wall_seconds: float
    steps: Rollouts | None
    early_ranking: tuple[float, float] | None = None

    @property
    def rollouts(self) -> Rollouts:
        """All episodes step by step.

        Raises:
            ValueError: some were found in a cache, which holds no steps.
        """
        if self.steps is None or len(self.steps.seeds) < len(self.records):
            raise ValueError("Episodes that were found in a cache have no steps: evaluate without one.")
        return self.steps

    @property
    def returns(self) -> np.ndarray:
        """Of every episode, float64 of shape `(num_episodes,)`."""
        return np.array([record.episode_return for record in self.records])

    @property
    def scores(self) -> np.ndarray | None:
        """Of every episode, float64 of shape `(num_episodes,)`, where the task has a score."""
        return _told([record.score for record in self.records])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the episodes' steps, as values that JSON can hold."""
        left_out = ("steps", "statistics", "outcomes", "records", "failed_seeds")
        values = {name: value for name, value in vars(self).items() if name not in left_out}
        return {
            **values,
            "statistics": self.statistics.to_dict(),
            "seeds": [record.seed for record in self.records],
            "returns": [record.episode_return for record in self.records],
            "failed_seeds": list(self.failed_seeds),
            "episodes": [asdict(record) for record in self.records],
        }


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
    return cast(np.ndarray, trim_mean(values, 0.25, axis=axis))


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
    return cast(np.ndarray, np.exp(-0.5 * np.square(gap / tolerance).sum(axis=-1)))


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
    result: np.ndarray = np.asarray(candidates, dtype=np.float64).std(axis=1).reshape(len(candidates), -1).mean(axis=1)
    return result


def candidate_diversity(candidates: np.ndarray) -> float:
    """Mean of `candidate_diversity_scores` over the states."""
    return float(candidate_diversity_scores(candidates).mean())


def evaluate(
    pipeline: Callable[..., Any],
    vector_env: VectorEnv[Any, Any, Any] | Sequence[VectorEnv[Any, Any, Any]],
    *,
    seeds: Sequence[int],
    num_candidates: int,
    action_selection: str,
    num_inference_steps: int | None = None,
    num_upsampling_passes: int = 0,
    early_ranking: tuple[float, float] | None = None,
    generator_seed: int = 0,
    cache: EvaluationCache | None = None,
    optimal_return: float | None = None,
    coherency: CoherencyScores | None = None,
    success: str | None = None,
    score: Callable[[Rollouts], np.ndarray] | None = None,
    objective: Literal["return", "score"] = "return",
    progress: bool = False,
) -> Evaluation:
    """Run one episode per seed with a pipeline and summarise them.

    Episodes run in batches, as many consecutive seeds as there are environments, and all that a batch draws comes from
    a generator of its own, seeded by `batch_generator_seed`. So the figures of a seed depend on its batch and on the
    number of environments, but neither on other batches nor on whether the environments are in worker processes or
    take turns; and what is read from a cache is what would be run. Only an episode whose environment failed is run
    beside others than usual when it is repeated.

    Args:
        pipeline: a pipeline, or an `Agent` around one, which is reset when episodes start. It is called with
            observations `(num_envs, observation_dim)` and the keywords `num_candidates`, `action_selection`,
            `num_inference_steps` and `generator`; its output has `action` and `candidates`.
        vector_env: see `dmc_hub.rollout.run_episodes`; or several, alike, that take turns: while the workers of one
            step, the pipeline decides for the next (`dmc_hub.rollout.run_lanes`).
        seeds: one seed per episode.
        num_candidates: candidates per state.
        action_selection: `"greedy"`, `"expectation"` or `"softmax"`.
        num_inference_steps: denoising steps; None for the pipeline's own number.
        num_upsampling_passes: passes through the pipeline's up-sampler; 0, and the pipeline need not know the keyword.
        early_ranking: shares of the denoising steps and of the candidates; None, and it need not know the keyword.
        generator_seed: part of every batch's seed of its noise.
        cache: of batches, read and written; None runs everything.
        optimal_return: the known optimum, for `share_of_optimum`.
        coherency: maps observations `(num_envs, observation_dim)` and the pipeline's output to scores
            `(num_envs, ...)`, NaN where nothing counts; see `planner_coherency_scores`,
            `policy_coherency_scores`.
        success: when an episode is a success, see `Rollouts.succeeded`; None for environments that don't say it.
        score: `Rollouts -> scores (num_episodes,)`, for `normalized_score`.
        objective: of what the statistics are: the returns, or the scores.
        progress: whether to show a bar.

    Raises:
        ValueError: `seeds` is empty or has a seed twice; see also `dmc_hub.rollout.run_episodes`.
        RuntimeError: all episodes had to be given up.
    """
    if objective == "score" and score is None:
        raise ValueError("`objective` 'score' needs `score`: a function of the rollouts.")
    vector_envs = [vector_env] if isinstance(vector_env, VectorEnv) else list(vector_env)
    batches = batches_of(seeds, vector_envs[0].num_envs)
    records = cached_records(cache, batches)
    missing = [seed for batch in batches if batch[0] not in records for seed in batch]
    options = {
        "num_candidates": num_candidates,
        "action_selection": action_selection,
        "num_inference_steps": num_inference_steps,
    }
    special: dict[str, Any] = {"num_upsampling_passes": num_upsampling_passes, "early_ranking": early_ranking}
    asked = {**options, **{name: value for name, value in special.items() if value}}

    def lane(vector_env: VectorEnv[Any, Any, Any]) -> Lane:
        agent = copy.copy(pipeline) if isinstance(pipeline, Agent) else pipeline  # each lane remembers by itself
        watched, generator = _Watched(agent, asked, coherency), torch.Generator()

        def on_reset(batch: list[int]) -> None:
            generator.manual_seed(batch_generator_seed(generator_seed, batch[0]))
            watched.reset()

        return Lane(watched.act, vector_env, generator, on_reset, functools.partial(on_batch, watched))

    def on_batch(watched: _Watched, rollouts: Rollouts) -> None:
        successes = None if success is None else rollouts.succeeded(success)
        new = watched.records(rollouts, successes, None if score is None else score(rollouts))
        records.update(new)
        for batch in batches:
            if cache is not None and not new.keys().isdisjoint(batch) and records.keys() >= set(batch):
                cache.write([records[seed] for seed in batch])

    started = time.perf_counter()
    steps = None
    if missing:
        steps = run_lanes([lane(each) for each in vector_envs], seeds=missing, progress=progress)
    return summarize_records(
        [records[seed] for seed in seeds if seed in records],
        optimal_return=optimal_return,
        objective=objective,
        failed_seeds=tuple(seed for seed in seeds if seed not in records),
        **special,
        generator_seed=generator_seed,
        wall_seconds=time.perf_counter() - started,
        steps=steps,
        **options,
    )


def batches_of(seeds: Sequence[int], num_envs: int) -> list[list[int]]:
    """The seeds in batches that run side by side.

    Raises:
        ValueError: there are none, or one is there twice.
    """
    plain = [int(seed) for seed in seeds]
    if not plain:
        raise ValueError("`seeds` is empty: pass one seed per episode.")
    if len(set(plain)) < len(plain):
        raise ValueError(f"`seeds` has a seed twice: {sorted({s for s in plain if plain.count(s) > 1})}.")
    return [plain[start : start + num_envs] for start in range(0, len(plain), num_envs)]


def batch_generator_seed(generator_seed: int, first_seed: int) -> int:
    """The seed of the noise of a batch of episodes, a 63-bit number made of the batch's first seed."""
    return int(np.random.SeedSequence([generator_seed, first_seed]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def cached_records(cache: EvaluationCache | None, batches: Sequence[Sequence[int]]) -> dict[int, EpisodeRecord]:
    """By seed, the records of the batches that the cache holds."""
    found = [] if cache is None else [cache.read(batch) or [] for batch in batches]
    return {record.seed: record for records in found for record in records}


def summarize_records(
    records: Sequence[EpisodeRecord],
    *,
    optimal_return: float | None = None,
    objective: Literal["return", "score"] = "return",
    **facts: Any,
) -> Evaluation:
    """The evaluation that the records of its episodes make.

    Args:
        records: in the order of the seeds.
        optimal_return: see `evaluate`; likewise `objective`.
        facts: the other fields of `Evaluation`.
    """
    returns = np.array([record.episode_return for record in records])
    scores = _told([record.score for record in records])
    weights = np.array([record.num_coherency for record in records], dtype=np.float64)
    coherency = np.array([0.0 if record.coherency is None else record.coherency for record in records])
    outcomes = returns if objective == "return" or scores is None else scores
    return Evaluation(
        statistics=return_statistics(
            outcomes,
            optimal_return=optimal_return,
            successes=_told([record.success for record in records]),
            scores=scores,
        ),
        outcomes=outcomes,
        records=tuple(records),
        candidate_diversity=float(
            np.average([record.diversity for record in records], weights=[record.length for record in records])
        ),
        coherency=float(np.average(coherency, weights=weights)) if weights.any() else None,
        **facts,
    )


def _told(values: Sequence[float | None]) -> np.ndarray | None:
    return None if any(value is None for value in values) else np.array(values, dtype=np.float64)


class _Watched:
    """A pipeline that acts, and what was seen of its candidates since the last reset."""

    def __init__(
        self, pipeline: Callable[..., Any], options: Mapping[str, Any], coherency: CoherencyScores | None
    ) -> None:
        self.pipeline, self.options, self.coherency = pipeline, options, coherency
        self.reset()

    def reset(self) -> None:
        self._diversity: list[np.ndarray] = []
        self._coherency: list[np.ndarray] = []
        if isinstance(self.pipeline, Agent):
            self.pipeline.reset()

    def act(self, observations: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        output = self.pipeline(observations, generator=generator, **self.options)
        self._diversity.append(candidate_diversity_scores(output.candidates))
        if self.coherency is not None:
            self._coherency.append(np.asarray(self.coherency(observations, output), dtype=np.float64))
        profiling.end_step("evaluate")
        return cast(np.ndarray, output.action)

    def records(
        self, rollouts: Rollouts, successes: np.ndarray | None, scores: np.ndarray | None
    ) -> dict[int, EpisodeRecord]:
        """By seed, the records of the episodes since the last reset, whose steps are given."""
        places = np.flatnonzero(rollouts.visited.any(axis=0))  # of the environments whose episodes they are
        found = {}
        for index, (seed, place) in enumerate(zip(rollouts.seeds.tolist(), places, strict=True)):
            seen = rollouts.visited[:, place]
            counted = np.stack(self._coherency)[seen, place] if self._coherency else np.zeros(0)
            counted = counted[~np.isnan(counted)]
            found[seed] = EpisodeRecord(
                seed=seed,
                episode_return=float(rollouts.returns[index]),
                length=int(rollouts.lengths[index]),
                diversity=float(np.stack(self._diversity)[seen, place].mean()),
                coherency=float(counted.mean()) if counted.size else None,
                num_coherency=int(counted.size),
                success=None if successes is None else bool(successes[index]),
                score=None if scores is None else float(scores[index]),
            )
        return found
