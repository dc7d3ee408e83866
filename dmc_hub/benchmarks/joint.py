"""Table 5 of arXiv:2401.12244 in miniature: one model for each reward, one for all of them, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from dmc_hub import checkpoint
from dmc_hub.benchmarks.digits import (
    DIGITS,
    OPENINGS,
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
from dmc_hub.benchmarks.joint_measures import (
    GROUP,
    MEASURES,
    DigitMeasures,
    Recording,
    Reward,
    denoising_loss_on,
    digit_parity,
    digit_rewards,
)
from dmc_hub.joint_reward import JointReward
from dmc_hub.text_to_image import TextToImagePolicy, transition_scheduler
from dmc_hub.trainers.ddpo import DDPOConfig, DDPOTrainer
from dmc_hub.trainers.nft import NFTConfig, NFTTrainer

JOINT_WEIGHTS = {"text": 2.25, "parity": 1.5, "brightness": 1.25}
PRETRAINING = 0.1
"""Weight of the pretraining loss."""
TRAINED_PROMPTS = [prompt_of(digit, opening=opening) for opening in OPENINGS[:-1] for digit in range(len(DIGITS))]


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

    The models whose costs are compared are measured during training. All train the whole U-Net. The settings were
    chosen with seeds 100 and 101 on the wordings that alignment sees.

    Attributes:
        seed: of data, training and measurement.
        base_steps: of the U-Net's pretraining.
        iterations: samplings, of 128 pictures, of each NFT run for one reward.
        joint_iterations: likewise of the joint models, which half of what the three single models take has to be enough
            for.
        credit_iterations: likewise of the two DDPO runs that compare credits.
        recipe_iterations: of the paper's recipe, of which each costs as much as five of the others.
        num_pictures: measured for each prompt, a multiple of 16.
        ablate: whether the joint models with other normalisations and weights are wanted.
    """

    seed: int = 0
    base_steps: int = 550
    iterations: int = 40
    joint_iterations: int = 60
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
            What `DigitMeasures` says, `denoising_loss` on pictures that nothing was trained on, and for all but the
            base `seconds` of the processor, `evaluations` of the network on one sample in training, and the `curve` of
            `Recording`.
        """
        path = folder / f"{name}.json"
        if path.is_file():
            return cast(dict[str, Any], checkpoint.load_json(path))
        folder.mkdir(parents=True, exist_ok=True)
        data = digit_pictures(self.seed)
        train, held_out = data.part(slice(0, 1200)), data.part(slice(1200, None))
        pipeline, reader, judge = self._foundation(train, folder / "foundation.safetensors")
        found = DigitMeasures(pipeline, judge, seed=self.seed)
        cost: dict[str, Any] = {}
        if name != "base":
            run = self._runs(reader, train)[name]
            measure = partial(found.of_rewards, 2 * GROUP if name.startswith("parity,") else GROUP)
            recording = Recording(pipeline.unet, measure, every=_measured_every(name))
            trainer, started = run(pipeline, recording.watch), time.process_time()
            trainer.add_callback(recording)
            trainer.train()
            cost = {"seconds": time.process_time() - started, "evaluations": recording.evaluations}
            cost["curve"] = recording.curve
        figures = {**found.of_rewards(self.num_pictures), **cost}
        figures["tone_accuracy"] = found.of_tones(max(1, self.num_pictures // 16))
        figures["denoising_loss"] = denoising_loss_on(found.policy, held_out)
        figures["judge_accuracy"] = float((judge(held_out.images)[0].argmax(1) == held_out.digits).float().mean())
        checkpoint.save_tensors(folder / f"{name}.safetensors", {"images": found.samples()})
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
        for name in MEASURES:
            runs[f"{name} only"] = partial(self._nft, rewards={name: functions[name]}, data=data)
        joint = partial(
            self._nft, rewards=functions, data=data, weights=JOINT_WEIGHTS, iterations=self.joint_iterations
        )
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
        iterations: int | None = None,
        **options: Any,
    ) -> NFTTrainer:
        config = NFTConfig(
            **self._options(5 * (iterations or self.iterations)),
            pretraining_coefficient=pretraining_coefficient,
            lr_scheduler_type="linear",
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
            "per_device_train_batch_size": 128,
            "pretraining_batch_size": 32,
        }


_COMPARED_WITH_ALL: dict[str, Any] = {
    "group_size": GROUP,
    "advantage_baseline": "batch",
    "advantage_scale": "global",
    "kl_coefficient": 0.0,
}


def _measured_every(name: str) -> int:
    """Optimizer steps, which are one batch of samples or two; 0 for models that no race is about."""
    if name.endswith("paper's recipe"):
        return 1
    return 5 if name.startswith("parity,") or name == "brightness only" else 0
