"""LeRobot imports every distribution that is called `lerobot_policy_*`; this one registers the type `dmc_hub`."""

from dmc_hub.interop.lerobot_plugin.configuration_dmc_hub import DmcHubConfig

__all__ = ["DmcHubConfig"]
