"""Image policies learn with their encoder, and are aligned on features that are computed once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dmc_hub import (
    Agent,
    AlignmentConfig,
    DenoisingConfig,
    DenoisingTrainer,
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    DiffusionPolicyPipeline,
    Episodes,
    IQLConfig,
    IQLTrainer,
    NFTConfig,
    NFTTrainer,
    OnlineConfig,
    SequentialAligner,
    TwinQCritic,
)
from dmc_hub.evaluation import evaluate
from dmc_hub.features import encode_episodes
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.models.vision_encoder import VisionEncoder
from dmc_hub.rollout import run_episodes
from dmc_hub.scheduler import TransitionScheduler

SIZE, LENGTH = 24, 6


def picture(target: float) -> np.ndarray:
    """A bright bar of 6 columns at the target in [-1, 1], on noise that says nothing."""
    image = np.full((SIZE, SIZE, 3), 40, np.uint8)
    left = round((target + 1) / 2 * (SIZE - 6))
    image[4:20, left : left + 6] = 220
    return image


class Seek(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """Go where the picture says; the state is the own position alone. The reward is minus the distance."""

    observation_space: gym.Space[Any] = gym.spaces.Dict(
        state=gym.spaces.Box(-np.inf, np.inf, (1,), np.float32),
        camera=gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8),
    )
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        self.position, self.target = self.np_random.uniform(-1, 1, 2)
        self.length = LENGTH - (0 if seed is None else seed % 2)
        self.t = 0
        return self._observation(), {}

    def _observation(self) -> dict[str, np.ndarray]:
        return {"state": np.array([self.position], np.float32), "camera": picture(self.target)}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        self.position = float(np.clip(self.position + np.clip(action[0], -1, 1), -1, 1))
        self.t += 1
        return self._observation(), -abs(self.position - self.target), False, self.t == self.length, {}


def environments(num_envs: int = 8) -> SyncVectorEnv:
    return SyncVectorEnv([Seek] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP)


@pytest.fixture(scope="module")
def demonstrations() -> Episodes:
    """Episodes of a demonstrator who goes half of the way to the target each step."""
    source = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {name: [] for name in ("states", "actions", "rewards", "following", "images")}
    for _ in range(60):
        position, target = source.uniform(-1, 1, 2)
        for _ in range(LENGTH):
            action = (target - position) / 2
            columns["states"].append([position])
            columns["images"].append(picture(target))
            columns["actions"].append([action])
            position += action
            columns["following"].append([position])
            columns["rewards"].append(-abs(position - target))
    states, actions, following = (np.array(columns[n], np.float32) for n in ("states", "actions", "following"))
    is_last = np.arange(len(states)) % LENGTH == LENGTH - 1
    return Episodes(
        observations=states,
        actions=actions,
        rewards=np.array(columns["rewards"], np.float32),
        next_observations=following,
        terminations=np.zeros(len(states), bool),
        truncations=is_last,
        episode_ends=np.flatnonzero(is_last) + 1,
        images={"camera": np.stack(columns["images"])},
    )


def make_policy(episodes: Episodes, *, num_observation_steps: int = 1) -> DiffusionPolicyPipeline:
    torch.manual_seed(0)
    encoder = VisionEncoder(
        ("camera",), depths=(1, 1), dims=(16, 32), num_keypoints=4, projection_dim=4, crop=(20, 20),
        image_mean=(0.5,) * 3, image_std=(0.5,) * 3,
    )  # fmt: skip
    width = 1 + encoder.feature_dim
    pipeline = DiffusionPolicyPipeline(
        DiffusionTransformer1D(1, num_observation_steps * width, dim=32, num_heads=2, depth=1, timestep_dim=16),
        TransitionScheduler(20, prediction_type="sample"),
        Normalizer.from_data(episodes.observations, episodes.actions, num_features=encoder.feature_dim),
        TwinQCritic(width, 1, hidden_dims=(32,)),
        encoder,
        horizon=2,
        num_observation_steps=num_observation_steps,
        num_inference_steps=4,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def config(**options: Any) -> DenoisingConfig:
    defaults = {"output_dir": None, "disable_tqdm": True, "max_steps": 6, "per_device_train_batch_size": 16}
    return DenoisingConfig(**{**defaults, "use_cpu": True, "logging_steps": 1, **options})


def state_of(pipeline: DiffusionPolicyPipeline) -> dict[str, torch.Tensor]:
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {f"{name}.{key}": value.clone() for name, part in parts.items() for key, value in part.state_dict().items()}


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> set[str]:
    """The components in which two states differ."""
    assert left.keys() == right.keys()
    return {name.partition(".")[0] for name in left if not torch.equal(left[name], right[name])}


@pytest.fixture(scope="module")
def trained(demonstrations: Episodes) -> tuple[DiffusionPolicyPipeline, float]:
    """A policy trained end to end, and its first loss."""
    pipeline = make_policy(demonstrations)
    trainer = DenoisingTrainer(
        pipeline,
        config(max_steps=250, per_device_train_batch_size=32, learning_rate=3e-3, ema_decay=0.95),
        train_dataset=demonstrations,
    )
    trainer.train()
    return pipeline, trainer.history[0]["loss"]


def mean_return(pipeline: DiffusionPolicyPipeline, **options: Any) -> float:
    settings = {"num_candidates": 1, "action_selection": "greedy", **options}
    return evaluate(Agent(pipeline), environments(), seeds=range(32), **settings).statistics.mean


def test_a_policy_learns_to_see(demonstrations: Episodes, trained: tuple[DiffusionPolicyPipeline, float]) -> None:
    """Going to 0, the best without sight, earns about -0.5 a step; the demonstrator about -0.1."""
    pipeline, _ = trained
    untrained = mean_return(make_policy(demonstrations))
    sees = mean_return(pipeline)
    blind = copy_of(pipeline, demonstrations)
    with torch.no_grad():
        for parameter in blind.vision_encoder.parameters():
            parameter.zero_()
    assert sees > -1.4
    assert untrained < -2.2
    assert mean_return(blind) < -2.2


def copy_of(pipeline: DiffusionPolicyPipeline, episodes: Episodes) -> DiffusionPolicyPipeline:
    copied = make_policy(episodes)
    for name, part in copied.components.items():
        if isinstance(part, nn.Module):
            part.load_state_dict(pipeline.components[name].state_dict())
    return copied


def test_gradients_reach_the_encoder_and_average_weights_too(demonstrations: Episodes) -> None:
    states = {}
    for decay in (None, 0.9):
        pipeline = make_policy(demonstrations, num_observation_steps=2)
        before = state_of(pipeline)
        DenoisingTrainer(pipeline, config(ema_decay=decay), train_dataset=demonstrations).train()
        states[decay] = state_of(pipeline)
        assert differing(before, states[decay]) == {"denoiser", "vision_encoder"}
    assert differing(states[None], states[0.9]) == {"denoiser", "vision_encoder"}


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9, "gradient_accumulation_steps": 2}])
def test_a_resumed_run_equals_an_uninterrupted_one(
    demonstrations: Episodes, tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = make_policy(demonstrations, num_observation_steps=2)
    DenoisingTrainer(whole, config(**options), train_dataset=demonstrations).train()
    saving = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, **options}
    first = make_policy(demonstrations, num_observation_steps=2)
    DenoisingTrainer(first, config(**saving), train_dataset=demonstrations, callbacks=[StopAt(5)]).train()
    assert differing(state_of(whole), state_of(first))
    names = {path.parent.name for path in (tmp_path / "checkpoint-4").glob("*/*.safetensors")}
    assert names == {"denoiser", "vision_encoder"}
    resumed = make_policy(demonstrations, num_observation_steps=2)
    trainer = DenoisingTrainer(resumed, config(**saving), train_dataset=demonstrations)
    trainer.train(resume_from_checkpoint=True)
    assert not differing(state_of(whole), state_of(resumed))


def test_crops_are_random_and_a_function_of_the_seed(demonstrations: Episodes) -> None:
    def batch(seed: int) -> dict[str, torch.Tensor]:
        trainer = DenoisingTrainer(make_policy(demonstrations), config(seed=seed), train_dataset=demonstrations)
        return trainer.make_batch(torch.Generator().manual_seed(seed))

    first = batch(0)
    assert first["images/camera"].dtype == torch.uint8
    assert first["crop_offsets"].shape == (16, 1, 1, 2)
    assert len(first["crop_offsets"].unique()) == 5  # 0 to 4
    assert all(torch.equal(first[name], value) for name, value in batch(0).items())
    assert not torch.equal(batch(1)["crop_offsets"], first["crop_offsets"])


def test_cached_features_are_those_of_acting_bit_for_bit(
    demonstrations: Episodes, trained: tuple[DiffusionPolicyPipeline, float]
) -> None:
    pipeline, _ = trained
    order = np.random.default_rng(0).permutation(demonstrations.num_steps)  # so that pictures differ in an episode
    shuffled = {"camera": demonstrations.images["camera"][order]}
    demonstrations = dataclasses.replace(demonstrations, images=shuffled)
    cached = encode_episodes(pipeline, demonstrations)
    assert cached.images == {}
    assert cached.observation_dim == pipeline.observation_dim
    np.testing.assert_array_equal(cached.observations[:, :1], demonstrations.observations)
    np.testing.assert_array_equal(cached.next_observations[:, :1], demonstrations.next_observations)
    inside = np.flatnonzero(~demonstrations.truncations)
    np.testing.assert_array_equal(cached.next_observations[inside, 1:], cached.observations[inside + 1, 1:])
    last = demonstrations.episode_ends - 1
    np.testing.assert_array_equal(cached.next_observations[last, 1:], cached.observations[last, 1:])
    for row in (0, 7, 100):
        seen = {"state": demonstrations.observations[row], "camera": demonstrations.images["camera"][row]}
        assert np.ptp(cached.observations[:, 1:], axis=0).max() > 0.1
        np.testing.assert_array_equal(pipeline.observation_vectors(seen).numpy(), cached.observations[row])
        np.testing.assert_array_equal(
            pipeline(seen, num_candidates=3, generator=0).candidates,
            pipeline(cached.observations[row], num_candidates=3, generator=0).candidates,
        )


def test_rollouts_keep_what_was_seen(trained: tuple[DiffusionPolicyPipeline, float]) -> None:
    """What was recorded and encoded are the vectors that the policy acted on."""
    pipeline, _ = trained
    acted: dict[int, list[np.ndarray]] = {}

    def controller(observations: Any, generator: Any) -> np.ndarray:
        vectors = pipeline.observation_vectors(observations).numpy()
        for env, vector in enumerate(vectors):
            acted.setdefault(env, []).append(vector)
        return pipeline(observations, generator=generator).action

    rollouts = run_episodes(controller, environments(3), seeds=[1, 4, 5], record_images=True)
    np.testing.assert_array_equal(rollouts.lengths, [LENGTH - 1, LENGTH, LENGTH - 1])
    episodes = encode_episodes(pipeline, rollouts.to_episodes())
    expected = np.concatenate([np.stack(acted[env][:length]) for env, length in enumerate(rollouts.lengths)])
    np.testing.assert_array_equal(episodes.observations, expected)
    without = run_episodes(controller, environments(3), seeds=[1, 4, 5])
    assert without.images == {}
    assert without.observations.shape == (3, LENGTH, 1)


class Blind(Seek):
    observation_space: gym.Space[Any] = gym.spaces.Dict(camera=gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8))


class Loud(Seek):
    observation_space: gym.Space[Any] = gym.spaces.Dict(
        state=gym.spaces.Box(-np.inf, np.inf, (1,), np.float32), sound=gym.spaces.Box(-1, 1, (5,), np.float32)
    )


@pytest.mark.parametrize("environment", [Blind, Loud])
def test_environments_without_a_state_or_with_other_senses_are_refused(environment: Callable[[], Seek]) -> None:
    vector_env = SyncVectorEnv([environment] * 2, autoreset_mode=AutoresetMode.NEXT_STEP)
    with pytest.raises(ValueError, match="must have observations of one `state` and of uint8 images"):
        run_episodes(lambda observations, generator: np.zeros((2, 1)), vector_env, seeds=[0])


def test_adapters_and_critics_are_trained_on_a_frozen_encoder(
    demonstrations: Episodes, trained: tuple[DiffusionPolicyPipeline, float]
) -> None:
    """Given images, or the features of `encode_episodes`: the same."""
    settings: dict[str, Any] = {"output_dir": None, "disable_tqdm": True, "max_steps": 2, "use_cpu": True}
    few: dict[str, Any] = {"num_conditions": 8, "num_candidates": 4, "per_device_train_batch_size": 8}

    def run(data: str, build: Callable[[DiffusionPolicyPipeline, Episodes], Any]) -> dict[str, torch.Tensor]:
        pipeline = copy_of(trained[0], demonstrations)
        build(pipeline, demonstrations if data == "images" else encode_episodes(pipeline, demonstrations)).train()
        return state_of(pipeline)

    lora = {"peft_config": LoraConfig(r=2)}
    builders: dict[str, Callable[[Any, Any], Any]] = {
        "critic": lambda p, e: IQLTrainer(p, IQLConfig(**settings), train_dataset=e),
        "dpo": lambda p, e: DiffusionDPOTrainer(p, DiffusionDPOConfig(**settings, **few), train_dataset=e, **lora),
        "nft": lambda p, e: NFTTrainer(p, NFTConfig(**settings), train_dataset=e, **lora),
        "denoising": lambda p, e: DenoisingTrainer(p, DenoisingConfig(**settings), train_dataset=e, **lora),
    }
    before = state_of(trained[0])
    for name, build in builders.items():
        images, features = (run(data, build) for data in ("images", "features"))
        assert not differing(images, features), name
        kept = {key: value for key, value in images.items() if key in before}
        assert differing(kept, {key: before[key] for key in kept}) == ({"critic"} if name == "critic" else set()), name
        adapted = [value for key, value in images.items() if "lora_B" in key]
        assert (name == "critic") == (not adapted)
        assert name == "critic" or any(value.any() for value in adapted), name


def test_alignment_by_a_reward_on_what_is_seen(
    demonstrations: Episodes, trained: tuple[DiffusionPolicyPipeline, float]
) -> None:
    """Alignment with collected episodes; images are encoded once for all stages."""
    pipeline = copy_of(trained[0], demonstrations)
    encoded: list[int] = []
    pipeline.vision_encoder.register_forward_hook(lambda module, args, output: encoded.append(len(args[0])))
    before = state_of(pipeline)
    settings: dict[str, Any] = {"output_dir": None, "disable_tqdm": True, "max_steps": 2, "use_cpu": True}
    aligner = SequentialAligner(
        pipeline,
        AlignmentConfig(methods=["nft", "dpo"], max_passes=1, validations_per_stage=1, max_return_drop=10.0),
        train_dataset=demonstrations,
        validate=lambda p: {"return_mean": 1.0, "return_std": 0.0},
        online=OnlineConfig(num_episodes=8),
        make_env=environments,
        critic_config=IQLConfig(**settings),
        stage_configs={
            "nft": NFTConfig(**settings),
            "dpo": DiffusionDPOConfig(**settings, num_conditions=8, num_candidates=4, per_device_train_batch_size=8),
        },
    )
    assert sum(encoded) == demonstrations.num_steps
    aligner.run()
    assert aligner.collector is not None
    collected = aligner.collector.episodes
    assert collected.observation_dim == pipeline.observation_dim
    assert collected.num_episodes == demonstrations.num_episodes + 8
    after = state_of(pipeline)
    kept = {key: value for key, value in after.items() if key in before and not key.startswith("critic")}
    assert not differing(kept, {key: before[key] for key in kept})


def test_data_that_do_not_fit_are_refused(demonstrations: Episodes) -> None:
    pipeline = make_policy(demonstrations)
    other = dataclasses.replace(demonstrations, images={"wrist": demonstrations.images["camera"]})
    wide = dataclasses.replace(
        demonstrations,
        observations=np.repeat(demonstrations.observations, 2, 1),
        next_observations=np.repeat(demonstrations.next_observations, 2, 1),
    )
    bare = dataclasses.replace(demonstrations, images={})
    for data, message in (
        (other, "no images of the cameras camera that the policy sees, only of wrist"),
        (wide, "states of width 2 beside their images, but the policy's are of width 1"),
        (bare, "observations of width 1, but the pipeline is for width 5"),
    ):
        with pytest.raises(ValueError, match=message):
            DenoisingTrainer(pipeline, config(), train_dataset=data)
        with pytest.raises(ValueError, match=message):
            IQLTrainer(pipeline, IQLConfig(output_dir=None, use_cpu=True), train_dataset=data)
