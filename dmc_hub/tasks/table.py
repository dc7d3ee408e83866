"""The table of tasks: those of the tables of Huh & Mohapatra, 2025 (arXiv:2502.12198)."""

from __future__ import annotations

import functools
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import gymnasium

from dmc_hub.data.nav1d import make_nav1d_dataset, nav1d_behavior
from dmc_hub.envs import NAV1D_ID, antmaze, kitchen, nav1d, push_t
from dmc_hub.envs import metaworld as mw
from dmc_hub.envs import robosuite as rs
from dmc_hub.envs.locomotion import make_locomotion
from dmc_hub.tasks.record import Task
from dmc_hub.tasks.scores import d4rl_score, max_reward_score, share_of_subtasks, success_score

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
        make_render_env=functools.partial(gymnasium.make, NAV1D_ID, render_mode="rgb_array"),
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
        policy_horizon=1,
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
                make_render_env=functools.partial(make_locomotion, name, "rgb_array"),
                max_episode_steps=1000,
                observation_dim=observation_dim,
                action_dim=action_dim,
                extras=("mujoco",),
                reward="forward velocity, a healthy reward where the robot can fall, minus a cost of control",
                score=functools.partial(d4rl_score, low=low, high=high),
                score_name="D4RL's normalised score",
                expert_score=100.0,
                reader="d4rl",
                data_hint=f"read D4RL's {short}-{quality}-v2.hdf5 (http://rail.eecs.berkeley.edu/datasets/offline_rl/"
                f"gym_mujoco_v2/{short}_{quality.replace('-', '_')}-v2.hdf5), or make your own set by `dmc-hub data "
                f"collect --task {short}-{quality}`.",
                behavior=quality,
                horizon=16,
                policy_horizon=4,
                num_action_steps=4,
            )


def _push_t_task(kind: str) -> Task:
    is_image = kind == "image"
    name = "push-t-image" if is_image else "push-t"
    return Task(
        name=name,
        summary=f"push a T onto its goal, seen as {'an image' if is_image else 'a state of 5 numbers'}; human data",
        env_id="gym_pusht/PushT-v0",
        make_env=push_t.PushTImageEnv if is_image else push_t.PushTEnv,
        make_render_env=None if is_image else push_t.PushTEnv,
        max_num_envs=16 if is_image else 64,
        max_episode_steps=push_t.MAX_EPISODE_STEPS,
        observation_dim=None if is_image else push_t.STATE_DIM,
        action_dim=push_t.ACTION_DIM,
        extras=("robotics",),
        reward="coverage of the goal over 0.95, clipped to [0, 1]",
        success="any step",
        score=max_reward_score,
        score_name="maximal coverage over 0.95",
        objective="score",
        reader="zarr",
        reader_options={"reward": push_t.push_t_reward, "image_keys": ("img",) if is_image else ()},
        state_dim=2 if is_image else None,
        cameras={"image": "img"} if is_image else {},
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
        make_render_env=functools.partial(mw.MetaWorldEnv, name, "rgb_array"),
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
        behavior="scripted",
        allowed_defects=("constant-dimension", "duplicate-episode"),  # the same start, the same script
        horizon=16,
        policy_horizon=8,
        num_action_steps=4,
    )


def _antmaze_task(maze: str, goals: str) -> Task:
    name = f"antmaze-{maze}-{goals}"
    data = "walks between hand-picked cells" if goals == "play" else "walks between random cells"
    return Task(
        name=name,
        summary=f"an ant walks through the {maze} maze (not D4RL's ant: never beside D4RL's scores); data: {data}",
        env_id=f"AntMaze_{maze.capitalize()}-v4",
        make_env=functools.partial(antmaze.AntMazeEnv, maze),
        make_render_env=functools.partial(antmaze.AntMazeEnv, maze, "rgb_array"),
        max_episode_steps=antmaze.MAX_EPISODE_STEPS,
        observation_dim=antmaze.OBSERVATION_DIM,
        action_dim=antmaze.ACTION_DIM,
        extras=("robotics",),
        reward="1 at the goal, else 0",
        success="any step",
        score=functools.partial(success_score, when="any step", scale=100.0),
        score_name="100 × success rate",
        expert_score=100.0,
        reader="d4rl",
        data_hint=f"read D4RL's {name}-v2 (Minari: D4RL/antmaze/{maze}-{goals}-v1), or collect your own.",
        horizon=64,
        policy_horizon=8,
        num_action_steps=4,
        discount=0.995,
        expectile=0.9,
    )


def _kitchen_task(kind: str) -> Task:
    is_relay = kind == "relay"
    subtasks = kitchen.SUBTASKS[kind]
    score: Any = functools.partial(share_of_subtasks, num_subtasks=len(subtasks))
    return Task(
        name="relay-kitchen" if is_relay else f"kitchen-{kind}",
        summary=f"a Franka arm in a kitchen: {', '.join(subtasks)}",
        env_id="FrankaKitchen-v1",
        make_env=functools.partial(kitchen.KitchenEnv, kind),
        make_render_env=functools.partial(kitchen.KitchenEnv, kind, "rgb_array"),
        max_num_envs=16,
        max_episode_steps=kitchen.MAX_EPISODE_STEPS,
        observation_dim=kitchen.OBSERVATION_DIM,
        action_dim=kitchen.ACTION_DIM,
        extras=("robotics",),
        reward="number of subtasks completed in the step",
        success="any step",
        score=functools.partial(success_score, when="any step") if is_relay else score,
        score_name="p4, the share of episodes with four subtasks" if is_relay else "25 × completed subtasks",
        expert_score=1.0 if is_relay else 100.0,
        reader="relay-kitchen" if is_relay else "d4rl",
        data_hint="read Relay Policy Learning's demonstrations (in "
        "https://diffusion-policy.cs.columbia.edu/data/training/kitchen.zip)."
        if is_relay
        else f"read D4RL's kitchen-{kind}-v0 (Minari: D4RL/kitchen/{kind}-v2).",
        controllers=("policy",) if is_relay else ("planner", "decision_diffuser", "policy"),
        horizon=16 if is_relay else 32,
        num_observation_steps=2 if is_relay else 1,
        num_action_steps=8 if is_relay else 1,
    )


_ROBOMIMIC_STEPS = {"ph": {"transport": 700}, "mh": {"transport": 1100, "lift": 500, "can": 500, "square": 500}}


def _robomimic_task(name: str, operators: str, images: bool) -> Task:
    task = rs.ROBOSUITE_TASKS[name]
    max_episode_steps = _ROBOMIMIC_STEPS[operators].get(name, 400)
    views = [f"{camera}_image" for camera in task.cameras] if images else []
    cameras = {f"image_{i}" if i else "image": view for i, view in enumerate(views)}
    people = "one proficient operator" if operators == "ph" else "six operators of different skill"
    return Task(
        name=f"robomimic-{name}-{operators}{'-image' if images else ''}",
        summary=f"robosuite's {task.name}{', seen by cameras' if images else ''}; data: {people}",
        env_id=f"robosuite {task.name}",
        make_env=functools.partial(rs.RobosuiteEnv, name, max_episode_steps, images),
        max_num_envs=4 if images else 16,
        max_episode_steps=max_episode_steps,
        observation_dim=None if images else task.object_dim + task.robot_dim,
        state_dim=task.robot_dim if images else None,
        cameras=cameras,
        action_dim=task.action_dim,
        extras=("robosuite",),
        reward="1 while the task is solved, else 0",
        success="any step",
        score=functools.partial(success_score, when="any step"),
        score_name="success rate",
        reader="robomimic",
        reader_options={
            "observation_keys": task.robot_keys if images else task.observation_keys,
            "image_keys": tuple(views),
        },
        data_hint=f"read robomimic's {name}/{operators}/{'image' if images else 'low_dim'}_v141.hdf5 "
        "(https://robomimic.github.io/docs/datasets/robomimic_v0.1.html).",
        controllers=("policy",),
        horizon=16,
        num_observation_steps=2,
        num_action_steps=8,
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
        *(_antmaze_task(maze, goals) for maze in antmaze.MAZES for goals in ("play", "diverse")),
        *(_kitchen_task(kind) for kind in kitchen.SUBTASKS),
        *(
            _robomimic_task(name, operators, images)
            for images in (False, True)
            for name in rs.ROBOSUITE_TASKS
            for operators in ("ph", "mh")
        ),
    )
}


def get_task(name: str) -> Task:
    """The task called `name`, or a user's own: `path/to/file.py:VARIABLE`, whose code is run.

    Raises:
        ValueError: unknown, the message lists the known ones; or the variable holds no `Task`.
        FileNotFoundError: there is no such file.
    """
    path, separator, variable = name.rpartition(":")
    if separator and path.endswith(".py"):
        return _own_task(Path(path), variable)
    if name not in TASKS:
        raise ValueError(f"`task` {name!r} is unknown; known tasks: {', '.join(TASKS)}.")
    return TASKS[name]


@functools.lru_cache(maxsize=8)
def _own_task(path: Path, variable: str) -> Task:
    if not path.is_file():
        raise FileNotFoundError(f"`task` {path}:{variable}: there is no file {path}.")
    task = runpy.run_path(str(path)).get(variable)
    if not isinstance(task, Task):
        raise ValueError(f"`task` {path}:{variable} must be a `dmc_hub.tasks.Task`, got {type(task).__name__}.")
    if task.name in TASKS:
        raise ValueError(
            f"`task` {path}:{variable} is called {task.name!r}, like a built-in one: give it another name."
        )
    return task
