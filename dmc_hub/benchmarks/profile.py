"""The most expensive operations of each path, and what was done about them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from transformers import TrainerCallback, TrainerControl, TrainerState

from dmc_hub.benchmarks.data import synthetic_episodes
from dmc_hub.benchmarks.plan import PlannerSizes
from dmc_hub.benchmarks.rollout import SIZES, make_envs
from dmc_hub.benchmarks.timing import machine
from dmc_hub.profiling import most_expensive, tracer
from dmc_hub.rewards import critic_reward
from dmc_hub.rollout import run_episodes
from dmc_hub.trainers.denoising import DenoisingConfig, DenoisingTrainer
from dmc_hub.trainers.nft import NFTConfig, NFTTrainer

WARM_UP, NUM_DATA_STEPS = 2, 10_000
PATHS = {
    "plan": "one plan, eager",
    "act": "one decision among 64 candidates, eager",
    "train": "a step of the denoising trainer, batch 64",
    "align": "a step of the NFT trainer, sampling included",
    "rollout": "16 episodes of Nav1D in this process, planned side by side",
}
_OWN = "the network's own arithmetic; `compile()` keeps its weights in the layout of its inputs"
_DISPATCH = "a convolution over time on its way to one over two dimensions; the compiled form has these from the start"
_FUSED = "`compile()` fuses it with what lies around it"
_TRAINED = "nothing: trainers compute through the network as it is, so that a ratio on policy stays exactly 1"
DONE = {
    "aten::mkldnn_convolution": _OWN,
    "aten::_slow_conv2d_forward": "what eager torch takes for a batch of one; `compile()` has oneDNN's instead",
    "aten::slow_conv_transpose2d": "`compile()` computes it as a plain convolution",
    "aten::addmm": _OWN,
    **dict.fromkeys(("aten::_convolution", "aten::convolution", "aten::conv1d"), _DISPATCH),
    **dict.fromkeys(("aten::unsqueeze", "aten::squeeze", "aten::reshape", "aten::as_strided"), _DISPATCH),
    **dict.fromkeys(("aten::empty", "aten::as_strided_", "aten::view"), _DISPATCH),
    "aten::mish": "`compile()` computes it with one exponential, in one pass with the norm before it",
    **dict.fromkeys(("aten::native_group_norm", "aten::group_norm", "aten::add", "aten::mul", "aten::cat"), _FUSED),
    "aten::copy_": "the condition is repeated once per decision; `compile()` fuses the rest",
    **dict.fromkeys((f"aten::{name}_backward" for name in ("convolution", "mish", "native_group_norm")), _TRAINED),
    "aten::_fused_adamw_": "one call for all weights",
    "aten::linalg_vector_norm": "of the gradients, to clip them; the pass that multiplies them by 1 is left out",
}
"""By operation."""


def measure_profiles(
    *,
    sizes: PlannerSizes = PlannerSizes(),  # noqa: B008 (frozen)
    batch_size: int = 64,
    repeats: int = 5,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """`operations` of `PATHS`, `milliseconds` of wall time of one repeat while it is traced, and the share of it that
    is spent `outside` of torch's operations: in Python, NumPy, environments.

    `batch_size` is that of training, the number of candidates of a decision, and four times that of the conditions of
    alignment and of the environments.
    """
    profiles = {
        "plan": _of_calls(_decision(sizes, 1, device, seed), repeats),
        "act": _of_calls(_decision(sizes, batch_size, device, seed), repeats),
        "train": _of_training(sizes, batch_size, repeats, device, seed),
        "align": _of_alignment(sizes, batch_size, repeats, device, seed),
        "rollout": _of_calls(_episodes(max(1, batch_size // 4), device, seed), repeats),
    }
    return {"machine": machine(device), "sizes": vars(sizes), "profiles": profiles}


class _Window:
    """Traces from `start` to `end`."""

    def start(self) -> None:
        self._profiler = tracer()
        self._profiler.start()
        self._started = time.perf_counter()

    def end(self, repeats: int) -> dict[str, Any]:
        seconds = time.perf_counter() - self._started
        self._profiler.stop()
        inside = sum(event.self_cpu_time_total for event in self._profiler.key_averages()) / 1e6
        return {
            "repeats": repeats,
            "milliseconds": round(1e3 * seconds / repeats, 3),
            "outside": round(max(0.0, 1 - inside / seconds), 4),
            "operations": most_expensive(self._profiler),
        }


def _of_calls(run: Callable[[], Any], repeats: int) -> dict[str, Any]:
    for _ in range(WARM_UP):
        run()
    window = _Window()
    window.start()
    for _ in range(repeats):
        run()
    return window.end(repeats)


class _Traced(TrainerCallback):
    """Traces the steps of a trainer after the first."""

    def __init__(self, repeats: int) -> None:
        self.repeats, self.window = repeats, _Window()
        self.result: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self.window.start()
        elif state.global_step == WARM_UP + self.repeats:
            self.result = self.window.end(self.repeats)


def _of_training(sizes: PlannerSizes, batch_size: int, repeats: int, device: str, seed: int) -> dict[str, Any]:
    config = DenoisingConfig(per_device_train_batch_size=batch_size, **_common(repeats, device, seed))
    traced, pipeline = _Traced(repeats), sizes.build(device=device, seed=seed)
    DenoisingTrainer(
        pipeline, config, train_dataset=synthetic_episodes(NUM_DATA_STEPS, seed), callbacks=[traced]
    ).train()
    return traced.result


def _of_alignment(sizes: PlannerSizes, batch_size: int, repeats: int, device: str, seed: int) -> dict[str, Any]:
    traced, pipeline = _Traced(repeats), sizes.build(device=device, seed=seed)
    few: dict[str, Any] = {"per_device_train_batch_size": batch_size, "num_conditions": max(1, batch_size // 4)}
    NFTTrainer(
        pipeline,
        NFTConfig(num_inference_steps=10, **few, **_common(repeats, device, seed)),
        train_dataset=synthetic_episodes(NUM_DATA_STEPS, seed),
        reward_function=critic_reward(pipeline),
        peft_config=LoraConfig(r=16),
        callbacks=[traced],
    ).train()
    return traced.result


def _common(repeats: int, device: str, seed: int) -> dict[str, Any]:
    common: dict[str, Any] = {"output_dir": None, "seed": seed, "use_cpu": device == "cpu", "disable_tqdm": True}
    return {**common, "max_steps": WARM_UP + repeats}


def _decision(sizes: PlannerSizes, num_candidates: int, device: str, seed: int) -> Callable[[], Any]:
    planner, observation = sizes.build(device=device, seed=seed), sizes.observation(seed)
    return lambda: planner(observation, num_candidates=num_candidates, generator=seed)


def _episodes(num_envs: int, device: str, seed: int) -> Callable[[], Any]:
    planner, vector_env = SIZES.build(device=device, seed=seed), make_envs(num_envs, in_workers=False)

    def controller(observations: Any, generator: torch.Generator | None) -> np.ndarray:
        return planner(observations, generator=generator).action

    def run() -> None:
        run_episodes(controller, vector_env, seeds=range(num_envs), generator=torch.Generator().manual_seed(seed))

    return run


def profile_tables(profiles: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown: of each path its operations, with what was done about them."""
    lines = []
    for path, profile in profiles.items():
        outside = f"{profile['outside']:.0%} of the time is spent outside of torch's operations."
        lines += ["", f"Most expensive in **{path}**, {PATHS[path]}; {outside}", ""]
        lines += ["| operation | calls | share of the operations' time | what was done |", "|---|---|---|---|"]
        for row in profile["operations"]:
            done = DONE.get(row["name"], "nothing")
            if path in ("train", "align") and "compile" in done:
                done = _TRAINED
            lines.append(f"| `{row['name'][:60]}` | {row['calls']:,} | {row['share']:.1%} | {done} |")
    return lines
