"""Align diffusion planners and diffusion policies with a reward, and share them on the Hugging Face Hub.

The names below are imported when they are first used, so that `import dmc_hub` stays quick; it registers the
environment `dmc_hub/Nav1D-v0` with gymnasium.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dmc_hub.version import __version__

if TYPE_CHECKING:
    from dmc_hub.agent import Agent
    from dmc_hub.data.episodes import Episodes
    from dmc_hub.envs.nav1d import Nav1DEnv
    from dmc_hub.envs.workers import RestartingVectorEnv
    from dmc_hub.image_rewards import DistributionReward, statistical_parity
    from dmc_hub.joint_reward import JointReward
    from dmc_hub.models.action_transformer import ActionTransformer
    from dmc_hub.models.conditional_unet import ConditionalUnet1D
    from dmc_hub.models.critic import TwinQCritic
    from dmc_hub.models.dit import DiffusionTransformer1D
    from dmc_hub.models.inverse_dynamics import InverseDynamics
    from dmc_hub.models.normalizer import Normalizer
    from dmc_hub.models.temporal_unet import TemporalUnet
    from dmc_hub.models.vision_encoder import VisionEncoder
    from dmc_hub.pipelines.diffuser_planner import DiffuserPlannerPipeline
    from dmc_hub.pipelines.diffusion_policy import DiffusionPolicyPipeline
    from dmc_hub.remote_rewards import HTTPReward
    from dmc_hub.scheduler import (
        CosineSchedule,
        DenoisingTrajectory,
        FlowSchedule,
        LinearSchedule,
        NoiseSchedule,
        TransitionScheduler,
        VarianceExplodingSchedule,
    )
    from dmc_hub.text_to_image import PromptTasks, TextToImagePolicy
    from dmc_hub.trainers.alignment import AlignmentConfig, SequentialAligner
    from dmc_hub.trainers.cascade import CascadeConfig, CascadeTrainer
    from dmc_hub.trainers.ddpo import DDPOConfig, DDPOTrainer
    from dmc_hub.trainers.denoising import DenoisingConfig, DenoisingTrainer
    from dmc_hub.trainers.dpo import DiffusionDPOConfig, DiffusionDPOTrainer
    from dmc_hub.trainers.iql import IQLConfig, IQLTrainer
    from dmc_hub.trainers.multi_task import AlignmentTask, align_tasks
    from dmc_hub.trainers.nft import NFTConfig, NFTTrainer
    from dmc_hub.trainers.online import OnlineConfig
    from dmc_hub.trainers.reward_gradient import RewardGradientConfig, RewardGradientTrainer
    from dmc_hub.trainers.sft import SFTConfig, SFTTrainer

__all__ = [
    "ActionTransformer",
    "Agent",
    "AlignmentConfig",
    "AlignmentTask",
    "CascadeConfig",
    "CascadeTrainer",
    "ConditionalUnet1D",
    "CosineSchedule",
    "DDPOConfig",
    "DDPOTrainer",
    "DenoisingConfig",
    "DenoisingTrainer",
    "DenoisingTrajectory",
    "DiffuserPlannerPipeline",
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "DiffusionPolicyPipeline",
    "DiffusionTransformer1D",
    "DistributionReward",
    "Episodes",
    "FlowSchedule",
    "HTTPReward",
    "IQLConfig",
    "IQLTrainer",
    "InverseDynamics",
    "JointReward",
    "LinearSchedule",
    "NFTConfig",
    "NFTTrainer",
    "Nav1DEnv",
    "NoiseSchedule",
    "Normalizer",
    "OnlineConfig",
    "PromptTasks",
    "RestartingVectorEnv",
    "RewardGradientConfig",
    "RewardGradientTrainer",
    "SFTConfig",
    "SFTTrainer",
    "SequentialAligner",
    "TemporalUnet",
    "TextToImagePolicy",
    "TransitionScheduler",
    "TwinQCritic",
    "VarianceExplodingSchedule",
    "VisionEncoder",
    "__version__",
    "align_tasks",
    "statistical_parity",
]

_NAMES_OF_MODULE = {
    "dmc_hub.agent": ("Agent",),
    "dmc_hub.data.episodes": ("Episodes",),
    "dmc_hub.envs.nav1d": ("Nav1DEnv",),
    "dmc_hub.envs.workers": ("RestartingVectorEnv",),
    "dmc_hub.image_rewards": ("DistributionReward", "statistical_parity"),
    "dmc_hub.joint_reward": ("JointReward",),
    "dmc_hub.models.action_transformer": ("ActionTransformer",),
    "dmc_hub.models.conditional_unet": ("ConditionalUnet1D",),
    "dmc_hub.models.inverse_dynamics": ("InverseDynamics",),
    "dmc_hub.models.critic": ("TwinQCritic",),
    "dmc_hub.models.dit": ("DiffusionTransformer1D",),
    "dmc_hub.models.normalizer": ("Normalizer",),
    "dmc_hub.models.temporal_unet": ("TemporalUnet",),
    "dmc_hub.models.vision_encoder": ("VisionEncoder",),
    "dmc_hub.pipelines.diffuser_planner": ("DiffuserPlannerPipeline",),
    "dmc_hub.pipelines.diffusion_policy": ("DiffusionPolicyPipeline",),
    "dmc_hub.remote_rewards": ("HTTPReward",),
    "dmc_hub.scheduler": (
        "CosineSchedule",
        "DenoisingTrajectory",
        "FlowSchedule",
        "LinearSchedule",
        "NoiseSchedule",
        "TransitionScheduler",
        "VarianceExplodingSchedule",
    ),
    "dmc_hub.text_to_image": ("PromptTasks", "TextToImagePolicy"),
    "dmc_hub.trainers.alignment": ("AlignmentConfig", "SequentialAligner"),
    "dmc_hub.trainers.cascade": ("CascadeConfig", "CascadeTrainer"),
    "dmc_hub.trainers.ddpo": ("DDPOConfig", "DDPOTrainer"),
    "dmc_hub.trainers.denoising": ("DenoisingConfig", "DenoisingTrainer"),
    "dmc_hub.trainers.dpo": ("DiffusionDPOConfig", "DiffusionDPOTrainer"),
    "dmc_hub.trainers.iql": ("IQLConfig", "IQLTrainer"),
    "dmc_hub.trainers.multi_task": ("AlignmentTask", "align_tasks"),
    "dmc_hub.trainers.nft": ("NFTConfig", "NFTTrainer"),
    "dmc_hub.trainers.online": ("OnlineConfig",),
    "dmc_hub.trainers.reward_gradient": ("RewardGradientConfig", "RewardGradientTrainer"),
    "dmc_hub.trainers.sft": ("SFTConfig", "SFTTrainer"),
}
_MODULE_OF_NAME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


importlib.import_module("dmc_hub.envs")  # registers dmc_hub/Nav1D-v0 with gymnasium
