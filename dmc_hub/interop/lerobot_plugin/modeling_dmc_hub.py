"""The policy that LeRobot builds from `DmcHubConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from dmc_hub.agent import Agent
from dmc_hub.hub import load_pipeline
from dmc_hub.interop.lerobot_plugin.configuration_dmc_hub import DmcHubConfig

_UNTRAINABLE = "This policy is trained by dmc_hub's own trainers; LeRobot runs it."
_STATES = ("observation.state", "observation.environment_state")


class DmcHubPolicy(PreTrainedPolicy):
    """A planner or policy behind LeRobot's interface.

    `observation.state`, then `observation.environment_state` if it is there, are its observation, in the environment's
    units.
    """

    config_class = DmcHubConfig
    name = "dmc_hub"

    def __init__(self, config: DmcHubConfig, folder: Path | None = None, **kwargs: Any) -> None:
        super().__init__(config)
        if folder is None:
            raise ValueError("A dmc_hub policy is loaded, not made: use `DmcHubPolicy.from_pretrained`.")
        self.pipeline: Any = load_pipeline(folder / "pipeline")
        self.pipeline.set_progress_bar_config(disable=True)
        if (folder / "adapter").is_dir():
            self.pipeline.load_lora_weights(folder / "adapter")
        self.denoiser = self.pipeline.denoiser  # so that LeRobot sees parameters and their device
        self.agent = Agent(self.pipeline, num_action_steps=config.num_action_steps)
        self._generator = torch.Generator().manual_seed(config.seed)

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: Any = None, revision: str | None = None, **kwargs: Any
    ) -> DmcHubPolicy:
        """Load a folder or Hub repository that `save_lerobot_plugin_policy` wrote."""
        folder = Path(pretrained_name_or_path)
        if not folder.is_dir():
            folder = Path(snapshot_download(str(pretrained_name_or_path), revision=revision))
        if config is None:
            config = PreTrainedConfig.from_pretrained(folder)
        policy = cls(config, folder)
        policy.to(config.device)
        return cast(DmcHubPolicy, policy.eval())

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move the whole pipeline."""
        self.pipeline.to(*args, **kwargs)
        return self

    def reset(self) -> None:
        """New episodes start."""
        self.agent.reset()

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """The action to execute now, `(batch, action_dim)`."""
        observation = torch.cat([batch[name] for name in _STATES if name in batch], dim=-1)
        output = self.agent(
            observation.float().cpu().numpy(),
            num_candidates=self.config.num_candidates,
            action_selection=self.config.action_selection,
            early_ranking=self.config.early_ranking,
            generator=self._generator,
        )
        return torch.from_numpy(output.action)

    def predict_action_chunk(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """The next action alone, `(batch, 1, action_dim)`: the agent keeps its own chunks."""
        return self.select_action(batch)[:, None]

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any] | None]:
        raise NotImplementedError(_UNTRAINABLE)

    def get_optim_params(self) -> dict[str, Any]:
        raise NotImplementedError(_UNTRAINABLE)
