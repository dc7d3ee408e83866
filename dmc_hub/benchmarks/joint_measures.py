"""What the miniature of Table 5 of arXiv:2401.12244 rewards, and what it measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState

from dmc_hub.benchmarks.alignment import ForwardCounter
from dmc_hub.benchmarks.digits import DIGITS, OPENINGS, TONES, DigitClassifier, DigitPictures, prompt_of
from dmc_hub.image_rewards import statistical_parity
from dmc_hub.text_to_image import TextToImagePolicy, transition_scheduler

GROUP = 16
BRIGHTEST = 0.175
"""Mean of the brightest pictures of the data: more earns nothing, or black on white would earn most."""
MEASURES = {"text": "accuracy", "parity": "parity_distance", "brightness": "brightness"}
"""What shows that a reward has risen."""
HELD_OUT_OPENING = OPENINGS[-1]

Reward = Callable[..., Tensor]


class Recording(TrainerCallback):
    """Counts the network's evaluations of a run, and measures the model now and then, which does not count.

    Args:
        network: that is trained.
        measure: what the model is worth.
        every: optimizer steps; 0 for never.

    Attributes:
        evaluations: of the network on one sample, in training.
        images: that a watched reward function was asked about.
        curve: `evaluations`, `images` and what `measure` says, before the first step and after each `every`.
    """

    def __init__(self, network: nn.Module, measure: Callable[[], dict[str, float]], *, every: int) -> None:
        self._network, self._measure, self._every = network, measure, every
        self._counter = ForwardCounter(network)
        self.curve: list[dict[str, float]] = []
        self.evaluations = self.images = 0

    def watch(self, reward: Reward) -> Reward:
        """The reward function, with its images counted."""

        def watched(images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
            self.images += len(images)
            return reward(images, prompts, metadata)

        return watched

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._counter.count = self.images = 0  # the call that tries the reward function is no training
        self._add_point(state)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._add_point(state)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.evaluations = self._counter.count

    def _add_point(self, state: TrainerState) -> None:
        if self._every and state.global_step % self._every == 0:
            was_training = self._network.training
            self._network.eval()
            with self._counter.paused():
                measured = self._measure()
            self._network.train(was_training)
            self.curve.append({"evaluations": self._counter.count, "images": self.images, **measured})


class DigitMeasures:
    """Measures a pipeline by a classifier that no reward knows, with 10 deterministic steps and without guidance.

    Args:
        pipeline: a Stable Diffusion of digits.
        judge: the classifier.
        seed: of the noise, which is the same for all models.
    """

    def __init__(self, pipeline: Any, judge: DigitClassifier, *, seed: int) -> None:
        scheduler = transition_scheduler(pipeline.scheduler, eta=0.0)
        self.policy = TextToImagePolicy(pipeline, scheduler=scheduler, num_inference_steps=10)
        self.judge, self.seed = judge, seed

    @torch.no_grad()
    def of_rewards(self, num_pictures: int) -> dict[str, float]:
        """On wordings that alignment has not seen, `num_pictures` (a multiple of 16) for each prompt: accuracy of
        digits, parity_distance (mean L2 distance of 16 pictures' tones to uniform, about 0.2 for a uniform model),
        brightness, and the standard error of each (`<measure>_error`)."""
        plain = [prompt_of(digit, opening=HELD_OUT_OPENING) for digit in range(len(DIGITS))]
        images, prompts = self._pictures(plain, num_pictures)
        digits, tones = self.judge(images)
        figures: dict[str, float] = {}
        for name, values in measures(images, digits, wanted_digits(prompts), tones).items():
            figures[name] = float(values.mean())
            figures[f"{name}_error"] = float(values.std() / len(values) ** 0.5)
        return figures

    @torch.no_grad()
    def of_tones(self, num_pictures: int) -> float:
        """Accuracy of tones where prompts name one, which no reward knows."""
        named = [prompt_of(digit, tone, HELD_OUT_OPENING) for tone in TONES for digit in range(len(DIGITS))]
        found = self.judge(self._pictures(named, num_pictures)[0])[1].argmax(1)
        wanted = torch.arange(len(TONES)).repeat_interleave(len(found) // len(TONES))
        return float((found == wanted).float().mean())

    @torch.no_grad()
    def samples(self, rows: int = 4) -> Tensor:
        """Pictures of each digit, `(rows, 10, 8, 8, 3)`, from the same noise for all models."""
        prompts = [prompt_of(digit, opening=HELD_OUT_OPENING) for digit in range(len(DIGITS))]
        images = self._pictures(prompts, rows)[0]
        return cast(Tensor, images.unflatten(0, (-1, rows)).transpose(0, 1).permute(0, 1, 3, 4, 2).contiguous())

    def _pictures(self, prompts: list[str], count: int) -> tuple[Tensor, list[str]]:
        condition = self.policy.repeat(self.policy.prompt_condition(prompts), count)
        generator = torch.Generator().manual_seed(self.seed)
        images, repeated, _ = self.policy.decode(self.policy.sample(condition, generator=generator), condition)
        return images, repeated


def measures(images: Tensor, digits: Tensor, wanted: Tensor, tones: Tensor) -> dict[str, Tensor]:
    """Accuracy and brightness of each picture, parity distance of each 16, by log-probabilities of digits and tones."""
    histograms = F.one_hot(tones.argmax(1), len(TONES)).float().unflatten(0, (-1, min(GROUP, len(tones)))).mean(1)
    return {
        "accuracy": (digits.argmax(1) == wanted).float(),
        "parity_distance": torch.linalg.vector_norm(histograms - 1 / len(TONES), dim=1),
        "brightness": images.mean((1, 2, 3)).clamp(max=BRIGHTEST),
    }


def wanted_digits(prompts: list[str]) -> Tensor:
    """The digit that each prompt ends with."""
    return torch.tensor([DIGITS.index(prompt.split()[-1]) for prompt in prompts])


@torch.no_grad()
def denoising_loss_on(policy: TextToImagePolicy, data: DigitPictures) -> float:
    """Mean squared error of the network's output on real pictures, with the same noise at every call."""
    x0, condition = policy.encode_images(data.images), policy.prompt_condition(data.prompts)
    generator = torch.Generator().manual_seed(0)
    levels = policy.scheduler.sample_timesteps(len(x0), generator)
    noise = torch.randn(x0.shape, generator=generator)
    with policy.unguided():
        output = policy.predict(policy.scheduler.add_noise(x0, noise, levels), levels, condition)
    return float(F.mse_loss(output, policy.scheduler.training_target(x0, noise, levels)))


def digit_rewards(reader: DigitClassifier) -> dict[str, Reward]:
    """The rewards of `REWARDS` by a classifier."""

    def text(images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
        return cast(Tensor, reader(images)[0].gather(1, wanted_digits(prompts)[:, None])[:, 0].clamp(min=-5))

    def brightness(images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
        return images.mean((1, 2, 3)).clamp(max=BRIGHTEST)

    return {"text": text, "parity": digit_parity(reader, credit="leave_one_out"), "brightness": brightness}


def digit_parity(reader: DigitClassifier, *, credit: Any) -> Reward:
    """Parity of the tones among the pictures of a prompt."""
    return statistical_parity(
        lambda images, *_: reader(images)[1].exp(), credit=credit, group_by=lambda prompt, metadata: prompt
    )
