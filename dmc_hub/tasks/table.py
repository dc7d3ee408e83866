"""The table of tasks: those of the tables of Huh & Mohapatra, 2025 (arXiv:2502.12198)."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import datasets
import gymnasium

from dmc_hub.data.nav1d import make_nav1d_dataset, nav1d_behavior
from dmc_hub.envs import NAV1D_ID, nav1d, push_t
from dmc_hub.envs import metaworld as mw
from dmc_hub.envs.locomotion import make_locomotion
from dmc_hub.tasks.record import Task
from dmc_hub.tasks.scores import d4rl_score, max_reward_score, success_score

D4RL_RETURNS = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
}
"""Returns of a random policy and of an expert: `d4rl/infos.py` of D4RL (Fu et al., 2020, arXiv:2004.07219)."""

_LOCOMOTION = {"halfcheetah": ("HalfCheetah", 17, 6), "hopper": ("Hopper", 11, 3), "walker2d": ("Walker2d", 17, 6)}
_QUALITIES = {
    "random": "a random policy",
    "medium": "a policy stopped at about a third of the expert's score",
    "medium-replay": "all that was seen while the medium policy was trained",
    "medium-expert": "the medium and the expert policy, half and half",
}


def _nav1d_task(variant: str, data: str) -> Task:
    return Task(
        name=f"nav1d-{variant}",
        summary=f"1-D navigation, 8 steps, moving targets; data: {data}",
        env_id=NAV1D_ID,
        make_env=functools.partial(gymnasium.make, NAV1D_ID),
        make_vector=functools.partial(gymnasium.make_vec, NAV1D_ID),
        max_episode_steps=nav1d.HORIZON,
        observation_dim=nav1d.OBSERVATION_DIM,
        action_dim=nav1d.ACTION_DIM,
        reward="closeness to a target that moves at every step, in (0, 1]",
        make_dataset=functools.partial(_nav1d_dataset, variant),
        optimal_return=nav1d.optimal_return,
        dynamics=nav1d.planned_next_positions,
        behavior_log_prob=nav1d_behavior(variant),
        horizon=nav1d.HORIZON,
        discount=0.99,
    )


def _nav1d_dataset(variant: str, seed: int) -> datasets.Dataset:
    return make_nav1d_dataset(variant, num_episodes=4000, seed=seed)


def _locomotion_tasks() -> Iterator[Task]:
    for short, (name, observation_dim, action_dim) in _LOCOMOTION.items():
        low, high = D4RL_RETURNS[short]
        for quality, policy in _QUALITIES.items():
            yield Task(
                name=f"{short}-{quality}",
                summary=f"Gymnasium's {name}-v4: run forward; data: {policy}",
                env_id=f"{name}-v4",
                make_env=functools.partial(make_locomotion, name),
                max_episode_steps=1000,
                observation_dim=observation_dim,
                action_dim=action_dim,
                extras=("mujoco",),
                reward="forward velocity, a healthy reward where the robot can fall, minus a cost of control",
                score=functools.partial(d4rl_score, low=low, high=high),
                score_name="D4RL's normalised score",
                reader="d4rl_hdf5",
                data_hint=f"read D4RL's {short}-{quality}-v2.hdf5 (http://rail.eecs.berkeley.edu/datasets/offline_rl/"
                f"gym_mujoco_v2/{short}_{quality.replace('-', '_')}-v2.hdf5), or make your own set by `dmc-hub data "
                f"collect --task {short}-{quality}`.",
                horizon=4 if short == "halfcheetah" else 32,
            )


def _push_t_task(kind: str) -> Task:
    is_image = kind == "image"
    name = "push-t-image" if is_image else "push-t"
    return Task(
        name=name,
        summary=f"push a T onto its goal, seen as {'an image' if is_image else 'a state of 5 numbers'}; human data",
        env_id="gym_pusht/PushT-v0",
        make_env=push_t.PushTImageEnv if is_image else push_t.PushTEnv,
        max_num_envs=16 if is_image else 64,
        max_episode_steps=push_t.MAX_EPISODE_STEPS,
        observation_dim=None if is_image else push_t.STATE_DIM,
        action_dim=push_t.ACTION_DIM,
        extras=("robotics",),
        reward="coverage of the goal over 0.95, clipped to [0, 1]",
        success="any step",
        score=max_reward_score,
        score_name="maximal reward",
        reader="diffusion_policy_zarr",
        reader_options={"reward": push_t.push_t_reward, "images": ("img",) if is_image else ()},
        data_hint="read Diffusion Policy's pusht_cchi_v7_replay.zarr (in "
        "https://diffusion-policy.cs.columbia.edu/data/training/pusht.zip).",
        controllers=("policy",) if is_image else ("planner", "decision_diffuser", "policy"),
        horizon=16,
        num_observation_steps=2,
        num_action_steps=8,
    )


def _metaworld_task(name: str) -> Task:
    return Task(
        name=f"metaworld-{name}",
        summary=f"MetaWorld's {name}-v3, 50 positions of object and goal; data: graded scripted experts",
        env_id=f"Meta-World/MT1 {name}-v3",
        make_env=functools.partial(mw.MetaWorldEnv, name),
        max_num_envs=32,
        max_episode_steps=mw.MAX_EPISODE_STEPS,
        observation_dim=mw.OBSERVATION_DIM,
        action_dim=mw.ACTION_DIM,
        extras=("robotics",),
        reward="MetaWorld's shaped reward, in [0, 10] per step",
        success="any step",
        score=functools.partial(success_score, when="any step"),
        score_name="success rate",
        data_hint=f"make it by `dmc-hub data collect --task metaworld-{name}`.",
        horizon=16,
        num_action_steps=4,
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _nav1d_task("full", "a uniform random policy"),
        _nav1d_task("partial", "the same, only episodes that stay in [0, 1]"),
        _nav1d_task("expert", "the optimal policy with action noise 0.1"),
        *_locomotion_tasks(),
        _push_t_task("state"),
        _push_t_task("image"),
        *(_metaworld_task(name) for name in mw.TASK_NAMES),
    )
}


def get_task(name: str) -> Task:
    """The task called `name`.

    Raises:
        ValueError: unknown; the message lists the known ones.
    """
    if name not in TASKS:
        raise ValueError(f"`task` {name!r} is unknown; known tasks: {', '.join(TASKS)}.")
    return TASKS[name]
