"""What a training step costs beyond forward, backward and optimiser, and what the trainers' loop costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from peft import LoraConfig
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import TrainerCallback, TrainerControl, TrainerState

from dmc_hub.benchmarks.data import ACTION_DIM, OBSERVATION_DIM, synthetic_episodes
from dmc_hub.benchmarks.plan import PlannerSizes
from dmc_hub.benchmarks.timing import Clock, machine
from dmc_hub.data import Episodes
from dmc_hub.losses import denoising_loss
from dmc_hub.rewards import critic_reward
from dmc_hub.trainers.ddpo import DDPOConfig, DDPOTrainer
from dmc_hub.trainers.denoising import DenoisingConfig, DenoisingTrainer
from dmc_hub.trainers.nft import NFTConfig, NFTTrainer

WARM_UP = 5
TINY = PlannerSizes(OBSERVATION_DIM, ACTION_DIM, horizon=8, dim=8, dim_mults=(1, 2), num_inference_steps=5)


class Beside(TrainerCallback):
    """After each step of a trainer runs one of something else, and notes how long both took.

    A trainer's step counts from the end of the other's to its own `on_step_end`, the loop's work and logging included.
    """

    def __init__(self, name: str, run: Callable[[], Any], device: str) -> None:
        self.name, self.run = name, run
        self.clock = Clock(device)
        self._resumed: tuple[float, float] | None = None
        self._count = 0

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        reached = self.clock.now()
        self._count += 1
        if self._count > WARM_UP and self._resumed is not None:
            self.clock.add("trainer", self._resumed, reached)
            self.clock.time(self.name, self.run)
        else:
            self.run()
        self._resumed = self.clock.now()


def measure_training(
    *,
    batch_size: int = 64,
    num_steps: int = 100_000,
    sizes: PlannerSizes = PlannerSizes(),  # noqa: B008 (frozen)
    repeats: int = 40,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Steps of `DenoisingTrainer`, data included, over forward, backward and optimiser alone on one batch."""
    episodes = synthetic_episodes(num_steps, seed)
    pipeline = sizes.build(device=device, seed=seed)
    twin = _trainer(sizes, episodes, batch_size, 1, device, seed)
    beside = Beside("forward, backward, optimiser", _bare_step(twin), device)
    options = {"callbacks": [beside]}
    _trainer(sizes, episodes, batch_size, repeats + WARM_UP, device, seed, pipeline, **options).train()
    return {
        "machine": machine(device),
        "sizes": {**vars(sizes), "batch_size": batch_size, "data_steps": num_steps},
        **beside.clock.report(beside.name),
    }


def _trainer(
    sizes: PlannerSizes,
    episodes: Episodes,
    batch_size: int,
    max_steps: int,
    device: str,
    seed: int,
    pipeline: Any = None,
    **options: Any,
) -> DenoisingTrainer:
    config = DenoisingConfig(
        output_dir=None,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        seed=seed,
        use_cpu=device == "cpu",
        disable_tqdm=True,
    )
    if pipeline is None:
        pipeline = sizes.build(device=device, seed=seed)
    return DenoisingTrainer(pipeline, config, train_dataset=episodes, **options)


def _bare_step(trainer: DenoisingTrainer) -> Callable[[], None]:
    """Forward, backward and the trainer's optimiser on a batch that was prepared before."""
    network: nn.Module = trainer.model
    scheduler, pipeline = trainer.pipeline.scheduler, trainer.pipeline
    batch = trainer._prepare_input(trainer.make_batch(trainer.generator("batch")))
    x0, condition = pipeline.encode(batch, batch["num_context_steps"])
    x_t = pipeline.inpaint(scheduler.add_noise(x0, batch["noise"], batch["timesteps"]), condition)
    target = scheduler.training_target(x0, batch["noise"], batch["timesteps"])
    optimizer, free = trainer.create_optimizer(), pipeline.free_entries(condition)

    def step() -> None:
        loss = denoising_loss(network(x_t, batch["timesteps"], return_dict=False)[0], target, free).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_loops(*, repeats: int = 150, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Steps of trainers on tiny models over a bare loop of the same batches, losses and optimisers, which calls the
    trainer's `make_batch` and `compute_loss`, clips the gradient and steps."""
    episodes = synthetic_episodes(2_000, seed)
    common: dict[str, Any] = {"output_dir": None, "seed": seed, "use_cpu": device == "cpu", "disable_tqdm": True}
    loops: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "denoising": (DenoisingTrainer, DenoisingConfig, {"per_device_train_batch_size": 32}),
        "ddpo": (DDPOTrainer, DDPOConfig, {"per_device_train_batch_size": 32}),
        "nft": (NFTTrainer, NFTConfig, {"per_device_train_batch_size": 32, "num_conditions": 4}),
    }
    results = {}
    for name, (trainer_class, config_class, settings) in loops.items():

        def build(max_steps: int, callbacks: Sequence[TrainerCallback] = ()) -> Any:
            pipeline = TINY.build(device=device, seed=seed)
            options = {} if name == "denoising" else _alignment(pipeline)  # noqa: B023 (called in this turn)
            config = config_class(max_steps=max_steps, **settings, **common)  # noqa: B023
            return trainer_class(pipeline, config, train_dataset=episodes, callbacks=callbacks, **options)  # noqa: B023

        beside = Beside("bare loop", _bare_loop(build(1)), device)
        build(repeats + WARM_UP, [beside]).train()
        results[name] = beside.clock.report(beside.name)
    return {"machine": machine(device), "sizes": vars(TINY), "trainers": results}


def _alignment(pipeline: Any) -> dict[str, Any]:
    return {"reward_function": critic_reward(pipeline), "peft_config": LoraConfig(r=4)}


def _bare_loop(trainer: Any) -> Callable[[], None]:
    optimizer: Any = trainer.create_optimizer()
    parameters = [each for each in trainer.model.parameters() if each.requires_grad]

    def step() -> None:
        trainer.model.train()
        batch = trainer._prepare_input(trainer.make_batch(trainer.generator("batch")))
        trainer.compute_loss(trainer.model, batch).backward()
        clip_grad_norm_(parameters, trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        trainer.micro_step += 1
        trainer.after_optimizer_step()

    return step
