"""Exchange with other libraries: LeRobot, diffusers' planners, CleanDiffuser, real-stanford/diffusion_policy, Minari.

Weights are read from safetensors or by torch's restricted unpickler: no code of a file is ever run.
"""

from dmc_hub.interop.diffusion_policy import import_diffusion_policy
from dmc_hub.interop.lerobot import (
    LeRobotPolicy,
    export_lerobot_policy,
    import_lerobot_policy,
    save_lerobot_plugin_policy,
)
from dmc_hub.interop.lerobot_dataset import save_lerobot_dataset
from dmc_hub.interop.minari import save_minari_dataset
from dmc_hub.interop.planners import import_cleandiffuser_planner, import_value_guided_planner
from dmc_hub.interop.schedules import cleandiffuser_scheduler
from dmc_hub.interop.vision import load_resnet_weights
from dmc_hub.interop.weights import InteropError

__all__ = [
    "InteropError",
    "LeRobotPolicy",
    "cleandiffuser_scheduler",
    "export_lerobot_policy",
    "import_cleandiffuser_planner",
    "import_diffusion_policy",
    "import_lerobot_policy",
    "import_value_guided_planner",
    "load_resnet_weights",
    "save_lerobot_dataset",
    "save_lerobot_plugin_policy",
    "save_minari_dataset",
]
