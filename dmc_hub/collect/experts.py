"""Policies of graded skill from one run of reinforcement learning, as D4RL makes them (arXiv:2004.07219, section 5).

The expert is the best snapshot of the run, the medium policy the first whose score is a third of the way from the first
snapshot's to the expert's, and medium-replay is all the run saw until then. Stable-Baselines3 is the extra `[collect]`.
Weights are kept in safetensors: nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from dmc_hub import checkpoint
from dmc_hub.collect.behaviors import Behavior, Recorder
from dmc_hub.data import Episodes
from dmc_hub.envs.extras import require
from dmc_hub.tasks import Task

ALGORITHMS = ("ppo", "sac")
NUM_SNAPSHOTS, NUM_SCORED_EPISODES, MEDIUM_SHARE = 100, 10, 1 / 3
_ZOO_POLICY = {"log_std_init": -2, "ortho_init": False, "activation_fn": torch.nn.ReLU, "net_arch": [256, 256]}
PPO_SETTINGS: dict[str, dict[str, Any]] = {
    "HalfCheetah-v4": {
        "batch_size": 64,
        "n_steps": 512,
        "gamma": 0.98,
        "learning_rate": 2.0633e-05,
        "ent_coef": 0.000401762,
        "clip_range": 0.1,
        "n_epochs": 20,
        "gae_lambda": 0.92,
        "max_grad_norm": 0.8,
        "vf_coef": 0.58096,
        "policy_kwargs": _ZOO_POLICY,
    },
    "Hopper-v4": {
        "batch_size": 32,
        "n_steps": 512,
        "gamma": 0.999,
        "learning_rate": 9.80828e-05,
        "ent_coef": 0.00229519,
        "clip_range": 0.2,
        "n_epochs": 5,
        "gae_lambda": 0.99,
        "max_grad_norm": 0.7,
        "vf_coef": 0.835671,
        "policy_kwargs": _ZOO_POLICY,
    },
    "Walker2d-v4": {
        "batch_size": 32,
        "n_steps": 512,
        "gamma": 0.99,
        "learning_rate": 5.05041e-05,
        "ent_coef": 0.000585045,
        "clip_range": 0.1,
        "n_epochs": 20,
        "gae_lambda": 0.95,
        "max_grad_norm": 1.0,
        "vf_coef": 0.871923,
    },
}
"""Settings of PPO from RL Baselines3 Zoo's `hyperparams/ppo.yml`; others train with Stable-Baselines3's defaults."""


@dataclass(frozen=True)
class Snapshot:
    """A policy in training: after how many steps, its score (mean return of the last 10 training episodes), weights."""

    num_steps: int
    score: float
    tensors: dict[str, torch.Tensor]


def choose_snapshots(snapshots: list[Snapshot]) -> tuple[Snapshot, Snapshot]:
    """The medium and the expert policy of a run.

    Raises:
        ValueError: the run ended before it had finished 10 episodes.
    """
    if not snapshots:
        raise ValueError(
            f"`training_steps` is too small: training ended before it had finished {NUM_SCORED_EPISODES} episodes."
        )
    expert = max(snapshots, key=lambda snapshot: snapshot.score)
    bar = snapshots[0].score + MEDIUM_SHARE * (expert.score - snapshots[0].score)
    return next(snapshot for snapshot in snapshots if snapshot.score >= bar), expert


def train_experts(task: Task, folder: Path, *, algorithm: str, training_steps: int, seed: int) -> dict[str, Any]:
    """Train, unless `folder` holds that run already, and return its facts: steps and scores of medium and expert.

    Args:
        task: of flat observations.
        folder: gets `medium.safetensors`, `expert.safetensors` and `replay/`, a dataset of the steps until medium.
        algorithm: "ppo" or "sac".
        training_steps: environment steps.
        seed: of the run.

    Raises:
        ImportError: Stable-Baselines3 is not installed.
        ValueError: unknown algorithm, too few steps, or the folder holds another run.
    """
    settings = {"environment": task.env_id, "algorithm": algorithm, "training_steps": training_steps, "seed": seed}
    if folder.is_dir():
        metadata = dict(checkpoint.verify(folder).metadata)
        found = {name: metadata.get(name) for name in settings}
        if found != settings:
            raise ValueError(f"`training_dir` {folder} holds the run {found}, not {settings}: choose another folder.")
        return metadata
    recorder = Recorder(task.make_env())
    snapshots = _train(task, recorder, algorithm, training_steps, seed)
    medium, expert = choose_snapshots(snapshots)
    facts = {
        f"{name}_{fact}": getattr(snapshot, fact)
        for name, snapshot in (("medium", medium), ("expert", expert))
        for fact in ("num_steps", "score")
    }
    with checkpoint.write_folder_atomically(folder, {**settings, **facts}) as stage:
        for name, snapshot in (("medium", medium), ("expert", expert)):
            checkpoint.save_tensors(stage / f"{name}.safetensors", snapshot.tensors)
        recorder.episodes(medium.num_steps).to_dataset().save_to_disk(str(stage / "replay"))
    return {**settings, **facts}


def replay_episodes(folder: Path) -> Episodes:
    """All that a run of `train_experts` saw until its medium policy."""
    return Episodes.from_dataset(datasets.load_from_disk(str(folder / "replay")))


def trained_behavior(task: Task, folder: Path, quality: str, *, algorithm: str) -> Behavior:
    """The medium or expert policy of a run of `train_experts`; its actions are sampled, as D4RL's are.

    Sampling draws from torch's global generator, which each episode seeds.
    """
    weights = checkpoint.load_tensors(folder / f"{quality}.safetensors")
    mean, variance = (weights.pop(f"observations.{name}").numpy() for name in ("mean", "variance"))
    env = task.make_env()
    policy = _model(task, env, algorithm, 0).policy
    policy.load_state_dict({name.removeprefix("policy."): value for name, value in weights.items()})

    def start(generator: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
        torch.manual_seed(int(generator.integers(2**31)))

        def act(observation: np.ndarray) -> np.ndarray:
            seen = np.clip((observation - mean) / np.sqrt(variance + 1e-8), -10.0, 10.0).astype(np.float32)
            return cast(np.ndarray, policy.predict(seen, deterministic=False)[0])

        return act

    return start


def _train(task: Task, recorder: Recorder, algorithm: str, training_steps: int, seed: int) -> list[Snapshot]:
    vec_env = require("stable_baselines3.common.vec_env", "collect")
    callbacks = require("stable_baselines3.common.callbacks", "collect")
    env = vec_env.DummyVecEnv([lambda: recorder])
    if algorithm == "ppo":
        gamma = PPO_SETTINGS.get(task.env_id, {}).get("gamma", 0.99)
        env = vec_env.VecNormalize(env, gamma=gamma)
    model = _model(task, env, algorithm, seed)
    snapshots: list[Snapshot] = []
    interval = max(1, training_steps // NUM_SNAPSHOTS)

    class Keep(callbacks.BaseCallback):  # type: ignore[name-defined]
        def _on_step(self) -> bool:
            returns = recorder.returns() if self.num_timesteps % interval == 0 else np.zeros(0)
            if len(returns) >= NUM_SCORED_EPISODES:
                score = float(returns[-NUM_SCORED_EPISODES:].mean())
                snapshots.append(Snapshot(self.num_timesteps, score, _tensors(model, env)))
            bar.update(self.num_timesteps - bar.n)
            return True

    with tqdm(total=training_steps, desc=f"training by {algorithm}", unit="step") as bar:
        model.learn(training_steps, callback=Keep())
    return snapshots


def _model(task: Task, env: Any, algorithm: str, seed: int) -> Any:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"`algorithm` must be one of {', '.join(ALGORITHMS)}; got {algorithm!r}.")
    library = require("stable_baselines3", "collect")
    if algorithm == "sac":
        return library.SAC("MlpPolicy", env, seed=seed, device="cpu")
    settings = PPO_SETTINGS.get(task.env_id, {})
    return library.PPO("MlpPolicy", env, seed=seed, device="cpu", **settings)


def _tensors(model: Any, env: Any) -> dict[str, torch.Tensor]:
    """The policy's weights, and the statistics that its observations are normalised by."""
    weights = {f"policy.{name}": value.detach().clone() for name, value in model.policy.state_dict().items()}
    width = model.observation_space.shape
    statistics = getattr(env, "obs_rms", None)
    mean, variance = (np.zeros(width), np.ones(width)) if statistics is None else (statistics.mean, statistics.var)
    weights["observations.mean"] = torch.from_numpy(np.array(mean, dtype=np.float64))
    weights["observations.variance"] = torch.from_numpy(np.array(variance, dtype=np.float64))
    return weights
