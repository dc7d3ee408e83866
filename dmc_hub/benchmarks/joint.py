"""Table 5 of arXiv:2401.12244 in miniature: one model for each reward, and one for all of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from dmc_hub.benchmarks.digits import (
    DIGITS,
    TONES,
    DigitClassifier,
    DigitPictures,
    digit_pictures,
    tiny_stable_diffusion,
    train_autoencoder,
    train_base,
    train_classifier,
)
from dmc_hub.image_rewards import JointReward, of_its_task, statistical_parity
from dmc_hub.text_to_image import PromptTasks, TextToImagePolicy, transition_scheduler
from dmc_hub.trainers.ddpo import DDPOConfig, DDPOTrainer
from dmc_hub.trainers.nft import NFTConfig, NFTTrainer

GROUP = 16
BRIGHTEST = 0.175
"""Mean of the brightest pictures of the data: more earns nothing, or black on white would earn most."""
JOINT_WEIGHTS = {"text": 2.0}
"""Parity and brightness are easier to gain."""
REWARDS = ("text", "parity", "brightness")
MEASURES = {"text": "accuracy", "parity": "parity_distance", "brightness": "brightness"}


@dataclass(frozen=True)
class JointMiniature:
    """Trains a base, a model for each reward, and joint models, and measures all of them.

    The rewards are: that a classifier reads the digit of the prompt (log-probability), parity of the four tones among
    the pictures of a prompt, and brightness up to that of the data's brightest. They are measured by a classifier that
    no reward knows.

    - `<reward> only` and `joint`: NFT, all rewards on every picture, each normalised by prompt and then summed, credit
      for parity by leaving one out.
    - `joint, Algorithm 1`: as arXiv:2401.12244: DDPO, tasks in turn, advantages and rewards relative to the batch,
      parity credited in common.
    - `parity, shared credit` and `parity, leave one out`: DDPO with the two credits, otherwise alike.

    All have the pretraining loss beside them and train the whole U-Net.

    Attributes:
        seed: of data, training and measurement.
        base_steps: of the U-Net's pretraining.
        iterations: samplings of each run, of 128 pictures.
        num_pictures: measured for each prompt, a multiple of 16.
    """

    seed: int = 0
    base_steps: int = 1000
    iterations: int = 40
    num_pictures: int = 64

    def run(self) -> dict[str, Any]:
        """Train and measure everything.

        Returns:
            `models`: by name, accuracy (of digits), tone_accuracy (where prompts name a tone), parity_distance (mean L2
            distance of 16 pictures' tones to uniform; about 0.2 for a uniform model), brightness, seconds; and
            `share_of_gain`: by name and measure, of the gain of the model trained for it alone; and the settings.
        """
        started = time.perf_counter()
        data = digit_pictures(self.seed)
        train, held_out = data.part(slice(0, 1200)), data.part(slice(1200, None))
        reader = train_classifier(train, steps=400, seed=self.seed + 1)
        judge = train_classifier(train, steps=400, seed=self.seed + 2)
        base = tiny_stable_diffusion(self.seed)
        train_autoencoder(base.vae, train.images, steps=max(25, self.base_steps // 4), seed=self.seed)
        train_base(base, train, steps=self.base_steps, seed=self.seed)
        models = {"base": {**self._measure(base, judge), "seconds": time.perf_counter() - started}}
        for name, make in self._runs(reader, train).items():
            started = time.perf_counter()
            pipeline = copy.deepcopy(base)
            make(pipeline)
            models[name] = {**self._measure(pipeline, judge), "seconds": time.perf_counter() - started}
        return {
            **vars(self),
            "judge_accuracy": float((judge(held_out.images)[0].argmax(1) == held_out.digits).float().mean()),
            "models": models,
            "share_of_gain": shares_of_gain(models),
        }

    def _runs(self, reader: DigitClassifier, data: DigitPictures) -> dict[str, Callable[[Any], None]]:
        functions = digit_rewards(reader)
        runs: dict[str, Callable[[Any], None]] = {}
        for name in REWARDS:
            runs[f"{name} only"] = partial(self._nft, functions={name: functions[name]}, data=data)
        runs["joint"] = partial(self._nft, functions=functions, data=data, weights=JOINT_WEIGHTS)
        shared = {**functions, "parity": digit_parity(reader, credit="shared")}
        runs["joint, Algorithm 1"] = lambda pipeline: self._algorithm_1(pipeline, shared, data)
        runs["parity, shared credit"] = lambda pipeline: self._ddpo(
            pipeline, data, shared["parity"], train_dataset=list(DIGITS)
        )
        runs["parity, leave one out"] = lambda pipeline: self._ddpo(
            pipeline, data, functions["parity"], train_dataset=list(DIGITS)
        )
        return runs

    def _nft(
        self,
        pipeline: Any,
        functions: Mapping[str, Any],
        data: DigitPictures,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        policy = TextToImagePolicy(
            pipeline, scheduler=transition_scheduler(pipeline.scheduler, eta=0.0), num_inference_steps=10
        )
        config = NFTConfig(
            **self._options(5 * self.iterations),
            per_device_train_batch_size=128,
            num_conditions=8,
            group_size=GROUP,
            steps_per_buffer=5,
            learning_rate=5e-4,
            reference_coefficient=0.0,
        )
        NFTTrainer(
            policy,
            config,
            train_dataset=list(DIGITS),
            reward_function=JointReward(functions, weights=weights),
            pretraining_dataset=data.rows(),
        ).train()

    def _algorithm_1(self, pipeline: Any, functions: Mapping[str, Any], data: DigitPictures) -> None:
        reward = JointReward(functions, applies=of_its_task, normalization="batch")
        tasks = PromptTasks({name: list(DIGITS) for name in functions})
        self._ddpo(pipeline, data, reward, train_dataset=tasks)

    def _ddpo(self, pipeline: Any, data: DigitPictures, reward: Any, *, train_dataset: Any) -> None:
        policy = TextToImagePolicy(pipeline, num_inference_steps=10)
        config = DDPOConfig(
            **self._options(5 * self.iterations),
            per_device_train_batch_size=128,
            group_size=GROUP,
            epochs_per_rollout=5,
            advantage_baseline="batch",
            advantage_scale="global",
            num_train_denoising_steps=2,
            learning_rate=2e-4,
            kl_coefficient=0.0,
        )
        DDPOTrainer(
            policy,
            config,
            train_dataset=train_dataset,
            reward_function=reward,
            pretraining_dataset=data.rows(),
        ).train()

    def _options(self, max_steps: int) -> dict[str, Any]:
        return {
            "max_steps": max_steps,
            "seed": self.seed,
            "lr_scheduler_type": "constant",
            "pretraining_coefficient": 1.0,
            "pretraining_batch_size": 64,
        }

    @torch.no_grad()
    def _measure(self, pipeline: StableDiffusionPipeline, judge: DigitClassifier) -> dict[str, float]:
        policy = TextToImagePolicy(
            pipeline, scheduler=transition_scheduler(pipeline.scheduler, eta=0.0), num_inference_steps=10
        )
        images = self._pictures(policy, list(DIGITS), self.num_pictures)
        digits, tones = judge(images)
        wanted = torch.arange(len(DIGITS)).repeat_interleave(self.num_pictures)
        named = [f"{tone} {digit}" for tone in TONES for digit in DIGITS]
        _, named_tones = judge(self._pictures(policy, named, max(1, self.num_pictures // 16)))
        wanted_tones = torch.arange(len(TONES)).repeat_interleave(len(named_tones) // len(TONES))
        histograms = torch.nn.functional.one_hot(tones.argmax(1), len(TONES)).float().unflatten(0, (-1, GROUP)).mean(1)
        return {
            "accuracy": float((digits.argmax(1) == wanted).float().mean()),
            "tone_accuracy": float((named_tones.argmax(1) == wanted_tones).float().mean()),
            "parity_distance": float(torch.linalg.vector_norm(histograms - 1 / len(TONES), dim=1).mean()),
            "brightness": float(images.mean((1, 2, 3)).clamp(max=BRIGHTEST).mean()),
        }

    def _pictures(self, policy: TextToImagePolicy, prompts: list[str], count: int) -> Tensor:
        condition = policy.repeat(policy.prompt_condition(prompts), count)
        generator = torch.Generator().manual_seed(self.seed)
        return policy.decode(policy.sample(condition, generator=generator), condition)[0]


def digit_rewards(reader: DigitClassifier) -> dict[str, Callable[..., Tensor]]:
    """The rewards of `REWARDS` by a classifier."""

    def text(images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
        wanted = torch.tensor([DIGITS.index(prompt.split()[-1]) for prompt in prompts])
        return reader(images)[0].gather(1, wanted[:, None])[:, 0].clamp(min=-5)

    def brightness(images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
        return images.mean((1, 2, 3)).clamp(max=BRIGHTEST)

    return {"text": text, "parity": digit_parity(reader, credit="leave_one_out"), "brightness": brightness}


def digit_parity(reader: DigitClassifier, *, credit: Any) -> Callable[..., Tensor]:
    """Parity of the tones among the pictures of a prompt."""
    return statistical_parity(
        lambda images, *_: reader(images)[1].exp(), credit=credit, group_by=lambda prompt, metadata: prompt
    )


def shares_of_gain(models: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Of every model's gain over the base in what the model of that reward alone has gained, by measure."""
    base, shares = models["base"], {}
    for name, measured in models.items():
        shares[name] = {
            measure: (measured[measure] - base[measure]) / (models[f"{reward} only"][measure] - base[measure])
            for reward, measure in MEASURES.items()
            if models[f"{reward} only"][measure] != base[measure]
        }
    return shares


def as_table(result: Mapping[str, Any]) -> str:
    """Markdown in the shape of Table 5: the models, what was measured, and shares of the single models' gains."""
    lines = [
        "| model | accuracy | named tones | parity distance | brightness | share of gain: text | parity | brightness |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["models"].items():
        shares = [result["share_of_gain"][name].get(measure) for measure in MEASURES.values()]
        texts = [f"{row[key]:.3f}" for key in ("accuracy", "tone_accuracy", "parity_distance", "brightness")]
        texts += ["–" if share is None else f"{100 * share:.0f} %" for share in shares]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"
