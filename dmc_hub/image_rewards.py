"""Rewards of a whole distribution of images: parity, diversity, calibration.

A reward function takes `(images, prompts, metadata)`, see `dmc_hub.text_to_image`, and returns one number per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from dmc_hub.losses import leave_one_out_credit

Metadata = Mapping[str, Any]
Statistic = Callable[[Tensor, list[str], list[dict[str, Any]]], Tensor]


class DistributionReward:
    """Rewards how close a statistic of many images, averaged, comes to a goal: diversity, parity, calibration.

    The average is over the images of one call on all processes, those of each group apart if `group_by` is given.

    Args:
        statistic: `(images, prompts, metadata)` to one vector per image, `(B, C)`.
        distance: of an averaged vector `(..., C)` to the goal, `(...)`; the reward is its negative.
        credit: `"leave_one_out"` gives an image by how much it brings the average closer, compared with the others
            alone; its mean over equal images is 0. `"shared"` gives all images of a group the reward of the group, as
            arXiv:2401.12244 does: it tells nothing about images of one group, so advantages must then be relative to
            the batch and the batch hold several groups.
        group_by: `(prompt, metadata)` to what images of one group share; None: all are one group.
    """

    def __init__(
        self,
        statistic: Statistic,
        distance: Callable[[Tensor], Tensor],
        *,
        credit: Literal["leave_one_out", "shared"] = "leave_one_out",
        group_by: Callable[[str, Metadata], Hashable] | None = None,
    ) -> None:
        if credit not in ("leave_one_out", "shared"):
            raise ValueError(f"`credit` must be leave_one_out or shared, got {credit!r}.")
        self.statistic = statistic
        self.distance = distance
        self.credit = credit
        self.group_by = group_by

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        values = self.statistic(images, prompts, metadata).double()
        if values.ndim != 2 or len(values) != len(prompts):
            raise ValueError(f"`statistic` must return {len(prompts)} vectors, got shape {tuple(values.shape)}.")
        groups = [None if self.group_by is None else self.group_by(*pair) for pair in zip(prompts, metadata)]
        totals = _over_processes(_totals(values, groups))
        sums = torch.stack([totals[group][0] for group in groups]).to(values)
        counts = torch.tensor([totals[group][1] for group in groups]).to(values)
        if self.credit == "shared":
            return -self.distance(sums / counts[:, None]).float()
        return leave_one_out_credit(values, sums, counts, self.distance).float()


def statistical_parity(
    classify: Statistic,
    target: Sequence[float] | Tensor | None = None,
    *,
    credit: Literal["leave_one_out", "shared"] = "leave_one_out",
    group_by: Callable[[str, Metadata], Hashable] | None = None,
) -> DistributionReward:
    """The negative L2 distance of the classes' frequencies to a target histogram (Eq. 12 of arXiv:2401.12244).

    Args:
        classify: the images' class probabilities, `(B, C)`, or one-hot classes.
        target: `C` numbers that add up to 1; uniform by default.
        credit: see `DistributionReward`.
        group_by: see `DistributionReward`.
    """
    wanted = None if target is None else torch.as_tensor(target, dtype=torch.float64)
    if wanted is not None and not (bool((wanted >= 0).all()) and math.isclose(float(wanted.sum()), 1, abs_tol=1e-6)):
        raise ValueError(f"`target` must be a histogram that adds up to 1, got {wanted.tolist()}.")

    def distance(frequencies: Tensor) -> Tensor:
        goal = torch.full_like(frequencies[0], 1 / frequencies.shape[-1]) if wanted is None else wanted.to(frequencies)
        return cast(Tensor, torch.linalg.vector_norm(frequencies - goal, dim=-1))

    return DistributionReward(classify, distance, credit=credit, group_by=group_by)


def _totals(values: Tensor, groups: Sequence[Hashable]) -> dict[Hashable, tuple[Tensor, int]]:
    totals: dict[Hashable, tuple[Tensor, int]] = {}
    for value, group in zip(values.detach().cpu(), groups, strict=True):
        total, count = totals.get(group, (torch.zeros_like(value), 0))
        totals[group] = (total + value, count + 1)
    return totals


def _over_processes(totals: dict[Hashable, tuple[Tensor, int]]) -> dict[Hashable, tuple[Tensor, int]]:
    """The sums of all processes, added in the same order on each."""
    merged: dict[Hashable, tuple[Tensor, int]] = {}
    for part in gathered(totals):
        for group, (total, count) in part.items():
            previous = merged.get(group)
            merged[group] = (total, count) if previous is None else (previous[0] + total, previous[1] + count)
    return merged


def gathered(mine: Any) -> list[Any]:
    """What each process has, in the order of the processes."""
    if not torch.distributed.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone
