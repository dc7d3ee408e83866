"""How well a critic knows the data: its values against the returns that followed, and V against the expectile of Q."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from scipy.signal import lfilter
from scipy.stats import pearsonr, spearmanr

from dmc_hub.data import Episodes


@dataclass(frozen=True)
class CriticDiagnostics:
    """Values of a sample of the data's steps beside the discounted return that followed, the return-to-go.

    Attributes:
        num_steps: of the sample.
        discount: of the returns; the critic's.
        expectile: that V was fitted to.
        q_pearson, q_spearman: correlation of `min(Q1, Q2)` of the data's actions with the return-to-go, linear and of
            the ranks; None where one of them does not vary. Likewise `v_pearson`, `v_spearman`, of V.
        q_gap, v_gap: mean of value - return-to-go. The data's own policy made the returns, so a critic of a better one
            lies above 0.
        share_q_above_v: share of the steps with Q above V; with IQL (arXiv:2110.06169) about `1 - expectile`.
        fitted_expectile: which expectile of Q is V, `E[(V - Q)+] / E|Q - V|`: `expectile` where Eq. 5 there is solved;
            None where Q is V.
        highest_return: the highest return-to-go in all the data.
        share_q_above_highest, share_v_above_highest: share of values above that, which no step of the data has earned:
            over-estimation, as a rule.
        bootstrapped_weight: mean weight of the critic's own V in the returns-to-go: where an episode was cut, they end
            in V of its last observation.
        returns_to_go, q, v: of the sample, float64 of shape `(num_steps,)`.
    """

    num_steps: int
    discount: float
    expectile: float
    q_pearson: float | None
    q_spearman: float | None
    v_pearson: float | None
    v_spearman: float | None
    q_gap: float
    v_gap: float
    share_q_above_v: float
    fitted_expectile: float | None
    highest_return: float
    share_q_above_highest: float
    share_v_above_highest: float
    bootstrapped_weight: float
    returns_to_go: np.ndarray
    q: np.ndarray
    v: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """All but the sample, as numbers that JSON can hold."""
        return {name: value for name, value in asdict(self).items() if name not in ("returns_to_go", "q", "v")}


def diagnose_critic(
    pipeline: Any, episodes: Episodes, *, discount: float, expectile: float, num_steps: int = 4096, seed: int = 0
) -> CriticDiagnostics:
    """Compare a pipeline's critic with the data that it was fitted to.

    Args:
        pipeline: a planner or policy with a critic; one of action sequences is asked for the data's sequences.
        episodes: the data.
        discount: that the critic was fitted with.
        expectile: likewise.
        num_steps: steps to sample at most.
        seed: of the sample.

    Raises:
        ValueError: the pipeline has no critic.
    """
    critic = pipeline.critic
    if critic is None:
        raise ValueError("`pipeline` has no critic to diagnose.")
    ends = episodes.episode_ends - 1
    with torch.no_grad():
        tails = _value(pipeline, torch.from_numpy(episodes.next_observations[ends]))
        tails = np.where(episodes.terminations[ends], 0.0, tails)
        count = min(num_steps, episodes.num_steps)
        steps = np.sort(np.random.default_rng(seed).choice(episodes.num_steps, count, replace=False))
        inputs = episodes.windows(critic.config.num_action_steps).transitions(steps, discount)
        actions = inputs["actions"] if critic.config.num_action_steps > 1 else inputs["actions"][:, 0]
        v = _value(pipeline, inputs["observations"])
        q = _array(critic(_observations(pipeline, inputs["observations"]), _actions(pipeline, actions)))
    all_returns = returns_to_go(episodes, discount, tails)
    returns, highest = all_returns[steps], float(all_returns.max())
    episode = np.searchsorted(episodes.episode_ends, steps, side="right")
    is_cut = ~episodes.terminations[ends][episode]
    distance = np.abs(q - v).mean()
    return CriticDiagnostics(
        num_steps=count,
        discount=discount,
        expectile=expectile,
        q_pearson=_correlation(pearsonr, q, returns),
        q_spearman=_correlation(spearmanr, q, returns),
        v_pearson=_correlation(pearsonr, v, returns),
        v_spearman=_correlation(spearmanr, v, returns),
        q_gap=float((q - returns).mean()),
        v_gap=float((v - returns).mean()),
        share_q_above_v=float((q > v).mean()),
        fitted_expectile=float(np.maximum(v - q, 0.0).mean() / distance) if distance > 0 else None,
        highest_return=highest,
        share_q_above_highest=float((q > highest).mean()),
        share_v_above_highest=float((v > highest).mean()),
        bootstrapped_weight=float((is_cut * discount ** (ends[episode] - steps + 1.0)).mean()),
        returns_to_go=returns,
        q=q,
        v=v,
    )


def returns_to_go(episodes: Episodes, discount: float, tails: np.ndarray) -> np.ndarray:
    """Discounted return from every step to its episode's end, float64 of shape `(num_steps,)`.

    Args:
        episodes: the data.
        discount: of each step.
        tails: value after the last step of every episode, `(num_episodes,)`; 0 where the task ended.
    """
    returns = np.empty(episodes.num_steps)
    for start, end, tail in zip(episodes.episode_starts, episodes.episode_ends, tails, strict=True):
        backwards = episodes.rewards[start:end][::-1].astype(np.float64)
        returns[start:end] = lfilter([1.0], [1.0, -discount], backwards, zi=[discount * tail])[0][::-1]
    return returns


def _value(pipeline: Any, observations: torch.Tensor) -> np.ndarray:
    return _array(pipeline.critic.value(_observations(pipeline, observations)))


def _observations(pipeline: Any, observations: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, pipeline.normalizer.normalize_observations(observations.to(pipeline.critic.device)))


def _actions(pipeline: Any, actions: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, pipeline.normalizer.normalize_actions(actions.to(pipeline.critic.device)))


def _array(values: torch.Tensor) -> np.ndarray:
    return values.cpu().numpy().astype(np.float64)


def _correlation(measure: Any, first: np.ndarray, second: np.ndarray) -> float | None:
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(measure(first, second).statistic)
