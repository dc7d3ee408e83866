"""Rewards of text-to-image: of a whole distribution, and several at once.

A reward function takes `(images, prompts, metadata)`, see `dmc_hub.text_to_image`, and returns one number per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dmc_hub.losses import leave_one_out_credit

Metadata = Mapping[str, Any]
Statistic = Callable[[Tensor, list[str], list[dict[str, Any]]], Tensor]
Normalization = Literal["prompt", "running", "batch", "none"]


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
        return torch.linalg.vector_norm(frequencies - goal, dim=-1)

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
    for part in _gathered(totals):
        for group, (total, count) in part.items():
            previous = merged.get(group)
            merged[group] = (total, count) if previous is None else (previous[0] + total, previous[1] + count)
    return merged


def _gathered(mine: Any) -> list[Any]:
    if not torch.distributed.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def of_its_task(name: str, prompt: str, metadata: Metadata) -> bool:
    """Whether the metadata say `{"task": name}`, as those of `PromptTasks` do."""
    return bool(metadata.get("task") == name)


class JointReward:
    """The weighted sum of several rewards on every image, each normalised first so that none drowns the others.

    Args:
        rewards: reward functions by name.
        weights: by name; 1 where missing.
        applies: `(name, prompt, metadata)` to whether a reward counts for an image of that prompt; None: every reward
            on every image. `of_its_task` is Algorithm 1 of arXiv:2401.12244.
        normalization: what is done to a reward, over the images for which it counts on all processes, before it is
            weighted: `"prompt"` subtracts the mean of the images of the same prompt and metadata, and divides by the
            standard deviation of what is left; `"running"` divides by that of the run so far instead; `"batch"`
            subtracts the mean of all and divides by their standard deviation, as the paper does; `"none"`. A
            `DistributionReward` with shared credit needs `"batch"`.

    Attributes:
        means: of the last call, the mean of each reward as it came, by name.
    """

    def __init__(
        self,
        rewards: Mapping[str, Callable[..., Any]],
        *,
        weights: Mapping[str, float] | None = None,
        applies: Callable[[str, str, Metadata], bool] | None = None,
        normalization: Normalization = "prompt",
    ) -> None:
        stray = set(weights or {}) - set(rewards)
        if stray or not rewards:
            raise ValueError(f"`weights` must name some of the rewards {sorted(rewards)}, got {sorted(stray)} as well.")
        if normalization not in get_args(Normalization):
            raise ValueError(
                f"`normalization` must be one of {', '.join(get_args(Normalization))}; got {normalization!r}."
            )
        self.rewards = dict(rewards)
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in rewards}
        self.applies = applies
        self.normalization = normalization
        self.means: dict[str, float] = {}
        self._moments = {name: torch.zeros(2, dtype=torch.float64) for name in rewards}

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        total = torch.zeros(len(prompts), device=images.device)
        self.means = {}
        for name, function in self.rewards.items():
            pairs = enumerate(zip(prompts, metadata, strict=True))
            rows = [i for i, pair in pairs if self.applies is None or self.applies(name, *pair)]
            index = torch.tensor(rows, dtype=torch.long, device=images.device)
            chosen = [prompts[i] for i in rows], [metadata[i] for i in rows]
            values = torch.zeros(0, device=images.device)
            if rows:
                values = torch.as_tensor(function(images[index], *chosen), device=images.device).float()
                if values.shape != (len(rows),):
                    raise ValueError(f"The reward {name!r} must return {len(rows)} numbers, got {tuple(values.shape)}.")
                self.means[name] = float(values.detach().mean())
            normalized = self._normalized(name, values, list(zip(*chosen)))
            total = total.index_add(0, index, self.weights[name] * normalized)
        return total

    def _normalized(self, name: str, values: Tensor, keys: Sequence[tuple[str, Metadata]]) -> Tensor:
        """Collective: every process calls it for every reward, even if it has no image for it."""
        if self.normalization == "none":
            return values
        numbers = values.detach().double().cpu()
        if self.normalization == "batch":
            everyone = torch.cat(_gathered(numbers))
            mean = everyone.mean() if len(everyone) else everyone.sum()
            centred, spread = numbers - mean, (everyone - mean).pow(2)
            moments = torch.stack([spread.sum(), torch.tensor(float(len(spread)), dtype=torch.float64)])
        else:
            mean = _means_by(numbers, [repr(key) for key in keys])
            centred = numbers - mean
            mine = torch.stack([centred.pow(2).sum(), torch.tensor(float(len(centred)), dtype=torch.float64)])
            moments = torch.stack(_gathered(mine)).sum(0)
        if self.normalization == "running":
            self._moments[name] = self._moments[name] + moments
            moments = self._moments[name]
        std = (moments[0] / moments[1].clamp(min=1)).sqrt()
        rounding = 4 * torch.finfo(torch.float32).eps * numbers.abs().amax() if len(numbers) else 0.0
        if not float(std) > float(rounding):
            return torch.zeros_like(values)  # equal rewards say nothing
        return (values - mean.to(values)) / std.to(values)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {name: moments.clone() for name, moments in self._moments.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        self._moments = {name: state[name].clone() for name in self._moments}


def _means_by(values: Tensor, keys: Sequence[str]) -> Tensor:
    """For each value the mean of those with the same key, `(B,)`."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    index = torch.tensor([numbers[key] for key in keys], dtype=torch.long)
    sums = torch.zeros(len(numbers), dtype=values.dtype).index_add(0, index, values)
    counts = torch.zeros_like(sums).index_add(0, index, torch.ones_like(values))
    return (sums / counts)[index]
