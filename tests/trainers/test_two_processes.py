"""Every trainer on two processes ends with the weights that one process reaches with the same global batch.

The one process draws what the two would: in each draw of random numbers the first half of the batch comes from the
first process's generator and the second half from the second's. Everything else (sampling, rewards, statistics, loss,
optimizer) sees one batch. Run as a script, this file is the program of the two processes.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dmc_hub import checkpoint
from dmc_hub.data import Episodes, make_nav1d_dataset
from dmc_hub.models.critic import TwinQCritic
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.pipelines import DiffuserPlannerPipeline, DiffusionPolicyPipeline
from dmc_hub.scheduler import TransitionScheduler
from dmc_hub.trainers.cascade import CascadeConfig, CascadeTrainer
from dmc_hub.trainers.ddpo import DDPOConfig, DDPOTrainer
from dmc_hub.trainers.denoising import DenoisingConfig, DenoisingTrainer
from dmc_hub.trainers.dpo import DiffusionDPOConfig, DiffusionDPOTrainer
from dmc_hub.trainers.iql import IQLConfig, IQLTrainer
from dmc_hub.trainers.loop import hash_seed
from dmc_hub.trainers.nft import NFTConfig, NFTTrainer
from dmc_hub.trainers.reward_gradient import RewardGradientConfig, RewardGradientTrainer
from dmc_hub.trainers.sft import SFTConfig, SFTTrainer

BATCH = 8
TWICE_IN_ONE_PROCESS = ("per_device_train_batch_size", "num_conditions")

# name: trainer, config, controller, settings. DDPO's rollouts and QV-PG's batches are used whole, the others' buffers
# are drawn from.
CASES: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "denoising": (DenoisingTrainer, DenoisingConfig, "planner", {"inpainting_probability": 0.5}),
    "iql": (IQLTrainer, IQLConfig, "policy", {"polyak": 0.3, "learning_rate": 0.1}),
    "ddpo_running": (
        DDPOTrainer,
        DDPOConfig,
        "policy",
        {"group_size": 4, "num_train_denoising_steps": 1, "kl_target": 0.01, "credit": "similarity"},
    ),
    "ddpo_global": (
        DDPOTrainer,
        DDPOConfig,
        "planner",
        {"group_size": 2, "num_train_denoising_steps": None, "advantage_scale": "global", "epochs_per_rollout": 2},
    ),
    "ddpo_batch": (DDPOTrainer, DDPOConfig, "policy", {"group_size": 1, "advantage_baseline": "batch"}),
    "reward_gradient": (RewardGradientTrainer, RewardGradientConfig, "policy", {}),
    "nft": (NFTTrainer, NFTConfig, "policy", {"group_size": 4, "num_conditions": 4, "steps_per_buffer": 2}),
    "awm": (
        NFTTrainer,
        NFTConfig,
        "planner",
        {"group_size": 4, "num_conditions": 4, "steps_per_buffer": 2, "loss_type": "awm"},
    ),
    "dpo": (
        DiffusionDPOTrainer,
        DiffusionDPOConfig,
        "policy",
        {"num_candidates": 2, "num_conditions": 8, "steps_per_buffer": 2},
    ),
    "dpo_data": (
        DiffusionDPOTrainer,
        DiffusionDPOConfig,
        "planner",
        {"num_candidates": 3, "num_conditions": 8, "pairs": "data", "loss_type": "listwise", "max_pair_distance": 0.4},
    ),
    "sft": (
        SFTTrainer,
        SFTConfig,
        "policy",
        {"num_candidates": 2, "num_conditions": 16, "likelihood_quantile": 0.95, "sample_from_reference": False},
    ),
    "cascade": (CascadeTrainer, CascadeConfig, "planner", {"num_candidates": 3, "num_conditions": 8}),
}
WHOLE = (DDPOTrainer, RewardGradientTrainer)


def reward(observations: Tensor, actions: Tensor) -> Tensor:
    """The action in steps of 0.5, so that some candidates tie; with the action's gradient."""
    action = actions[:, 0, 0]
    return action + ((2 * action).round() / 2 - action).detach()


def make_trainer(name: str, episodes: Episodes, mixin: type | None = None, **overrides: Any) -> Any:
    """The trainer of a case; `mixin` makes it the one process, with the batch of both; `overrides` are settings."""
    trainer_type, config_type, controller, settings = CASES[name]
    torch.manual_seed(0)
    normalizer = Normalizer.from_data(episodes.observations, episodes.actions)
    scheduler, critic = TransitionScheduler(10, prediction_type="sample"), TwinQCritic(3, 1, hidden_dims=(16,))
    pipeline: Any
    denoiser = DiffusionTransformer1D(*((1, 3) if controller == "policy" else (4,)), dim=8, num_heads=2, depth=1)
    torch.nn.init.normal_(denoiser.head.weight, std=0.6)
    parts = (denoiser, scheduler, normalizer, critic)
    if controller == "policy":
        pipeline = DiffusionPolicyPipeline(*parts, num_inference_steps=4)
    else:
        pipeline = DiffuserPlannerPipeline(*parts, horizon=4, num_inference_steps=4)
    options: dict[str, Any] = {"output_dir": None, "disable_tqdm": True, "logging_steps": 1}
    options |= {"max_steps": 3, "per_device_train_batch_size": BATCH, "optim": "sgd", "learning_rate": 0.05}
    options |= {**settings, **overrides}
    samples = trainer_type not in (DenoisingTrainer, IQLTrainer)
    own: dict[str, Any] = {"reward_function": reward} if samples else {}
    if samples and trainer_type is not CascadeTrainer:
        own["peft_config"] = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)
    if mixin is not None:
        options |= {name: 2 * options[name] for name in TWICE_IN_ONE_PROCESS if name in options}
        trainer_type = type(f"OneFor{trainer_type.__name__}", (mixin, trainer_type), {})
    return trainer_type(pipeline, config_type(**options), train_dataset=episodes, **own)


def outcome(trainer: Any) -> dict[str, Tensor]:
    """What training has led to: weights, and the losses of its steps."""
    trainer.train()
    losses = [row["loss"] for row in trainer.history if "loss" in row]
    return {**trainer.trainable_module().state_dict(), "losses": torch.tensor(losses)}


def make_episodes() -> Episodes:
    return Episodes.from_dataset(make_nav1d_dataset("full", num_episodes=40))


# ---- One process that draws as two -----------------------------------------------------------------------


_second_of: dict[torch.Generator, torch.Generator] = {}


class OneOfTwo:
    """Makes a trainer of one process draw the batches of two."""

    def _seeded(self: Any, purpose: str, micro_step: int, process: int | None = None) -> torch.Generator:
        first, second = (
            torch.Generator().manual_seed(hash_seed(purpose, self.args.seed, rank, micro_step)) for rank in (0, 1)
        )
        if process is None:
            _second_of[first] = second
        return first

    def draw(self: Any, buffer: dict[str, Tensor], position: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Each process draws from its own half of the buffer."""
        second = _second_of.pop(generator)
        if isinstance(self, WHOLE):
            return super().draw(buffer, position, generator)  # type: ignore[misc]
        args, both = self.args, []
        self.args = copy.copy(args)
        for name in TWICE_IN_ONE_PROCESS:
            setattr(self.args, name, getattr(args, name) // 2)
        for half, source in ((0, generator), (1, second)):
            part = {name: value.chunk(2)[half] for name, value in buffer.items()}
            both.append(super().draw(part, position, source))  # type: ignore[misc]
        self.args = args
        return {name: torch.cat([batch[name] for batch in both]) for name in both[0]}


class DrawAsTwo(TorchFunctionMode):
    """Fills the first half of what is drawn from the first process's generator, the second from the second's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is None or generator not in _second_of:
            return func(*args, **kwargs)
        assert func in (torch.randn, torch.rand, torch.randint), func
        *others, size = args
        size = (size,) if isinstance(size, int) else tuple(size)
        assert size[0] % 2 == 0
        half = (size[0] // 2, *size[1:])
        both = (generator, _second_of[generator])
        return torch.cat([func(*others, half, **{**kwargs, "generator": each}) for each in both])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What both processes reached, of one launch for all trainers."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "--main_process_port", "0", __file__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [checkpoint.load_tensors(folder / f"rank-{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_reach_what_one_does_with_the_same_global_batch(
    name: str, ranks: list[dict[str, Tensor]]
) -> None:
    first, second = (
        {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        for tensors in ranks
    )
    episodes = make_episodes()
    untrained = make_trainer(name, episodes).trainable_module().state_dict()
    with DrawAsTwo():
        one = outcome(make_trainer(name, episodes, OneOfTwo))
    assert all(tensors["world_size"].item() == 2 for tensors in ranks)
    assert first.keys() == second.keys() == one.keys()
    for key, value in first.items():
        assert torch.equal(second[key], value), key
    error, moved = (_distance(one, other, untrained) for other in (first, untrained))
    assert moved > 1e-3
    assert error < 1e-4 * moved, (error, moved)
    assert torch.allclose(first["losses"], one["losses"], rtol=1e-4, atol=1e-6), (first["losses"], one["losses"])


def test_a_sharded_optimizer_leads_to_the_same_bits(ranks: list[dict[str, Tensor]]) -> None:
    """Also if a sharded run goes on whole, and the other way round; each process holds about half of the state."""
    for tensors in ranks:
        whole = {key: value for key, value in tensors.items() if key.startswith("whole/weights/")}
        assert whole
        for name in ("sharded", "sharded from whole", "whole from sharded"):
            for key, value in whole.items():
                assert torch.equal(tensors[key.replace("whole", name, 1)], value), (name, key)
    held = [int(tensors["sharded/held"]) for tensors in ranks]
    total = int(ranks[0]["whole/held"])
    assert sum(held) == total
    assert max(held) < 0.75 * total
    assert [int(tensors["sharded from whole/held"]) for tensors in ranks] == held


def _distance(left: dict[str, Tensor], right: dict[str, Tensor], keys: Iterable[str]) -> float:
    """The Euclidean one, of all weights."""
    return torch.cat([(left[key] - right[key]).flatten() for key in keys]).norm().item()


def shard(episodes: Episodes, folder: Path) -> dict[str, Tensor]:
    """Runs by Adam with a whole and a sharded optimizer, and each from a checkpoint of the other."""
    runs = {"whole": None, "sharded": None, "sharded from whole": "whole", "whole from sharded": "sharded"}
    tensors: dict[str, Tensor] = {}
    for name, source in runs.items():
        trainer = make_trainer(
            "denoising",
            episodes,
            optim="adamw_torch",
            learning_rate=0.01,
            max_steps=4,
            save_steps=2,
            save_strategy="steps",
            output_dir=str(folder / name),
            shard_optimizer=name.startswith("sharded"),
        )
        trainer.train(None if source is None else folder / source / "checkpoint-2")
        tensors |= {f"{name}/weights/{key}": value for key, value in trainer.trainable_module().state_dict().items()}
        states = trainer.optimizer.state.values()
        tensors[f"{name}/held"] = torch.tensor(sum(state["exp_avg"].numel() for state in states))
    return tensors


def main(folder: Path) -> None:
    episodes = make_episodes()
    tensors = shard(episodes, folder)
    for name in CASES:
        tensors |= {f"{name}/{key}": value for key, value in outcome(make_trainer(name, episodes)).items()}
    tensors["world_size"] = torch.tensor(torch.distributed.get_world_size())
    checkpoint.save_tensors(folder / f"rank-{os.environ['RANK']}.safetensors", tensors)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
