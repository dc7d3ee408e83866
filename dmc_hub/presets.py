"""Sizes and settings of the reference runs: plain functions, so that a run is one call and a change is one argument."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from dmc_hub.data import Episodes
from dmc_hub.models.critic import TwinQCritic
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.models.inverse_dynamics import InverseDynamics
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.models.temporal_unet import TemporalUnet
from dmc_hub.models.vision_encoder import VisionEncoder
from dmc_hub.pipelines import DiffuserPlannerPipeline, DiffusionPolicyPipeline
from dmc_hub.scheduler import TransitionScheduler
from dmc_hub.tasks import Task
from dmc_hub.trainers.alignment import METHODS
from dmc_hub.trainers.cascade import CascadeConfig
from dmc_hub.trainers.denoising import DenoisingConfig
from dmc_hub.trainers.iql import IQLConfig
from dmc_hub.trainers.sampling import SamplingConfig

CONTROLLERS = ("planner", "decision_diffuser", "policy")
SAMPLERS: dict[str, tuple[dict[str, Any], int]] = {
    "ddpm": ({"schedule": "cosine", "prediction_type": "sample", "eta": 1.0}, 10),
    "ddim": ({"schedule": "cosine", "prediction_type": "sample", "eta": 0.0}, 5),
    "sm": ({"schedule": "variance_exploding", "prediction_type": "v_prediction", "eta": 1.0}, 10),
    "fm": ({"schedule": "flow", "prediction_type": "velocity", "eta": 1.0}, 10),
}
"""Settings of `TransitionScheduler` and inference steps of the paper's four samplers: DDPM, DDIM, score matching (an
exploding variance, whose v prediction is EDM's preconditioning) and flow matching. DDIM is deterministic."""


@dataclass(frozen=True)
class Preset:
    """Everything one reference run needs.

    Attributes:
        build_pipeline: `(episodes, seed) -> pipeline` with untrained networks and fitted statistics.
        foundation: settings of `DenoisingTrainer` that differ from its defaults; likewise `critic` of `IQLTrainer`.
        methods: alignment methods of one pass.
        stages: settings of each method that differ from its defaults; `cascade` those of `CascadeTrainer`.
        num_candidates: candidates per decision when the controller is evaluated, as in the paper's tables.
        num_evaluation_episodes: episodes of the reported figures; likewise `num_validation_episodes` after each stage.
        max_coherency_drop: share of the foundation's coherency that alignment may cost.
        num_threads: torch's threads on a CPU: networks this small gain nothing from a second one, and on a busy machine
            its waiting costs a hundredfold.
    """

    build_pipeline: Callable[[Episodes, int], Any]
    foundation: dict[str, Any]
    critic: dict[str, Any]
    methods: tuple[str, ...]
    stages: dict[str, dict[str, Any]]
    num_candidates: int
    num_evaluation_episodes: int = 128
    num_validation_episodes: int = 64
    cascade: dict[str, Any] = field(default_factory=dict)
    max_coherency_drop: float = 0.1
    num_threads: int = 1

    def foundation_config(self, **overrides: Any) -> DenoisingConfig:
        """Config of foundation training."""
        return DenoisingConfig(**{"output_dir": None, **self.foundation, **overrides})

    def critic_config(self, **overrides: Any) -> IQLConfig:
        """Config of the critic's training."""
        return IQLConfig(**{"output_dir": None, **self.critic, **overrides})

    def stage_configs(self, **overrides: Any) -> dict[str, SamplingConfig]:
        """Config of every alignment method; "joint" takes those of `methods`, for as many steps as all of them."""
        members = {method: self.stages[method] for method in self.methods}
        steps = sum(settings["max_steps"] for settings in members.values())
        stages = {**self.stages, "joint": {"members": members, "max_steps": steps}}
        return {
            method: METHODS[method][1](**{"output_dir": None, **settings, **overrides})
            for method, settings in stages.items()
        }

    def cascade_config(self, **overrides: Any) -> CascadeConfig:
        """Config of the up-sampler's training."""
        return CascadeConfig(**{"output_dir": None, **self.cascade, **overrides})


def build_nav1d_planner(episodes: Episodes, seed: int, sampler: str = "ddpm") -> DiffuserPlannerPipeline:
    """Diffuser planner over the whole horizon of 8 steps; a U-Net of 0.25 M parameters."""
    with _seeded(seed):
        denoiser = TemporalUnet(episodes.observation_dim + episodes.action_dim, dim=32, dim_mults=(1, 2))
        return DiffuserPlannerPipeline(denoiser, **_common_parts(episodes, sampler), horizon=8)


def build_nav1d_decision_diffuser(episodes: Episodes, seed: int, sampler: str = "ddpm") -> DiffuserPlannerPipeline:
    """Decision Diffuser without returns: a DiT of 0.31 M parameters plans observations, inverse dynamics act."""
    with _seeded(seed):
        denoiser = DiffusionTransformer1D(episodes.observation_dim, dim=96, num_heads=4, depth=2)
        inverse_dynamics = InverseDynamics(episodes.observation_dim, episodes.action_dim, hidden_dims=(128, 128))
        parts = _common_parts(episodes, sampler)
        return DiffuserPlannerPipeline(denoiser, **parts, inverse_dynamics=inverse_dynamics, horizon=8)


def build_nav1d_policy(episodes: Episodes, seed: int, sampler: str = "ddpm") -> DiffusionPolicyPipeline:
    """Diffusion policy of single actions; a DiT of 0.17 M parameters."""
    with _seeded(seed):
        denoiser = DiffusionTransformer1D(episodes.action_dim, episodes.observation_dim, dim=64, num_heads=4)
        return DiffusionPolicyPipeline(denoiser, **_common_parts(episodes, sampler), horizon=1)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _common_parts(episodes: Episodes, sampler: str) -> dict[str, Any]:
    settings, steps = SAMPLERS[sampler]
    return {
        "scheduler": TransitionScheduler(num_train_timesteps=100, **settings),
        "normalizer": Normalizer.from_data(episodes.observations, episodes.actions),
        "critic": TwinQCritic(episodes.observation_dim, episodes.action_dim),
        "num_inference_steps": steps,
    }


def nav1d(
    controller: str,
    sampler: str = "ddpm",
    *,
    critic: Mapping[str, float] = types.MappingProxyType({}),
    policy_rl: str = "reward_gradient",
    max_policy_coherency_drop: float = 0.1,
) -> Preset:
    """Nav1D with a planner (16 candidates per decision) or a policy (8).

    Args:
        controller: one of `CONTROLLERS`.
        sampler: one of `SAMPLERS`.
        critic: settings of `IQLTrainer` that differ from those of the three datasets.
        policy_rl: the first of a policy's methods.
        max_policy_coherency_drop: `max_coherency_drop` of a policy, whose coherency (Eq. 16) is the density of its
            actions in the data relative to the likeliest one's.

    Raises:
        ValueError: unknown controller or sampler.
    """
    _check_choice("controller", controller, CONTROLLERS)
    _check_choice("sampler", sampler, tuple(SAMPLERS))
    critic_settings = {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 512,
        "max_steps": 5000,
        "expectile": 0.95,
        "polyak": 0.01,
        **critic,
    }
    few_forwards = {"num_inference_steps": 5, "num_conditions": 32, "per_device_train_batch_size": 128}
    if controller == "policy":
        return Preset(
            build_pipeline=functools.partial(build_nav1d_policy, sampler=sampler),
            foundation={"max_steps": 2000, "per_device_train_batch_size": 512},
            critic=critic_settings,
            methods=(policy_rl, "dpo", "sft"),
            stages={
                "ddpo": {"max_steps": 300},
                "reward_gradient": {"max_steps": 150, "per_device_train_batch_size": 64},
                "nft": {"max_steps": 200, **few_forwards},
                "dpo": {"max_steps": 200},
                "sft": {"max_steps": 150, "steps_per_buffer": 75, "sample_from_reference": False},
            },
            num_candidates=8,
            max_coherency_drop=max_policy_coherency_drop,
        )
    build = build_nav1d_planner if controller == "planner" else build_nav1d_decision_diffuser
    return Preset(
        build_pipeline=functools.partial(build, sampler=sampler),
        foundation={"max_steps": 4000},
        critic=critic_settings,
        methods=("nft", "dpo", "sft"),
        stages={
            "ddpo": {"max_steps": 80, "learning_rate": 1e-3 if sampler in ("sm", "fm") else 5e-4},
            "reward_gradient": {"max_steps": 60, "per_device_train_batch_size": 64},
            "nft": {"max_steps": 120, "learning_rate": 2e-3, **few_forwards},
            "dpo": {"max_steps": 60, "per_device_train_batch_size": 64},
            "sft": {
                "max_steps": 75,
                "per_device_train_batch_size": 128,
                "steps_per_buffer": 75,
                "sample_from_reference": False,
            },
        },
        num_candidates=16,
        cascade={"max_steps": 150, "per_device_train_batch_size": 128, "num_conditions": 128},
    )


def control(task: Task, controller: str, sampler: str = "ddpm") -> Preset:
    """A task without a preset of its own: sizes follow its spaces and horizons.

    Planner: a U-Net over `task.horizon` steps; Decision Diffuser and policy: a DiT of width 128, or 192 for
    observations of more than 32 numbers. The critic values as many actions as are executed at once. Where the task has
    images, the policy sees them by Diffusion Policy's ResNet-18 on random crops of 7/8, trained with the denoiser.

    Args:
        task: of numbers or images.
        controller: one of `CONTROLLERS`.
        sampler: one of `SAMPLERS`.

    Raises:
        ValueError: unknown controller or sampler, or a controller that does not suit the task.
    """
    _check_choice("controller", controller, CONTROLLERS)
    _check_choice("sampler", sampler, tuple(SAMPLERS))
    _check_choice(f"controller of {task.name}", controller, task.controllers)
    is_policy = controller == "policy"
    batch = {"per_device_train_batch_size": 128 if is_policy else 64}
    return Preset(
        build_pipeline=functools.partial(_build_control, task=task, controller=controller, sampler=sampler),
        foundation={"max_steps": 6_000, "learning_rate": 5e-4, **batch},
        critic={
            "max_steps": 20_000,
            "per_device_train_batch_size": 128,
            "discount": task.discount,
            "expectile": task.expectile,
        },
        methods=("nft", "dpo", "sft"),
        stages={
            "ddpo": {"max_steps": 100, "learning_rate": 3e-5},
            "reward_gradient": {"max_steps": 100, "learning_rate": 1e-4, "reference_coefficient": 10.0, **batch},
            "nft": {"max_steps": 100, "learning_rate": 3e-5, **batch},
            "dpo": {"max_steps": 200, "learning_rate": 1e-4, **batch},
            "sft": {"max_steps": 400, "steps_per_buffer": 50, "num_conditions": 512 if is_policy else 128, **batch},
        },
        num_candidates=8 if is_policy else 16,
        num_evaluation_episodes=64,
        num_validation_episodes=16,
    )


def _build_control(episodes: Episodes, seed: int, *, task: Task, controller: str, sampler: str) -> Any:
    with _seeded(seed):
        parts, observation_dim = _common_parts(episodes, sampler), episodes.observation_dim
        if episodes.images:
            parts["vision_encoder"] = encoder = _vision_encoder(episodes)
            observation_dim += encoder.feature_dim
            arrays = episodes.observations, episodes.actions
            parts["normalizer"] = Normalizer.from_data(*arrays, num_features=encoder.feature_dim)
        dim = 192 if observation_dim > 32 else 128
        parts["critic"] = TwinQCritic(
            observation_dim,
            episodes.action_dim,
            layer_norm=True,
            value_scale=_value_scale(episodes, task.discount),
            num_action_steps=task.num_action_steps,
        )
        if controller == "policy":
            condition_dim = task.num_observation_steps * observation_dim
            denoiser: Any = DiffusionTransformer1D(episodes.action_dim, condition_dim, dim=dim, num_heads=4)
            steps = {"horizon": task.policy_horizon, "num_observation_steps": task.num_observation_steps}
            return DiffusionPolicyPipeline(denoiser, **parts, **steps)
        dim_mults = (1, 2) if task.horizon < 16 else (1, 2, 4)
        coarsest = 2 ** (len(dim_mults) - 1)
        horizon = coarsest * math.ceil(task.horizon / coarsest)
        if controller == "planner":
            denoiser = TemporalUnet(episodes.observation_dim + episodes.action_dim, dim=32, dim_mults=dim_mults)
            return DiffuserPlannerPipeline(denoiser, **parts, horizon=horizon)
        denoiser = DiffusionTransformer1D(episodes.observation_dim, dim=dim, num_heads=4)
        inverse_dynamics = InverseDynamics(episodes.observation_dim, episodes.action_dim)
        return DiffuserPlannerPipeline(denoiser, **parts, inverse_dynamics=inverse_dynamics, horizon=horizon)


def _vision_encoder(episodes: Episodes) -> VisionEncoder:
    height, width = next(iter(episodes.images.values())).shape[1:3]
    return cast(VisionEncoder, VisionEncoder(tuple(episodes.images), crop=(height * 7 // 8, width * 7 // 8)))


def _value_scale(episodes: Episodes, discount: float) -> float:
    """About the size of the data's values: their mean reward over the steps that the discount leaves, or an episode."""
    steps = min(1 / max(1 - discount, 1e-6), float(episodes.episode_lengths.mean()))
    return max(1.0, float(np.abs(episodes.rewards).mean()) * steps)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}; got {value!r}.")


# Uniform actions cover every state, so that the expectile may come close to the maximum; on the expert's narrow data
# 0.99 makes the critic overrate what it never saw. In the partial data poor actions are the likelier ones: a policy
# that prefers better ones is bound to lose coherency, the less the smaller its steps.
PRESETS: dict[str, Callable[[str, str], Preset]] = {
    "nav1d-full": functools.partial(nav1d, critic={"expectile": 0.99, "discount": 1.0}),
    "nav1d-partial": functools.partial(nav1d, policy_rl="nft", max_policy_coherency_drop=0.85),
    "nav1d-expert": nav1d,
}


def preset_of(task: Task, controller: str, sampler: str) -> Preset:
    """The task's own preset, or that of all tasks without one."""
    return PRESETS[task.name](controller, sampler) if task.name in PRESETS else control(task, controller, sampler)
