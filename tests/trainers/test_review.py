"""What an expert would break: equal rewards, dropout, misspelt settings, no adapter, foreign data, collapsed stages.

Run as a script, this file is also the program that a test starts on two processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from peft import LoraConfig
from torch import Tensor

from dmc_hub import checkpoint
from dmc_hub.checkpoint import CheckpointError
from dmc_hub.data import Episodes, make_nav1d_dataset
from dmc_hub.presets import build_nav1d_policy
from dmc_hub.rewards import call_reward
from dmc_hub.trainers.alignment import AlignmentConfig, SequentialAligner
from dmc_hub.trainers.ddpo import DDPOConfig, DDPOTrainer
from dmc_hub.trainers.denoising import DenoisingConfig, DenoisingTrainer
from dmc_hub.trainers.dpo import DiffusionDPOConfig, DiffusionDPOTrainer
from dmc_hub.trainers.iql import IQLConfig, IQLTrainer
from dmc_hub.trainers.nft import NFTConfig, NFTTrainer
from dmc_hub.trainers.reward_gradient import RewardGradientConfig, RewardGradientTrainer
from dmc_hub.trainers.sft import NoSamplesLeftError, SFTConfig, SFTTrainer

MakePipeline = Callable[..., Any]
QUIET: dict[str, Any] = {"output_dir": None, "disable_tqdm": True, "logging_steps": 1, "max_steps": 1}
SMALL: dict[str, Any] = {**QUIET, "per_device_train_batch_size": 16}
TRAINERS: list[tuple[Any, Any]] = [
    (DenoisingTrainer, DenoisingConfig),
    (IQLTrainer, IQLConfig),
    (DDPOTrainer, DDPOConfig),
    (RewardGradientTrainer, RewardGradientConfig),
    (NFTTrainer, NFTConfig),
    (DiffusionDPOTrainer, DiffusionDPOConfig),
    (SFTTrainer, SFTConfig),
]


def first_action(observations: Tensor, actions: Tensor) -> Tensor:
    return actions[:, 0, 0]


# ---- The mathematics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [0.1, 0.3, -7.7])
def test_equal_rewards_teach_nothing(reward: float, make_pipeline: MakePipeline, episodes: Episodes) -> None:
    """The mean of equal numbers differs from them by rounding, which no scale may blow up."""
    trainer = DDPOTrainer(
        make_pipeline("policy"),
        DDPOConfig(**SMALL, kl_coefficient=0.0),
        train_dataset=episodes,
        reward_function=lambda observations, actions: torch.full((len(actions),), reward),
        peft_config=LoraConfig(r=4, init_lora_weights=False),
    )
    trainer.train()
    assert trainer.history[0]["grad_norm"] == 0.0


@pytest.mark.parametrize("options", [{"lora_dropout": 0.3}, {}], ids=str)
@pytest.mark.parametrize("bf16", [False, True])
def test_the_first_ratio_is_one_also_with_dropout_and_mixed_precision(
    options: dict[str, Any], bf16: bool, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    trainer = DDPOTrainer(
        make_pipeline("policy"),
        DDPOConfig(**SMALL, bf16=bf16, use_cpu=True, num_train_denoising_steps=None),
        train_dataset=episodes,
        reward_function=first_action,
        peft_config=LoraConfig(r=4, init_lora_weights=False, **options),
    )
    trainer.train()
    assert trainer.history[0]["ratio"] == 1.0
    assert trainer.history[0]["clip_fraction"] == 0.0


def test_dpo_errors_are_those_of_the_noise_over_the_free_entries(
    make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    pipeline = make_pipeline("planner")
    trainer = DiffusionDPOTrainer(
        pipeline,
        DiffusionDPOConfig(**SMALL, num_conditions=16, snr_clip=1e9),
        train_dataset=episodes,
        peft_config=LoraConfig(r=4, init_lora_weights=False),
    )
    batch = trainer.make_batch(torch.Generator().manual_seed(0))
    condition = {"values": batch["condition.values"], "mask": batch["condition.mask"]}
    x_t = pipeline.scheduler.add_noise(batch["samples"][:, 0], batch["noise"], batch["timesteps"])
    output = pipeline.predict(x_t, batch["timesteps"], condition)
    _, noise = pipeline.scheduler.predict(output, x_t, batch["timesteps"])
    expected = ((noise - batch["noise"]) ** 2 * ~condition["mask"]).flatten(1).sum(1)
    torch.testing.assert_close(trainer._noise_errors(batch)[:, 0], expected, rtol=1e-4, atol=1e-4)


# ---- What is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"credit": "increasing"},
            "`credit` must be one of noise_level, uniform, decreasing, similarity; got 'increasing'",
        ),
        ({"advantage_scale": "batch"}, "`advantage_scale` must be one of running, global, group, none; got 'batch'"),
        ({"loss_type": "grpo"}, "`loss_type` must be one of ppo, reinforce; got 'grpo'"),
        ({"clip_range": -0.2}, r"`clip_range` must be at least 0, got -0\.2"),
        ({"kl_coefficient": float("nan")}, "`kl_coefficient` must be at least 0, got nan"),
    ],
)
def test_settings_that_would_be_taken_for_others_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDPOConfig(**{**SMALL, **settings})


def test_a_missing_reference_is_noticed(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    for trainer_type, config in ((DiffusionDPOTrainer, DiffusionDPOConfig), (SFTTrainer, SFTConfig)):
        with pytest.raises(ValueError, match=f"`{trainer_type.__name__}` compares with the foundation"):
            trainer_type(make_pipeline("policy"), config(**SMALL), train_dataset=episodes)
    with pytest.warns(UserWarning, match="`kl_coefficient` is ignored"):
        DDPOTrainer(make_pipeline("policy"), DDPOConfig(**SMALL), train_dataset=episodes)
    with pytest.warns(UserWarning, match="`reference_coefficient` is ignored"):
        RewardGradientTrainer(make_pipeline("policy"), RewardGradientConfig(**SMALL), train_dataset=episodes)
    with pytest.warns(UserWarning, match="`reference_coefficient` is ignored"):
        NFTTrainer(make_pipeline("policy"), NFTConfig(**SMALL), train_dataset=episodes)
    DDPOTrainer(make_pipeline("policy"), DDPOConfig(**SMALL, kl_coefficient=0.0), train_dataset=episodes)


@pytest.mark.parametrize(("trainer_type", "config_type"), TRAINERS)
def test_data_of_other_widths_are_refused(
    trainer_type: Any, config_type: Any, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    wide = Episodes(**{**vars(episodes), "actions": np.repeat(episodes.actions, 2, axis=1)})
    with pytest.raises(ValueError, match="`train_dataset` has actions of width 2, but the pipeline is for width 1"):
        trainer_type(make_pipeline("policy"), config_type(**SMALL), train_dataset=wide)


def test_a_reward_that_is_no_function_and_plans_with_nan_are_refused(
    make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    reward: Any = "critic"
    with pytest.raises(ValueError, match="`reward_function` must be callable, got str"):
        DDPOTrainer(make_pipeline("policy"), DDPOConfig(**SMALL), train_dataset=episodes, reward_function=reward)
    observations = torch.full((2, 4, 3), float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or infinite observations"):
        call_reward(first_action, observations, torch.zeros(2, 4, 1))


def test_a_buffer_is_not_continued_under_other_settings(
    make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    saving = {**SMALL, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}

    def trainer(**settings: Any) -> DiffusionDPOTrainer:
        config = DiffusionDPOConfig(**{**saving, "num_conditions": 16, **settings})
        return DiffusionDPOTrainer(make_pipeline("policy"), config, train_dataset=episodes, peft_config=LoraConfig(r=4))

    trainer().train()
    for name, value in {"num_conditions": 64, "beta": 1.0, "steps_per_buffer": 3}.items():
        with pytest.raises(CheckpointError, match=rf"is of a run with {name} .*, not {value}"):
            trainer(max_steps=2, **{name: value}).train(resume_from_checkpoint=True)


# ---- Sequential alignment --------------------------------------------------------------------------------


def make_aligner(pipeline: Any, episodes: Episodes, output_dir: Path | None = None, **settings: Any) -> Any:
    def validate(controller: Any) -> dict[str, float]:
        actions = controller(episodes.observations[:64], generator=0).action
        if not np.isfinite(actions).all():
            raise ValueError("`actions` must be finite")  # as `dmc_hub.rollout.run_episodes` does
        return {"return_mean": float(2 + actions.mean()), "return_std": 0.0}

    configs = {
        "reward_gradient": RewardGradientConfig(**SMALL, lr_scheduler_type="constant", learning_rate=1e30),
        "sft": SFTConfig(**SMALL, num_conditions=16, num_candidates=4),
    }
    return SequentialAligner(
        pipeline,
        AlignmentConfig(
            output_dir=None if output_dir is None else str(output_dir),
            **{"methods": ["sft"], "max_passes": 1, "validations_per_stage": 1, "num_retries": 0, **settings},
        ),
        train_dataset=episodes,
        validate=validate,
        stage_configs=configs,
        reward_function=first_action,
    )


def test_a_last_update_that_breaks_the_controller_is_rolled_back(
    make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    """One step at a learning rate of 1e30: loss and gradient are finite, the controller afterwards is not."""
    results = make_aligner(make_pipeline("policy"), episodes, methods=["reward_gradient", "sft"]).run()
    assert results[1].decision == "rolled back"
    assert "generates NaN or infinite actions" in results[1].reason
    assert results[1].return_mean == results[0].return_mean


def test_a_stage_without_samples_is_rolled_back(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    pipeline = make_pipeline("policy")
    config = SFTConfig(**SMALL, num_conditions=16, num_candidates=4)
    trainer = SFTTrainer(pipeline, config, train_dataset=episodes, peft_config=LoraConfig(r=4))
    buffer = trainer.collect(torch.Generator().manual_seed(0))
    with pytest.raises(NoSamplesLeftError, match="All samples fall below") as refused:
        trainer.draw({**buffer, "accepted": torch.zeros_like(buffer["accepted"])}, 0, torch.Generator())

    def reject_all(*_: Any) -> None:
        raise refused.value

    aligner = make_aligner(make_pipeline("policy"), episodes)
    aligner._train = reject_all
    assert [row.decision for row in aligner.run()] == ["start", "rolled back"]


def test_another_seed_and_a_damaged_stage_are_named(
    make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    make_aligner(make_pipeline("policy"), episodes, tmp_path).run()
    again = make_aligner(make_pipeline("policy"), episodes, tmp_path)
    again.run()
    assert again.num_resumed == 2
    with pytest.raises(ValueError, match="holds a run with seed 0, not 1"):
        make_aligner(make_pipeline("policy"), episodes, tmp_path, seed=1).run()
    (tmp_path / "stages" / "01-sft" / "stage.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"stage\.json.*To run this stage and those after it again, delete"):
        make_aligner(make_pipeline("policy"), episodes, tmp_path).run()


def test_alignment_refuses_several_processes_and_bounds_that_bound_nothing(
    make_pipeline: MakePipeline, episodes: Episodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="`max_return_drop` must be at least 0, got -1"):
        AlignmentConfig(max_return_drop=-1)
    with pytest.raises(ValueError, match=r"`learning_rate_decay` must lie in \(0, 1\], got 0"):
        AlignmentConfig(learning_rate_decay=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="`SequentialAligner` runs in one process, not 2"):
        make_aligner(make_pipeline("policy"), episodes)


# ---- Two processes ---------------------------------------------------------------------------------------


def test_two_processes_share_the_target_and_the_moments(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launch, "--main_process_port", "0", __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (checkpoint.load_tensors(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert first.pop("world_size").item() == second.pop("world_size").item() == 2
    assert not torch.equal(first.pop("advantages"), second.pop("advantages"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert torch.equal(first["moments.whole"], first["moments.resumed"])
    assert torch.equal(first["kl.whole"], first["kl.resumed"])
    assert first["kl.whole"] > 0.03
    assert first["moments.whole"][0] > 0
    assert first["moments.whole"][1] == 2 * 16 * 3  # three rollouts of 16 samples on two processes


def two_process_scenario(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    episodes = Episodes.from_dataset(make_nav1d_dataset("full", num_episodes=50))
    critic = build_nav1d_policy(episodes, seed=rank)  # each process begins with other weights
    iql = IQLTrainer(critic, IQLConfig(**SMALL), train_dataset=episodes)
    iql.train()
    tensors = {f"target.{name}": value for name, value in iql.target.state_dict().items()}

    def trainer(max_steps: int, output_dir: Path | None = None) -> DDPOTrainer:
        settings: dict[str, Any] = {**SMALL, "lr_scheduler_type": "constant", "max_steps": max_steps, "kl_target": 0.01}
        if output_dir is not None:
            settings |= {"save_strategy": "steps", "save_steps": 1, "output_dir": str(output_dir)}
        lora = LoraConfig(r=4, init_lora_weights=False)
        policy = build_nav1d_policy(episodes, seed=0)
        return DDPOTrainer(policy, DDPOConfig(**settings), train_dataset=episodes, peft_config=lora)

    whole = trainer(3)
    whole.train()
    trainer(1, folder / "run").train()
    resumed = trainer(3, folder / "run")
    resumed.train(resume_from_checkpoint=True)
    tensors |= {"moments.whole": whole._reward_moments, "moments.resumed": resumed._reward_moments}
    tensors |= {
        "kl.whole": whole.extra_state()["kl_coefficient"],
        "kl.resumed": resumed.extra_state()["kl_coefficient"],
    }
    tensors |= {"advantages": whole._buffer["advantages"]}
    tensors |= {"world_size": torch.tensor(torch.distributed.get_world_size())}
    checkpoint.save_tensors(folder / f"rank-{rank}.safetensors", tensors)


if __name__ == "__main__":
    two_process_scenario(Path(sys.argv[1]))


def test_after_training_in_bfloat16_the_pipeline_is_out_of_autocast(
    make_pipeline: Callable[..., Any], episodes: Episodes
) -> None:
    pipeline = make_pipeline("planner")
    observations = episodes.observations[:8]
    before = pipeline(observations, generator=0).candidates
    config = RewardGradientConfig(
        output_dir=None, disable_tqdm=True, use_cpu=True, bf16=True, max_steps=2, per_device_train_batch_size=8
    )
    RewardGradientTrainer(pipeline, config, train_dataset=episodes, peft_config=LoraConfig(r=4)).train()
    with pipeline.lora_disabled():
        np.testing.assert_array_equal(pipeline(observations, generator=0).candidates, before)


def test_a_missing_tracker_is_answered_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmc_hub.trainers.base.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'`report_to` names trackio, .* `pip install "dmc_hub\[trackers\]"`'):
        DDPOConfig(output_dir=None, report_to="trackio")
    DDPOConfig(output_dir=None, report_to="none")


@pytest.mark.parametrize("controller", ["policy", "planner"])
def test_a_stock_scheduler_trains_nothing(controller: str, make_pipeline: MakePipeline, episodes: Episodes) -> None:
    pipeline = make_pipeline(controller)
    pipeline.register_modules(scheduler=DPMSolverMultistepScheduler(prediction_type="sample"))
    for trainer, config in TRAINERS:
        if trainer is not IQLTrainer:
            with pytest.raises(ValueError, match="is a DPMSolverMultistepScheduler, which samples but has neither"):
                trainer(pipeline, config(**SMALL), train_dataset=episodes, peft_config=LoraConfig())
