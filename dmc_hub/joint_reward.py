"""Several rewards of text-to-image at once, on one scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dmc_hub.image_rewards import Metadata, gathered
from dmc_hub.rewards import DeferredReward, ask, on_all_processes

Normalization = Literal["prompt", "group", "running", "moving", "batch", "none"]
Weighting = Literal["fixed", "min_norm"]


def of_its_task(name: str, prompt: str, metadata: Metadata) -> bool:
    """Whether the metadata say `{"task": name}`, as those of `PromptTasks` do."""
    return bool(metadata.get("task") == name)


class JointReward:
    """The weighted sum of several rewards on every image, each normalised first so that none drowns the others.

    Rewards that can be asked without waiting, as `HTTPReward` can, are asked first, all at once; `submit` does not wait
    for them either.

    Args:
        rewards: reward functions by name.
        weights: by name; 1 where missing.
        applies: `(name, prompt, metadata)` to whether a reward counts for an image of that prompt; None: every reward
            on every image. `of_its_task` is Algorithm 1 of arXiv:2401.12244.
        normalization: what is done to a reward, over the images for which it counts on all processes, before it is
            weighted: `"prompt"` subtracts the mean of the images of the same prompt and metadata, and divides by the
            standard deviation of what is left; `"group"` divides by that of the same prompt and metadata alone,
            `"running"` by that of the run so far, `"moving"` by its exponential moving average; `"batch"` subtracts the
            mean of all and divides by their standard deviation, as the paper does; `"none"`. A `DistributionReward`
            with shared credit needs `"batch"`. With `"prompt"` and `"group"`, all images of a prompt must be on one
            process, as the trainers see to.
        weighting: `"fixed"`, or `"min_norm"`: in each call `weights` are multiplied by those of `min_norm_weights`, in
            sum the number of rewards, so that a reward which the others oppose counts for more.
        moving_decay: of `"moving"`, per call.

    Attributes:
        means: of the last call, the mean of each reward as it came, by name.
        dynamic_weights: of the last call, by name; empty with fixed weighting.
    """

    def __init__(
        self,
        rewards: Mapping[str, Callable[..., Any]],
        *,
        weights: Mapping[str, float] | None = None,
        applies: Callable[[str, str, Metadata], bool] | None = None,
        normalization: Normalization = "prompt",
        weighting: Weighting = "fixed",
        moving_decay: float = 0.9,
    ) -> None:
        stray = set(weights or {}) - set(rewards)
        if stray or not rewards:
            raise ValueError(f"`weights` must name some of the rewards {sorted(rewards)}, got {sorted(stray)} as well.")
        for option, value, kind in (
            ("normalization", normalization, Normalization),
            ("weighting", weighting, Weighting),
        ):
            if value not in get_args(kind):
                raise ValueError(f"`{option}` must be one of {', '.join(get_args(kind))}; got {value!r}.")
        if not 0 <= moving_decay < 1:
            raise ValueError(f"`moving_decay` must lie in [0, 1), got {moving_decay}.")
        self.rewards = dict(rewards)
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in rewards}
        self.applies = applies
        self.normalization = normalization
        self.weighting = weighting
        self.decay = moving_decay if normalization == "moving" else 1.0
        self.means: dict[str, float] = {}
        self.dynamic_weights: dict[str, float] = {}
        self._moments = {name: torch.zeros(2, dtype=torch.float64) for name in rewards}

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return self.submit(images, prompts, metadata)()

    def submit(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Callable[[], Tensor]:
        """Ask for all rewards; the function returned waits for them and sums them up, `(B,)`."""
        waits_last = sorted(self.rewards, key=lambda name: not isinstance(self.rewards[name], DeferredReward))
        asked = {name: self._ask(name, images, prompts, metadata) for name in waits_last}

        def wait() -> Tensor:
            self.means = {}
            values = on_all_processes(lambda: {name: self._answer(name, *asked[name], images) for name in self.rewards})
            columns = [self._column(name, *asked[name][:2], values[name], len(images)) for name in self.rewards]
            return torch.stack(self._weighted(columns)).sum(0)

        return wait

    def _ask(
        self, name: str, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> tuple[list[int], list[str], Callable[[], Any]]:
        """The rows that this reward is for, a key for each that says of which prompt it is, and what waits for them."""
        pairs = list(zip(prompts, metadata, strict=True))
        rows = [i for i, pair in enumerate(pairs) if self.applies is None or self.applies(name, *pair)]
        keys = [repr(pairs[i]) for i in rows]
        if not rows:
            return rows, keys, lambda: torch.zeros(0)
        samples = (
            images if len(rows) == len(images) else images[rows],
            [prompts[i] for i in rows],
            [metadata[i] for i in rows],
        )
        return rows, keys, ask(self.rewards[name], *samples)

    def _answer(self, name: str, rows: list[int], keys: list[str], answer: Callable[[], Any], images: Tensor) -> Tensor:
        values = torch.as_tensor(answer(), device=images.device).float()
        if values.shape != (len(rows),):
            raise ValueError(f"The reward {name!r} must return {len(rows)} numbers, got {tuple(values.shape)}.")
        if rows:
            self.means[name] = float(values.detach().mean())
        return values

    def _column(self, name: str, rows: list[int], keys: list[str], values: Tensor, count: int) -> Tensor:
        """The normalised reward of every image, `(B,)`; 0 where it does not count."""
        index = torch.tensor(rows, dtype=torch.long, device=values.device)
        normalized = self._normalized(name, values, keys)
        return torch.zeros(count, device=values.device).index_add(0, index, normalized)

    def _weighted(self, columns: Sequence[Tensor]) -> list[Tensor]:
        factors = torch.ones(len(columns), dtype=torch.float64)
        if self.weighting == "min_norm":
            stacked = torch.stack(list(columns)).detach().double().cpu()
            gram = torch.stack(gathered(stacked @ stacked.T)).sum(0)
            factors = len(columns) * min_norm_weights(gram)
            self.dynamic_weights = dict(zip(self.rewards, factors.tolist(), strict=True))
        fixed = self.weights.values()
        return [weight * factor * each for weight, factor, each in zip(fixed, factors.tolist(), columns, strict=True)]

    def _normalized(self, name: str, values: Tensor, keys: Sequence[str]) -> Tensor:
        """Collective: every process calls it for every reward, even if it has no image for it."""
        if self.normalization == "none":
            return values
        numbers = values.detach().double().cpu()
        if self.normalization == "batch":
            everyone = torch.cat(gathered(numbers))
            mean = everyone.mean() if len(everyone) else everyone.sum()
            std = (everyone - mean).pow(2).mean().sqrt() if len(everyone) else mean
        else:
            mean = means_by(numbers, keys)
            std = self._deviation(name, numbers - mean, keys)
        rounding = 4 * torch.finfo(torch.float32).eps * numbers.abs().amax() if len(numbers) else 0.0
        differs = std > rounding  # equal rewards say nothing
        scaled = (values - mean.to(values)) / torch.where(differs, std, 1.0).to(values)
        return torch.where(differs.to(values.device), scaled, 0)

    def _deviation(self, name: str, centred: Tensor, keys: Sequence[str]) -> Tensor:
        """Standard deviation of what is left within prompts: `()`, or by prompt `(B,)`."""
        if self.normalization == "group":
            return means_by(centred.pow(2), keys).sqrt()
        mine = torch.stack([centred.pow(2).sum(), torch.tensor(float(len(centred)), dtype=torch.float64)])
        moments = torch.stack(gathered(mine)).sum(0)
        if self.normalization in ("running", "moving"):
            self._moments[name] = moments = self.decay * self._moments[name] + moments
        return (moments[0] / moments[1].clamp(min=torch.finfo(torch.float64).tiny)).sqrt()

    def metrics(self) -> dict[str, float]:
        """The means of the last call as `reward_<name>`, and dynamic weights as `weight_<name>`."""
        weights = {f"weight_{name}": value for name, value in self.dynamic_weights.items()}
        return {**{f"reward_{name}": value for name, value in self.means.items()}, **weights}

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {name: moments.clone() for name, moments in self._moments.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        self._moments = {name: state[name].clone() for name in self._moments}


def means_by(values: Tensor, keys: Sequence[str]) -> Tensor:
    """For each value the mean of those with the same key, `(B,)`."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    index = torch.tensor([numbers[key] for key in keys], dtype=torch.long)
    sums = torch.zeros(len(numbers), dtype=values.dtype).index_add(0, index, values)
    counts = torch.zeros_like(sums).index_add(0, index, torch.ones_like(values))
    return (sums / counts)[index]


def min_norm_weights(gram: Tensor, *, num_iterations: int = 250) -> Tensor:
    """The convex combination of `K` vectors of least norm, from their inner products `(K, K)`; `(K,)`, in sum 1.

    Of gradients it is a direction along which no objective falls (multiple-gradient descent, Désidéri, 2012), found by
    Frank–Wolfe with exact line search (Algorithm 2 of Sener & Koltun, 2018, arXiv:1810.04650). Here the vectors are the
    normalised rewards of a batch: their inner products are those of the rewards' policy gradients if the scores
    `grad log p` of different images are orthogonal and of one length, which saves a backward pass for each reward.

    Vectors of length 0 want nothing: they take no part, and get the weight 0.
    """
    counts = gram.diagonal() > 0
    weights = counts.to(gram) / counts.sum().clamp(min=1)
    for _ in range(num_iterations if int(counts.sum()) > 1 else 0):
        products = gram @ weights
        best = torch.where(counts, products, torch.inf).argmin()
        towards = torch.nn.functional.one_hot(best, len(gram)).to(gram) - weights
        slope, curvature = -(towards @ products), towards @ gram @ towards
        if not slope > 1e-12 * gram.diagonal().max():
            break
        weights = weights + (slope / curvature.clamp(min=1e-300)).clamp(0, 1) * towards
    return weights
