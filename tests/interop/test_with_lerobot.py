"""The exported policy and LeRobot itself; skipped where LeRobot is not installed, as it wants older libraries."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

modeling: Any = pytest.importorskip(
    "lerobot.policies.diffusion.modeling_diffusion",
    reason="LeRobot is not installed: it needs an environment of its own (datasets < 5)",
    exc_type=ImportError,
)
pytestmark = pytest.mark.filterwarnings("ignore")  # those of LeRobot and of what it imports

from dmc_hub.interop import export_lerobot_policy, import_lerobot_policy  # noqa: E402
from dmc_hub.interop.schedules import from_diffusers  # noqa: E402
from dmc_hub.models.conditional_unet import ConditionalUnet1D  # noqa: E402
from dmc_hub.models.normalizer import Normalizer  # noqa: E402
from dmc_hub.pipelines import DiffusionPolicyPipeline  # noqa: E402

STATE_DIM, ENV_DIM, ACTION_DIM, STEPS = 3, 2, 2, 2


def make_policy() -> DiffusionPolicyPipeline:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    pipeline = DiffusionPolicyPipeline(
        ConditionalUnet1D(ACTION_DIM, STEPS * (STATE_DIM + ENV_DIM), dims=(16, 32), timestep_dim=16),
        from_diffusers({"num_train_timesteps": 20, "beta_schedule": "squaredcos_cap_v2"}, eta=1.0),
        Normalizer.from_data(
            rng.normal(size=(40, STATE_DIM + ENV_DIM)).astype(np.float32),
            rng.normal(size=(40, ACTION_DIM)).astype(np.float32),
        ),
        horizon=8,
        num_observation_steps=STEPS,
        num_inference_steps=20,
        num_past_actions=STEPS - 1,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_lerobot_acts_with_an_exported_policy(tmp_path: Path) -> None:
    from lerobot.policies.factory import make_pre_post_processors

    pipeline = make_policy()
    export_lerobot_policy(pipeline, tmp_path / "policy", state_dim=STATE_DIM, num_action_steps=4)
    policy = modeling.DiffusionPolicy.from_pretrained(tmp_path / "policy").eval()
    before, after = make_pre_post_processors(policy.config, pretrained_path=str(tmp_path / "policy"))
    observations = torch.randn(STEPS, STATE_DIM + ENV_DIM, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    expected = pipeline(observations).actions
    policy.reset()
    with torch.no_grad():
        for step, observation in enumerate(observations):
            batch = before(
                {
                    "observation.state": observation[:STATE_DIM],
                    "observation.environment_state": observation[STATE_DIM:],
                }
            )
            if step < STEPS - 1:
                seen = {name: value for name, value in batch.items() if name.startswith("observation.")}
                policy._queues = modeling.populate_queues(policy._queues, seen)
        torch.manual_seed(2)
        actions = [after(policy.select_action(batch)) for _ in range(4)]
    np.testing.assert_allclose(torch.cat(actions).numpy(), expected[:4], rtol=1e-4, atol=1e-5)


def test_policy_that_lerobot_saved_acts_the_same(tmp_path: Path) -> None:
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.factory import make_pre_post_processors

    config = DiffusionConfig(
        horizon=8,
        n_action_steps=4,
        down_dims=(16, 32),
        diffusion_step_embed_dim=16,
        num_train_timesteps=20,
        device="cpu",
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (STATE_DIM,)),
            "observation.environment_state": PolicyFeature(FeatureType.ENV, (ENV_DIM,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
    )
    source = torch.Generator().manual_seed(4)
    statistics = {
        name: {"min": -1 - torch.rand(width, generator=source), "max": 1 + torch.rand(width, generator=source)}
        for name, width in (
            ("observation.state", STATE_DIM),
            ("observation.environment_state", ENV_DIM),
            ("action", ACTION_DIM),
        )
    }
    torch.manual_seed(0)
    policy = modeling.DiffusionPolicy(config).eval()
    policy.save_pretrained(tmp_path)
    before, after = make_pre_post_processors(config, dataset_stats=statistics)
    before.save_pretrained(tmp_path)
    after.save_pretrained(tmp_path)
    imported = import_lerobot_policy(tmp_path)
    batch = {
        "observation.state": torch.rand(1, STATE_DIM, generator=source),
        "observation.environment_state": torch.rand(1, ENV_DIM, generator=source),
    }
    torch.manual_seed(2)
    actual = imported.pipeline(imported.observation(batch)[:, None].expand(-1, STEPS, -1)).actions
    policy.reset()
    prepared = before({name: value[0] for name, value in batch.items()})
    torch.manual_seed(2)
    with torch.no_grad():
        expected = [after(policy.select_action(prepared)) for _ in range(4)]
    np.testing.assert_allclose(actual[0, :4], torch.cat(expected).numpy(), rtol=1e-4, atol=1e-5)


def test_lerobot_reads_an_exported_dataset(tmp_path: Path) -> None:
    from dmc_hub.data import Episodes, make_nav1d_dataset
    from dmc_hub.interop import save_lerobot_dataset

    lerobot_datasets: Any = pytest.importorskip("lerobot.datasets.lerobot_dataset", exc_type=ImportError)
    episodes = Episodes.from_dataset(make_nav1d_dataset("full", num_episodes=3))
    save_lerobot_dataset(episodes, tmp_path / "d", task="navigate", fps=10, state_dim=1)
    dataset = lerobot_datasets.LeRobotDataset(
        "dmc/nav1d", root=tmp_path / "d", delta_timestamps={"action": [0.0, 0.1], "next.reward": [0.0]}
    )
    assert (dataset.num_frames, dataset.num_episodes, dataset.fps) == (24, 3, 10)
    item = dataset[9]
    assert item["task"] == "navigate"
    assert item["observation.state"].item() == episodes.observations[9, 0]
    np.testing.assert_array_equal(item["observation.environment_state"], episodes.observations[9, 1:])
    np.testing.assert_array_equal(item["action"].flatten(), episodes.actions[9:11, 0])
    assert item["next.reward"].item() == episodes.rewards[9]
    assert bool(item["next.done"]) is False
    np.testing.assert_allclose(dataset.meta.stats["action"]["mean"], episodes.actions.mean(0), rtol=1e-6)


def test_plugin_runs_any_controller_in_nav1d(tmp_path: Path) -> None:
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.envs.utils import preprocess_observation
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    from dmc_hub import Agent
    from dmc_hub.data import Episodes, make_nav1d_dataset
    from dmc_hub.envs.env_hub import make_env
    from dmc_hub.interop import save_lerobot_plugin_policy
    from dmc_hub.interop.lerobot_plugin import configuration_dmc_hub  # noqa: F401 (what the shim imports)
    from dmc_hub.presets import build_nav1d_planner

    planner = build_nav1d_planner(Episodes.from_dataset(make_nav1d_dataset("full", num_episodes=5)), seed=0)
    planner.save_pretrained(tmp_path / "pipeline")
    planner.set_progress_bar_config(disable=True)
    save_lerobot_plugin_policy(tmp_path / "pipeline", tmp_path / "policy", state_dim=1, num_candidates=3, seed=6)
    config = PreTrainedConfig.from_pretrained(tmp_path / "policy")
    policy = get_policy_class(config.type).from_pretrained(tmp_path / "policy", config=config)
    before, after = make_pre_post_processors(config, pretrained_path=str(tmp_path / "policy"))
    env, agent = make_env(n_envs=2), Agent(planner)
    observations, _ = env.reset(seed=0)
    generator = torch.Generator().manual_seed(6)
    policy.reset()
    for _ in range(3):
        action = after(policy.select_action(before(preprocess_observation(observations)))).numpy()
        flat = np.concatenate([observations["agent_pos"], observations["environment_state"]], axis=1)
        np.testing.assert_array_equal(action, agent(flat, num_candidates=3, generator=generator).action)
        observations, *_ = env.step(action)
    env.close()
