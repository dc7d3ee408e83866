"""The losses of every trainer as pure functions of tensors; `B` is the batch size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def masked_mean_square(error: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the counted entries of `error ** 2` for each sample: `(B, ...)` to `(B,)`.

    `mask` (broadcastable, bool) selects the entries that count: in-painting fixed the others.
    """
    return _masked_mean(error**2, mask)


def _masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.flatten(1).mean(1)
    counted = mask.expand_as(values)
    return torch.where(counted, values, 0).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)


def denoising_loss(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """The simplified denoising objective, Eq. 5 of arXiv:2502.12198 for any prediction type; per sample, `(B,)`."""
    return masked_mean_square(prediction - target, mask)


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """`|tau - 1(u < 0)| u^2`, elementwise (Eq. 5 of IQL, arXiv:2110.06169); `difference` is target minus estimate."""
    weight = torch.where(difference < 0, 1 - expectile, expectile)
    return weight * difference**2


def group_advantages(
    rewards: Tensor, group_size: int, *, scale: Literal["group", "global", "none"] = "global", eps: float = 1e-4
) -> Tensor:
    """Rewards relative to the mean of their group (the samples of one condition), `(B,)` to `(B,)`.

    Args:
        rewards: shape `(B,)`, groups contiguous: `B` is a multiple of `group_size`.
        group_size: samples per condition, at least 2.
        scale: divide by the standard deviation inside the `"group"`, by the one of all centred rewards (`"global"`,
            which does not blow up groups whose samples agree), or by `"none"`.
        eps: added to the standard deviation, in units of the reward.

    Source: group-relative advantages, Eq. 3 of GRPO (arXiv:2402.03300).
    """
    if group_size < 2 or rewards.shape[0] % group_size:
        raise ValueError(
            f"`group_size` must be at least 2 and divide the {rewards.shape[0]} rewards, got {group_size}."
        )
    grouped = rewards.reshape(-1, group_size)
    centred = grouped - grouped.mean(1, keepdim=True)
    if scale == "group":
        centred = centred / (centred.pow(2).mean(1, keepdim=True).sqrt() + eps)
    elif scale == "global":
        centred = centred / (centred.pow(2).mean().sqrt() + eps)
    return centred.reshape(-1)


def leave_one_out_credit(values: Tensor, sums: Tensor, counts: Tensor, distance: Callable[[Tensor], Tensor]) -> Tensor:
    """By how much each sample brings its group's mean closer to a goal, `distance(others) - distance(all)`; `(B,)`.

    Args:
        values: of a statistic, `(B, C)`.
        sums: of the values of each sample's group, itself included, `(B, C)`.
        counts: of the samples in it, `(B,)`; where it is 1 there are no others, and the credit is 0.
        distance: of means `(B, C)` to the goal, `(B,)`.

    Source: the difference reward of Wolpert & Tumer, 2002, "Optimal payoff functions for members of collectives".
    """
    others = (sums - values) / (counts - 1).clamp(min=1)[:, None]
    return torch.where(counts > 1, distance(others) - distance(sums / counts[:, None]), 0)


def reinforce_loss(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """`-A log pi` per sample, `(B,)` (Eq. 8 of arXiv:2502.12198, one denoising step)."""
    return -advantage * log_prob


def ppo_clip_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate for one denoising step (Eq. 7 of PPO, arXiv:1707.06347; DDPO, arXiv:2305.13301).

    Args:
        log_prob: summed over the entries of the sample, shape `(B,)`.
        old_log_prob: the same under the policy that sampled, shape `(B,)`, no gradient.
        advantage: shape `(B,)`.
        clip_range: the ratio is clipped to `[1 - clip_range, 1 + clip_range]`.
        clip_range_high: the upper bound is `1 + clip_range_high` instead ("clip-higher", section 3.1 of DAPO,
            arXiv:2503.14476).

    Returns:
        The loss per sample and the ratio, both `(B,)`.
    """
    high = clip_range if clip_range_high is None else clip_range_high
    ratio = torch.exp((log_prob - old_log_prob).clamp(max=80))  # exp(89) is infinite, and 0 * infinity NaN
    clipped = ratio.clamp(1 - clip_range, 1 + high)
    return -torch.minimum(ratio * advantage, clipped * advantage), ratio


def off_policy_mask(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, limit: float) -> Tensor:
    """False where a sample is bad and has already become improbable by more than `limit`; `(B,)`, bool.

    `A < 0` and `log pi_old - log pi > limit`: pushing it further away teaches nothing and can break the policy. The
    log-probabilities are per entry. Source: off-policy sequence masking, section 3.1 of DeepSeek-V3.2
    (arXiv:2512.02556).
    """
    return ~((advantage < 0) & (old_log_prob - log_prob > limit))


def self_normalized_error(error: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean square over a constant mean magnitude, `mean(e^2) / sg(mean |e|)` per sample: `(B, ...)` to `(B,)`.

    On errors of the clean sample this is DiffusionNFT's weighting of the noise levels (section 3.3 of
    arXiv:2509.16117): every level's gradient is of order 1. `mask` as in `masked_mean_square`.
    """
    scale = _masked_mean(error.detach().abs(), mask).clamp(min=1e-5)
    return masked_mean_square(error, mask) / scale


def nft_loss(
    prediction: Tensor,
    old_prediction: Tensor,
    target: Tensor,
    optimality: Tensor,
    *,
    beta: float,
    mask: Tensor | None = None,
    self_normalized: bool = False,
) -> Tensor:
    """DiffusionNFT's contrast of an implicit positive and negative policy, Eq. 5 of arXiv:2509.16117; `(B,)`.

    `r ||v+ - v||^2 + (1 - r) ||v- - v||^2` with `v+ = (1 - beta) v_old + beta v` and `v- = (1 + beta) v_old - beta v`,
    where norms are means over the counted entries. Its minimum is `v_old + (2 / beta) E[r (target - v_old)]`
    (Theorem 3.2 there). Every prediction type is affine in `v`, so the two branches are the same policies in all.

    Args:
        prediction: of the trained network, shape `(B, ...)`.
        old_prediction: of the policy that sampled, no gradient.
        target: of the clean sample and its noise, in the same terms.
        optimality: `r` in `[0, 1]`, shape `(B,)`.
        beta: share of the trained network in the positive branch; smaller ones take larger steps.
        mask: entries that count, as in `masked_mean_square`.
        self_normalized: weight each branch as `self_normalized_error` does.
    """
    difference = beta * (prediction - old_prediction)
    norm = self_normalized_error if self_normalized else masked_mean_square
    positive = norm(old_prediction + difference - target, mask)
    negative = norm(old_prediction - difference - target, mask)
    return optimality * positive + (1 - optimality) * negative


def growing_clip_range(position: float, first: float, last: float, *, rate: float = 3.0) -> float:
    """Clip range of one denoising step: `first + (last - first) (e^(rate p) - 1) / (e^rate - 1)`.

    `position` is `p`: 0 at the noisiest step that is trained, 1 at the last. What a noisy step changes, all later ones
    build on, so it is held closer. Source: DPPO (arXiv:2409.00588), whose code has `rate = 3`.
    """
    return first + (last - first) * math.expm1(rate * position) / math.expm1(rate)


def adapted_kl_coefficient(coefficient: float, kl: float, target: float, *, rate: float = 0.1) -> float:
    """The KL coefficient after a step on which `kl` was measured: `beta (1 + rate clip(kl / target - 1, -0.2, 0.2))`.

    Source: the proportional controller in log-space of section 2.2 of Ziegler et al., 2019 (arXiv:1909.08593), whose
    `K_beta` is `rate`.
    """
    return coefficient * (1 + rate * min(max(kl / target - 1, -0.2), 0.2))


def similarity_credit(latents: Tensor, next_latents: Tensor, mask: Tensor | None = None) -> Tensor:
    """How much each denoising step goes the way of the whole denoising, `(N, B, ...)` twice to `(N, B)` in `[0, 1]`.

    `kappa_t = max(0, cos(z_{t-1} - z_t, z_0 - z_T))` over the entries that `mask` (`(B, ...)`, bool) selects, for each
    sample: the second option of section 3.1 of arXiv:2502.12198, which leaves the measure open. The displacements add
    up to the whole one, so not all of a sample's cosines are negative or 0, unless it did not move.

    Args:
        latents: `z_t` of every step, the noisiest first.
        next_latents: `z_{t-1}` of every step.
        mask: the entries that in-painting did not fix.
    """
    moves = torch.stack([*(next_latents - latents), next_latents[-1] - latents[0]])
    if mask is not None:
        moves = torch.where(mask, moves, 0)
    moves = moves.flatten(2)
    return F.cosine_similarity(moves[:-1], moves[-1:], dim=2).clamp(min=0)


def entropy_estimates(
    samples: Tensor, group_size: int, mask: Tensor | None = None, *, min_distance: float = 1e-3
) -> Tensor:
    """Each sample's part of its group's differential entropy, in nats per free entry, `(B, ...)` to `(B,)`.

    The mean over a group is the Kozachenko–Leonenko estimate from nearest neighbours (Eq. 20 of Kraskov et al., 2004,
    arXiv:cond-mat/0305641, with `k = 1`), divided by the number of free entries `d`:
    `log(distance) + (log V_d + psi(n) - psi(1)) / d`, where `V_d` is the volume of the unit ball and `n` the size of
    the group. Up to a constant this estimates `-log p / d` at the sample, so as a reward it makes the policy gradient
    that of the entropy.

    Args:
        samples: groups contiguous: `B` is a multiple of `group_size`.
        group_size: samples that share a condition, at least 2.
        mask: `(B, ...)`, bool, selects the free entries, as many for all samples of a group.
        min_distance: neighbours that are closer count as this far apart, in units of the samples: equal samples, of
            which clamping makes some, have no finite entropy.
    """
    flat = (samples if mask is None else torch.where(mask, samples, 0)).flatten(1)
    entries = torch.full_like(flat[:, 0], flat.shape[1]) if mask is None else mask.flatten(1).sum(1).to(flat)
    grouped = flat.unflatten(0, (-1, group_size))
    distances = torch.cdist(grouped, grouped, compute_mode="donot_use_mm_for_euclid_dist")
    itself = torch.eye(group_size, dtype=torch.bool, device=flat.device)
    nearest = distances.masked_fill(itself, math.inf).amin(2).flatten().clamp(min=min_distance)
    log_volume = entries / 2 * math.log(math.pi) - torch.lgamma(entries / 2 + 1)
    harmonic = sum(1 / count for count in range(1, group_size))  # psi(n) - psi(1)
    return nearest.log() + (log_volume + harmonic) / entries


def diffusion_dpo_loss(
    winner_error: Tensor,
    loser_error: Tensor,
    winner_reference_error: Tensor,
    loser_reference_error: Tensor,
    *,
    beta: float,
    weight: Tensor | float = 1.0,
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid",
) -> tuple[Tensor, Tensor]:
    """Diffusion-DPO, Eq. 11 and 12 of arXiv:2502.12198 (Wallace et al., 2023, arXiv:2311.12908).

    The errors are denoising errors `||eps - eps_theta(z_t, t)||^2`, shape `(B,)`, of the winning and the losing sample
    of each pair under the trained and the reference model, at the same time and noise. `beta` is the paper's gamma and
    `weight` its `omega(lambda_t)`. `"ipo"` regresses the log-ratio `margin / beta` on `1 / (2 beta)` instead of pushing
    it to infinity (Eq. 17 of arXiv:2310.12036, with `beta` for its tau).

    Returns:
        The loss per pair, `-log sigmoid(margin)` or IPO's, and the margin, whose sign is the implicit preference; both
        `(B,)`.
    """
    winner = winner_error - winner_reference_error
    loser = loser_error - loser_reference_error
    margin = -beta * weight * (winner - loser)
    loss = -F.logsigmoid(margin) if loss_type == "sigmoid" else ((margin - 0.5) / beta) ** 2
    return loss, margin


def plackett_luce_loss(scores: Tensor, rewards: Tensor) -> Tensor:
    """Negative log-likelihood of a ranking under Plackett and Luce's model, `(B, G)` to `(B,)`.

    `-sum_i log(e^s_i / (e^s_i + sum_{j: r_j < r_i} e^s_j))`: each member is chosen before those below it; equal rewards
    prefer nothing. With `s = -beta omega F` of Eq. 12 this is listwise Diffusion-DPO (Diffusion-LPO, arXiv:2510.01540),
    and with two members `diffusion_dpo_loss`.

    Args:
        scores: implicit rewards, shape `(B, G)`, in any order.
        rewards: of the same members; -inf marks places that are empty.
    """
    beaten = (rewards[:, :, None] > rewards[:, None, :]) & rewards.isfinite()[:, None, :]
    below = torch.where(beaten, scores[:, None, :], float("-inf"))
    choices = torch.cat([scores[:, :, None], below], dim=2)
    return (torch.logsumexp(choices, dim=2) - scores).sum(1)
