"""Table 5 of arXiv:2401.12244 in miniature: one model for each reward, one for all of them, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

from dmc_hub import checkpoint
from dmc_hub.benchmarks.digits import (
    DIGITS,
    OPENINGS,
    TONES,
    DigitClassifier,
    DigitPictures,
    digit_pictures,
    load_foundation,
    prompt_of,
    save_foundation,
    tiny_stable_diffusion,
    train_autoencoder,
    train_base,
    train_classifier,
)
from dmc_hub.image_rewards import statistical_parity
from dmc_hub.joint_reward import JointReward
from dmc_hub.text_to_image import TextToImagePolicy, transition_scheduler
from dmc_hub.trainers.ddpo import DDPOConfig, DDPOTrainer
from dmc_hub.trainers.nft import NFTConfig, NFTTrainer

GROUP = 16
BRIGHTEST = 0.175
"""Mean of the brightest pictures of the data: more earns nothing, or black on white would earn most."""
JOINT_WEIGHTS = {"text": 2.0, "parity": 1.0, "brightness": 1.5}
PRETRAINING = 0.15
"""Weight of the pretraining loss."""
REWARDS = ("text", "parity", "brightness")
MEASURES = {"text": "accuracy", "parity": "parity_distance", "brightness": "brightness"}
HELD_OUT_OPENING = OPENINGS[-1]
TRAINED_PROMPTS = [prompt_of(digit, opening=opening) for opening in OPENINGS[:-1] for digit in range(len(DIGITS))]

Reward = Callable[..., Tensor]


class Recording:
    """Counts the network's evaluations of a run, and keeps what its batches of samples were worth.

    Attributes:
        curve: for each batch, `evaluations` of the network on one sample until it was complete, `images` until then,
            and the batch's accuracy, parity distance and brightness by the classifier that rewards.
    """

    def __init__(self, network: torch.nn.Module, reader: DigitClassifier) -> None:
        self.reader = reader
        self.curve: list[dict[str, float]] = []
        self.evaluations = 0
        self._images = 0
        self._hook = network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, network: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.evaluations += len(arguments[0])

    def watch(self, reward: Reward) -> Reward:
        """The reward function, with its batches noted."""

        def watched(images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
            self._images += len(images)
            digits, tones = self.reader(images)
            measured = measures(images, digits, wanted_digits(prompts), tones)
            means = {name: float(values.mean()) for name, values in measured.items()}
            self.curve.append({"evaluations": self.evaluations, "images": self._images, **means})
            return reward(images, prompts, metadata)

        return watched

    def start(self) -> None:
        """Forget what was before training."""
        self.curve.clear()
        self.evaluations = self._images = 0

    def stop(self) -> None:
        """Take the counter off the network."""
        self._hook.remove()


@dataclass(frozen=True)
class JointMiniature:
    """Trains a base, a model for each reward, and joint models, and measures all of them.

    The rewards are: that a classifier reads the digit of the prompt (log-probability), parity of the four tones among
    the pictures of a prompt, and brightness up to that of the data's brightest. They are measured by a classifier that
    no reward knows, on wordings that the base has seen and the alignment has not.

    - `<reward> only` and `joint`: NFT, all rewards on every picture, each normalised by prompt and then summed, credit
      for parity by leaving one out, with the pretraining loss.
    - `joint, no pretraining loss`: the same without it.
    - `joint, <normalisation>` and `joint, min_norm`, if asked for: the same with another normalisation, or weights that
      follow the rewards' conflicts.
    - `parity, leave one out` and `parity, shared credit`: DDPO with the two credits, otherwise alike.
    - `brightness, paper's recipe`: DDPO as in arXiv:2401.12244: 50 steps, guidance in sampling and training, 5 random
      steps and one update for each batch, clip range 1e-4 on the mean log-probability.

    All train the whole U-Net. The settings were chosen with seed 100 on the wordings that alignment sees.

    Attributes:
        seed: of data, training and measurement.
        base_steps: of the U-Net's pretraining.
        iterations: samplings of each NFT run, of 128 pictures.
        credit_iterations: likewise of the two DDPO runs that compare credits.
        recipe_iterations: of the paper's recipe, of which each costs as much as five of the others.
        num_pictures: measured for each prompt, a multiple of 16.
        ablate: whether the joint models with other normalisations and weights are wanted.
    """

    seed: int = 0
    base_steps: int = 550
    iterations: int = 40
    credit_iterations: int = 12
    recipe_iterations: int = 12
    num_pictures: int = 64
    ablate: bool = False

    def run(self, name: str, folder: Path) -> dict[str, Any]:
        """Train and measure one model, or find what was measured before.

        Args:
            name: `"base"` or one of `names`.
            folder: of this seed and these settings: keeps the base, which is trained first, the figures, and samples.

        Returns:
            What `_measure` says, for all but the base with `seconds` of the processor, `evaluations` of the network on
            one sample in training, and the `curve` of `Recording`.
        """
        path = folder / f"{name}.json"
        if path.is_file():
            return cast(dict[str, Any], checkpoint.load_json(path))
        folder.mkdir(parents=True, exist_ok=True)
        data = digit_pictures(self.seed)
        train, held_out = data.part(slice(0, 1200)), data.part(slice(1200, None))
        pipeline, reader, judge = self._foundation(train, folder / "foundation.safetensors")
        cost: dict[str, Any] = {}
        if name != "base":
            recording, started = Recording(pipeline.unet, reader), time.process_time()
            trainer = self._runs(reader, train)[name](pipeline, recording.watch)
            recording.start()
            trainer.train()
            recording.stop()
            cost = {"seconds": time.process_time() - started, "evaluations": recording.evaluations}
            cost["curve"] = recording.curve
        figures = {**self._measure(pipeline, judge, held_out), **cost}
        figures["judge_accuracy"] = float((judge(held_out.images)[0].argmax(1) == held_out.digits).float().mean())
        checkpoint.save_tensors(folder / f"{name}.safetensors", {"images": self._samples(pipeline)})
        checkpoint.save_json(path, figures)
        return figures

    def _foundation(self, data: DigitPictures, path: Path) -> tuple[Any, DigitClassifier, DigitClassifier]:
        """The base, the classifier that rewards and the one that measures; trained unless they are in the file."""
        pipeline = tiny_stable_diffusion(self.seed)
        if not path.is_file():
            reader = train_classifier(data, steps=400, seed=self.seed + 1)
            judge = train_classifier(data, steps=400, seed=self.seed + 2)
            train_autoencoder(pipeline.vae, data.images, steps=max(25, self.base_steps * 9 // 20), seed=self.seed)
            train_base(pipeline, data, steps=self.base_steps, seed=self.seed)
            save_foundation(path, pipeline, reader, judge)
        return load_foundation(path, pipeline)

    @property
    def names(self) -> list[str]:
        """The models that are trained from the base."""
        nothing = digit_pictures(self.seed).part(slice(0, 1))
        return list(self._runs(DigitClassifier(), nothing))

    def _runs(self, reader: DigitClassifier, data: DigitPictures) -> dict[str, Callable[[Any, Any], Any]]:
        functions = digit_rewards(reader)
        shared = digit_parity(reader, credit="shared")
        runs: dict[str, Callable[[Any, Any], Any]] = {}
        for name in REWARDS:
            runs[f"{name} only"] = partial(self._nft, rewards={name: functions[name]}, data=data)
        joint = partial(self._nft, rewards=functions, data=data, weights=JOINT_WEIGHTS)
        runs["joint"] = joint
        runs["joint, no pretraining loss"] = partial(joint, pretraining_coefficient=0.0)
        if self.ablate:
            for normalization in ("group", "running", "moving", "batch"):
                runs[f"joint, {normalization}"] = partial(joint, normalization=normalization)
            runs["joint, min_norm"] = partial(joint, weights=None, weighting="min_norm")
        runs["parity, leave one out"] = partial(self._ddpo, reward=functions["parity"], data=data)
        runs["parity, shared credit"] = partial(self._ddpo, reward=shared, data=data)
        runs["brightness, paper's recipe"] = partial(self._paper, reward=functions["brightness"], data=data)
        return runs

    def _nft(
        self,
        pipeline: Any,
        watch: Callable[[Reward], Reward],
        *,
        rewards: Mapping[str, Reward],
        data: DigitPictures,
        weights: Mapping[str, float] | None = None,
        pretraining_coefficient: float = PRETRAINING,
        **options: Any,
    ) -> NFTTrainer:
        config = NFTConfig(
            **self._options(5 * self.iterations),
            pretraining_coefficient=pretraining_coefficient,
            num_conditions=8,
            group_size=GROUP,
            steps_per_buffer=5,
            learning_rate=1e-3,
            beta=0.5,
            reference_coefficient=0.0,
        )
        policy = TextToImagePolicy(
            pipeline, scheduler=transition_scheduler(pipeline.scheduler, eta=0.0), num_inference_steps=10
        )
        reward = watch(JointReward(rewards, weights=weights, **options))
        return NFTTrainer(
            policy, config, train_dataset=TRAINED_PROMPTS, reward_function=reward, pretraining_dataset=data.rows()
        )

    def _ddpo(self, pipeline: Any, watch: Callable[[Reward], Reward], *, reward: Reward, data: DigitPictures) -> Any:
        config = DDPOConfig(
            **self._options(5 * self.credit_iterations),
            **_COMPARED_WITH_ALL,
            pretraining_coefficient=PRETRAINING,
            epochs_per_rollout=5,
            num_train_denoising_steps=2,
            learning_rate=2e-4,
        )
        return DDPOTrainer(
            TextToImagePolicy(pipeline, num_inference_steps=10),
            config,
            train_dataset=TRAINED_PROMPTS,
            reward_function=watch(reward),
            pretraining_dataset=data.rows(),
        )

    def _paper(self, pipeline: Any, watch: Callable[[Reward], Reward], *, reward: Reward, data: DigitPictures) -> Any:
        config = DDPOConfig(
            **self._options(self.recipe_iterations),
            **_COMPARED_WITH_ALL,
            pretraining_coefficient=PRETRAINING,
            num_train_denoising_steps=5,
            credit="uniform",
            clip_range=1e-4,
            clip_unit="entry",
            learning_rate=1e-3,
        )
        return DDPOTrainer(
            TextToImagePolicy(pipeline, num_inference_steps=50, guidance_scale=3.0),
            config,
            train_dataset=TRAINED_PROMPTS,
            reward_function=watch(reward),
            pretraining_dataset=data.rows(),
        )

    def _options(self, max_steps: int) -> dict[str, Any]:
        return {
            "max_steps": max_steps,
            "seed": self.seed,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 128,
            "pretraining_batch_size": 32,
        }

    @torch.no_grad()
    def _measure(
        self, pipeline: StableDiffusionPipeline, judge: DigitClassifier, held_out: DigitPictures
    ) -> dict[str, float]:
        """Accuracy of digits, parity_distance (mean L2 distance of 16 pictures' tones to uniform, about 0.2 for a
        uniform model), brightness, the standard error of each (`<measure>_error`), tone_accuracy (where prompts name a
        tone, which no reward knows) and denoising_loss (of pictures that nothing was trained on)."""
        policy = TextToImagePolicy(
            pipeline, scheduler=transition_scheduler(pipeline.scheduler, eta=0.0), num_inference_steps=10
        )
        plain = [prompt_of(digit, opening=HELD_OUT_OPENING) for digit in range(len(DIGITS))]
        images, prompts = self._pictures(policy, plain, self.num_pictures)
        digits, tones = judge(images)
        figures: dict[str, float] = {}
        for name, values in measures(images, digits, wanted_digits(prompts), tones).items():
            figures[name] = float(values.mean())
            figures[f"{name}_error"] = float(values.std() / len(values) ** 0.5)
        named = [prompt_of(digit, tone, HELD_OUT_OPENING) for tone in TONES for digit in range(len(DIGITS))]
        found = judge(self._pictures(policy, named, max(1, self.num_pictures // 16))[0])[1].argmax(1)
        wanted = torch.arange(len(TONES)).repeat_interleave(len(found) // len(TONES))
        figures["tone_accuracy"] = float((found == wanted).float().mean())
        return {**figures, "denoising_loss": denoising_loss_on(policy, held_out)}

    @torch.no_grad()
    def _samples(self, pipeline: StableDiffusionPipeline, rows: int = 4) -> Tensor:
        """Pictures of each digit, `(rows, 10, 8, 8, 3)`, from the same noise for all models."""
        policy = TextToImagePolicy(
            pipeline, scheduler=transition_scheduler(pipeline.scheduler, eta=0.0), num_inference_steps=10
        )
        prompts = [prompt_of(digit, opening=HELD_OUT_OPENING) for digit in range(len(DIGITS))]
        images = self._pictures(policy, prompts, rows)[0]
        return cast(Tensor, images.unflatten(0, (-1, rows)).transpose(0, 1).permute(0, 1, 3, 4, 2).contiguous())

    def _pictures(self, policy: TextToImagePolicy, prompts: list[str], count: int) -> tuple[Tensor, list[str]]:
        condition = policy.repeat(policy.prompt_condition(prompts), count)
        generator = torch.Generator().manual_seed(self.seed)
        images, repeated, _ = policy.decode(policy.sample(condition, generator=generator), condition)
        return images, repeated


_COMPARED_WITH_ALL: dict[str, Any] = {
    "group_size": GROUP,
    "advantage_baseline": "batch",
    "advantage_scale": "global",
    "kl_coefficient": 0.0,
}


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
