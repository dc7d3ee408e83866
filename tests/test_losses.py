"""Every loss against numbers derived by hand."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch.distributions import Normal

from dmc_hub.losses import (
    adapted_kl_coefficient,
    denoising_loss,
    diffusion_dpo_loss,
    entropy_estimates,
    expectile_loss,
    group_advantages,
    growing_clip_range,
    masked_mean_square,
    nft_loss,
    plackett_luce_loss,
    ppo_clip_loss,
    reinforce_loss,
    self_normalized_error,
    similarity_credit,
)


def test_masked_mean_square_counts_only_the_free_entries() -> None:
    error = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]])
    assert masked_mean_square(error).tolist() == [7.5, 1]  # (1 + 4 + 9 + 16) / 4
    mask = torch.tensor([[[False, True], [True, False]], [[True, True], [True, True]]])
    assert masked_mean_square(error, mask).tolist() == [6.5, 1]  # (4 + 9) / 2
    rows = torch.tensor([[False], [True]])
    assert masked_mean_square(error, rows).tolist() == [12.5, 1]  # (9 + 16) / 2, the mask broadcast over both
    assert masked_mean_square(error, torch.zeros(2, 2, 2, dtype=torch.bool)).tolist() == [0, 0]


def test_fixed_entries_get_no_gradient() -> None:
    prediction = torch.zeros(1, 2, requires_grad=True)
    denoising_loss(prediction, torch.tensor([[1.0, 3.0]]), torch.tensor([[True, False]])).sum().backward()
    assert prediction.grad is not None
    assert prediction.grad.tolist() == [[-2, 0]]  # d (p - 1)^2 / dp at 0


def test_expectile_loss_by_hand() -> None:
    loss = expectile_loss(torch.tensor([2.0, -2.0, 0.0]), 0.9)
    assert loss.tolist() == pytest.approx([3.6, 0.4, 0])  # 0.9 * 4 above, 0.1 * 4 below


def test_expectile_loss_is_least_at_the_expectile() -> None:
    """The 0.8-expectile v of {0, 1}: 0.8 (1 - v) = 0.2 v, so v = 0.8; at 0.5 it is the mean."""
    targets = torch.tensor([0.0, 1.0])
    for expectile in (0.5, 0.8):
        value = torch.tensor(expectile, requires_grad=True)
        expectile_loss(targets - value, expectile).sum().backward()
        assert value.grad is not None
        assert float(value.grad) == pytest.approx(0, abs=1e-6)


def test_group_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 3.0, 10.0, 18.0])  # means 2 and 14, deviations -1, 1 and -4, 4
    assert group_advantages(rewards, 2, scale="none").tolist() == [-1, 1, -4, 4]
    assert group_advantages(rewards, 2, scale="group", eps=0.0).tolist() == [-1, 1, -1, 1]
    spread = math.sqrt((1 + 1 + 16 + 16) / 4)
    expected = [-1 / spread, 1 / spread, -4 / spread, 4 / spread]
    assert group_advantages(rewards, 2, scale="global", eps=0.0).tolist() == pytest.approx(expected)
    assert group_advantages(rewards, 4, scale="none").tolist() == [-7, -5, 2, 10]


def test_group_advantages_ignore_a_shift_per_group_and_survive_agreement() -> None:
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0))
    shifted = rewards + torch.tensor([5.0, -3.0, 0.5]).repeat_interleave(4)
    for scale in ("group", "global", "none"):
        torch.testing.assert_close(
            group_advantages(shifted, 4, scale=scale), group_advantages(rewards, 4, scale=scale), rtol=1e-4, atol=1e-5
        )
        assert group_advantages(torch.full((4,), 2.0), 2, scale=scale).tolist() == [0, 0, 0, 0]
    # A group that agrees but for rounding: "group" blows 1e-3 up to order 1, "global" keeps it in proportion.
    nearly = torch.tensor([0.0, 1e-3, 0.0, 2.0])
    assert float(group_advantages(nearly, 2, scale="group")[1]) > 0.8
    assert float(group_advantages(nearly, 2, scale="global")[1]) < 1e-3


@pytest.mark.parametrize("size", [0, 1, 3])
def test_group_sizes_that_do_not_fit_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"`group_size` must be at least 2 and divide the 4 rewards, got {size}"):
        group_advantages(torch.zeros(4), size)


def test_reinforce_gradient_is_the_policy_gradient() -> None:
    """d/dmean of -A log N(x; mean, 0.5^2) is -A (x - mean) / 0.25."""
    mean, x = torch.zeros(2, requires_grad=True), torch.tensor([1.0, -2.0])
    reinforce_loss(Normal(mean, 0.5).log_prob(x), torch.tensor([3.0, -1.0])).sum().backward()
    assert mean.grad is not None
    assert mean.grad.tolist() == [-12, -8]


CLIPPED: list[Any] = [  # ratio, advantage, loss, gradient of the loss in the log-probability (-A ratio, or 0)
    (1.0, 2.0, -2.0, -2.0),
    (1.1, 2.0, -2.2, -2.2),
    (1.5, 2.0, -2.4, 0.0),  # more likely and good: enough
    (0.5, 2.0, -1.0, -1.0),  # less likely though good: repaired
    (1.5, -2.0, 3.0, 3.0),  # more likely though bad: repaired
    (0.5, -2.0, 1.6, 0.0),  # less likely and bad: enough
    (1.5, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "expected", "gradient"), CLIPPED)
def test_ppo_clips_only_the_side_that_has_had_enough(
    ratio: float, advantage: float, expected: float, gradient: float
) -> None:
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, found = ppo_clip_loss(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.2)
    loss.sum().backward()
    assert log_prob.grad is not None
    assert float(found.detach()) == pytest.approx(ratio)
    assert float(loss.detach()) == pytest.approx(expected)
    assert float(log_prob.grad) == pytest.approx(gradient)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient"),
    [(1.3, 1.0, -1.3, -1.3), (1.5, 1.0, -1.4, 0.0), (0.85, -1.0, 0.85, 0.85), (0.7, -1.0, 0.8, 0.0)],
)
def test_ppo_bounds_may_differ(ratio: float, advantage: float, expected: float, gradient: float) -> None:
    """Between 1 - 0.2 and 1 + 0.4."""
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, _ = ppo_clip_loss(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.2, 0.4)
    loss.sum().backward()
    assert log_prob.grad is not None
    assert float(loss.detach()) == pytest.approx(expected)
    assert float(log_prob.grad) == pytest.approx(gradient)


def test_the_clip_range_grows_exponentially_between_its_ends() -> None:
    ranges = [growing_clip_range(step / 4, 0.01, 0.2) for step in range(5)]
    assert ranges[0] == 0.01
    assert ranges[4] == pytest.approx(0.2)
    assert ranges[2] == pytest.approx(0.01 + 0.19 * 0.182426, rel=1e-5)  # (e^1.5 - 1) / (e^3 - 1)
    steps = [after - before for before, after in itertools.pairwise(ranges)]
    factors = [after / before for before, after in itertools.pairwise(steps)]
    assert factors == pytest.approx([math.exp(0.75)] * 3)


@pytest.mark.parametrize(
    ("kl", "expected"), [(0.5, 2.0), (0.55, 2.02), (0.45, 1.98), (0.6, 2.04), (50.0, 2.04), (0.0, 1.96)]
)
def test_the_kl_coefficient_follows_the_error_within_bounds(kl: float, expected: float) -> None:
    """From 2, with a target of 0.5: a tenth of the relative error, at most 2 %."""
    assert adapted_kl_coefficient(2.0, kl, 0.5) == pytest.approx(expected)


def test_similarity_credit_by_hand() -> None:
    # Sample 0 goes right, then up: both at 45 degrees to the whole move (1, 1). Sample 1 goes left, then right past the
    # start; sample 2 up, then along (3, 0): the whole move is (3, 4), of length 5.
    z = torch.tensor([[[0.0, 0], [1, 0], [1, 1]], [[0, 0], [-1, 0], [3, 0]], [[0, 0], [0, 4], [3, 4]]]).transpose(0, 1)
    expected = [[math.sqrt(0.5), 0, 0.8], [math.sqrt(0.5), 1, 0.6]]
    torch.testing.assert_close(similarity_credit(z[:-1], z[1:]), torch.tensor(expected))


def test_similarity_credit_counts_only_the_free_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, fixed = torch.randn(5, 3, 2, 4, generator=generator), torch.randn(5, 3, 2, 4, generator=generator)
    mask = torch.rand(3, 2, 4, generator=generator) < 0.5
    mixed = torch.where(mask, latents, fixed)
    credit = similarity_credit(latents[:-1], latents[1:], mask)
    assert credit.shape == (4, 3)
    assert torch.equal(credit, similarity_credit(mixed[:-1], mixed[1:], mask))
    assert not torch.equal(credit, similarity_credit(latents[:-1], latents[1:]))


def test_entropy_by_hand() -> None:
    # A line, pairs 3 and 0.5 apart: log distance + log 2, the length of [-1, 1], + psi(2) - psi(1) = 1.
    pairs = entropy_estimates(torch.tensor([[0.0], [3.0], [1.0], [1.5]]), 2)
    expected = [math.log(3) + math.log(2) + 1] * 2 + [math.log(0.5) + math.log(2) + 1] * 2
    assert pairs.tolist() == pytest.approx(expected)
    # Three points of a plane: log distance to the nearest + (log pi + 1 + 1/2) / 2.
    offset = (math.log(math.pi) + 1.5) / 2
    triple = entropy_estimates(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 2.0]]), 3)
    assert triple.tolist() == pytest.approx([math.log(d) + offset for d in (2, math.sqrt(13), 2)])


@pytest.mark.parametrize("dim", [1, 3])
def test_entropy_estimates_are_those_of_the_distribution(dim: int) -> None:
    samples = 0.3 * torch.randn(8 * 1000, dim, generator=torch.Generator().manual_seed(0))
    expected = float(Normal(0.0, 0.3).entropy())
    assert float(entropy_estimates(samples, 1000, min_distance=1e-9).mean()) == pytest.approx(expected, abs=0.04)


def test_entropy_counts_only_the_free_entries_and_bounds_equal_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    samples, mask = torch.randn(8, 2, 3, generator=generator), torch.tensor([[True, False, True], [False, False, True]])
    free = entropy_estimates(samples, 4, mask.expand(8, 2, 3))
    torch.testing.assert_close(free, entropy_estimates(samples[:, mask], 4))
    assert float(entropy_estimates(torch.ones(2, 1), 2)[0]) == pytest.approx(math.log(1e-3) + math.log(2) + 1)


def test_the_entropy_reward_has_the_gradient_of_the_entropy() -> None:
    """The entropy of N(0, sigma^2) rises by 1 per log sigma, whose score is z^2 - 1."""
    z = torch.randn(100 * 200, 1, generator=torch.Generator().manual_seed(0))
    bonus = entropy_estimates(0.5 * z, 200, min_distance=1e-9)
    gradient = ((z[:, 0] ** 2 - 1) * (bonus - bonus.mean())).mean()
    assert float(gradient) == pytest.approx(1, abs=0.08)


def test_first_ppo_ratio_is_exactly_1_and_its_gradient_is_reinforce() -> None:
    log_prob = torch.tensor([-1234.567, 0.1], requires_grad=True)
    advantage = torch.tensor([2.0, -3.0])
    loss, ratio = ppo_clip_loss(log_prob, log_prob.detach(), advantage, 1e-4)
    assert ratio.tolist() == [1, 1]
    (ours,) = torch.autograd.grad(loss.sum(), log_prob)
    (reinforce,) = torch.autograd.grad(reinforce_loss(log_prob, advantage).sum(), log_prob)
    assert torch.equal(ours, reinforce)


def test_dpo_by_hand() -> None:
    # The winner's error fell by 0.3, the loser's rose by 0.2: the margin is -2 * 0.5 * (-0.3 - 0.2) = 0.5.
    one = torch.tensor([1.0])
    loss, margin = diffusion_dpo_loss(0.7 * one, 1.2 * one, one, one, beta=2.0, weight=0.5)
    assert float(margin) == pytest.approx(0.5)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-0.5)))
    worse, negative = diffusion_dpo_loss(1.2 * one, 0.7 * one, one, one, beta=2.0)
    assert float(negative) == pytest.approx(-1)
    assert float(worse) == pytest.approx(math.log(1 + math.exp(1)))


def test_dpo_starts_at_log_2_and_pulls_the_winner_in_and_the_loser_out() -> None:
    winner, loser = torch.tensor([0.4], requires_grad=True), torch.tensor([0.9], requires_grad=True)
    loss, margin = diffusion_dpo_loss(winner, loser, winner.detach(), loser.detach(), beta=3.0)
    loss.sum().backward()
    assert float(margin.detach()) == 0
    assert float(loss.detach()) == pytest.approx(math.log(2))
    assert winner.grad is not None
    assert loser.grad is not None
    # -log sigmoid(m) has slope -1/2 at 0, and m falls by beta per unit of the winner's error.
    assert float(winner.grad) == pytest.approx(1.5)
    assert float(loser.grad) == pytest.approx(-1.5)


def test_dpo_weight_is_per_pair_and_large_margins_stay_finite() -> None:
    errors = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0]), torch.ones(2), torch.ones(2)
    _, margin = diffusion_dpo_loss(*errors, beta=1.0, weight=torch.tensor([1.0, 3.0]))
    assert margin.tolist() == [1, 3]
    loss, _ = diffusion_dpo_loss(*errors, beta=-1e6)
    assert loss.tolist() == [1e6, 1e6]


def test_ipo_by_hand_is_least_at_a_finite_margin() -> None:
    """The log-ratio h = margin / beta is drawn to 1 / (2 beta): (0.5 - 0.25)^2 at h = 0.5 and beta = 2."""
    one = torch.tensor([1.0])
    loss, margin = diffusion_dpo_loss(0.7 * one, 1.2 * one, one, one, beta=2.0, loss_type="ipo")
    assert float(margin) == pytest.approx(1.0)
    assert float(loss) == pytest.approx(0.0625)
    least, _ = diffusion_dpo_loss(0.9 * one, 1.15 * one, one, one, beta=2.0, loss_type="ipo")
    assert float(least) == pytest.approx(0, abs=1e-10)


def test_plackett_luce_is_a_distribution_over_rankings() -> None:
    scores = torch.tensor([0.3, -1.2, 2.0])
    rankings = torch.tensor(list(itertools.permutations([1.0, 2.0, 3.0])))
    likelihoods = (-plackett_luce_loss(scores.expand(6, 3), rankings)).exp()
    assert float(likelihoods.sum()) == pytest.approx(1)
    weights = scores.exp().tolist()  # of the ranking 3 > 1 > 2
    expected = weights[2] / sum(weights) * weights[0] / (weights[0] + weights[1])
    assert float(likelihoods[rankings.tolist().index([2, 1, 3])]) == pytest.approx(expected)


def test_plackett_luce_of_two_is_dpo_and_equal_or_empty_places_prefer_nothing() -> None:
    scores = torch.tensor([[0.4, -0.3]])
    _, margin = diffusion_dpo_loss(*(torch.tensor([x]) for x in (-0.4, 0.3, 0.0, 0.0)), beta=1.0)
    expected = float(-torch.nn.functional.logsigmoid(margin))
    assert float(plackett_luce_loss(scores, torch.tensor([[5.0, 1.0]]))) == pytest.approx(expected)
    assert float(plackett_luce_loss(scores, torch.tensor([[2.0, 2.0]]))) == pytest.approx(0)
    padded = torch.tensor([[0.4, 9.0, -0.3]], requires_grad=True)
    loss = plackett_luce_loss(padded, torch.tensor([[5.0, float("-inf"), 1.0]]))
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(expected)
    assert padded.grad is not None
    assert float(padded.grad[0, 1]) == 0


def test_self_normalized_error_by_hand() -> None:
    error = torch.tensor([[3.0, -1.0], [0.3, -0.1]], requires_grad=True)
    loss = self_normalized_error(error)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([2.5, 0.25])  # (9 + 1) / 2 over (3 + 1) / 2
    assert error.grad is not None
    torch.testing.assert_close(error.grad[0], torch.tensor([1.5, -0.5]))  # the divisor is a constant
    torch.testing.assert_close(error.grad[1], error.grad[0])
    masked = self_normalized_error(torch.tensor([[3.0, -1.0]]), torch.tensor([[True, False]]))
    assert masked.tolist() == pytest.approx([3.0])


def test_nft_by_hand() -> None:
    prediction, old, target = torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.tensor([[3.0]])
    # v+ = 0.5 * 1 + 0.5 * 2 = 1.5 and v- = 1.5 * 1 - 0.5 * 2 = 0.5: 0.8 * 1.5^2 + 0.2 * 2.5^2
    loss = nft_loss(prediction, old, target, torch.tensor([0.8]), beta=0.5)
    assert float(loss) == pytest.approx(3.05)
    normalized = nft_loss(prediction, old, target, torch.tensor([0.8]), beta=0.5, self_normalized=True)
    assert float(normalized) == pytest.approx(0.8 * 1.5 + 0.2 * 2.5)


def test_nft_is_least_where_its_theorem_says() -> None:
    """Three equally likely targets whose mean is the old prediction: v* = old + 2 / beta E[r (v - old)]."""
    targets, optimality = torch.tensor([[-1.0], [0.5], [2.0]]), torch.tensor([0.1, 0.4, 0.9])
    old, beta = targets.mean(), 0.3
    best = old + 2 / beta * (optimality[:, None] * (targets - old)).mean()
    prediction = best.clone().requires_grad_()
    loss = nft_loss(prediction.expand(3, 1), old.expand(3, 1), targets, optimality, beta=beta)
    loss.mean().backward()
    assert prediction.grad is not None
    assert float(prediction.grad) == pytest.approx(0, abs=1e-6)
    assert float(best - old) > 1
