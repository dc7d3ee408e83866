"""The losses of every trainer as pure functions of tensors; `B` is the batch size."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def masked_mean_square(error: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the counted entries of `error ** 2` for each sample: `(B, ...)` to `(B,)`.

    `mask` (broadcastable, bool) selects the entries that count: in-painting fixed the others.
    """
    square = error**2
    if mask is None:
        return square.flatten(1).mean(1)
    counted = mask.expand_as(square)
    return torch.where(counted, square, 0).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)


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


def reinforce_loss(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """`-A log pi` per sample, `(B,)` (Eq. 8 of arXiv:2502.12198, one denoising step)."""
    return -advantage * log_prob


def ppo_clip_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate for one denoising step (Eq. 7 of PPO, arXiv:1707.06347; DDPO, arXiv:2305.13301).

    Args:
        log_prob: summed over the entries of the sample, shape `(B,)`.
        old_log_prob: the same under the policy that sampled, shape `(B,)`, no gradient.
        advantage: shape `(B,)`.
        clip_range: the ratio is clipped to `[1 - clip_range, 1 + clip_range]`.

    Returns:
        The loss per sample and the ratio, both `(B,)`.
    """
    ratio = torch.exp((log_prob - old_log_prob).clamp(max=80))  # exp(89) is infinite, and 0 * infinity NaN
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantage, clipped * advantage), ratio


def diffusion_dpo_loss(
    winner_error: Tensor,
    loser_error: Tensor,
    winner_reference_error: Tensor,
    loser_reference_error: Tensor,
    *,
    beta: float,
    weight: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Diffusion-DPO, Eq. 11 and 12 of arXiv:2502.12198 (Wallace et al., 2023, arXiv:2311.12908).

    The errors are denoising errors `||eps - eps_theta(z_t, t)||^2`, shape `(B,)`, of the winning and the losing sample
    of each pair under the trained and the reference model, at the same time and noise. `beta` is the paper's gamma and
    `weight` its `omega(lambda_t)`.

    Returns:
        The loss `-log sigmoid(margin)` per pair and the margin, whose sign is the implicit preference; both `(B,)`.
    """
    winner = winner_error - winner_reference_error
    loser = loser_error - loser_reference_error
    margin = -beta * weight * (winner - loser)
    return -F.logsigmoid(margin), margin
