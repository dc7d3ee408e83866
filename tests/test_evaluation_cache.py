"""Evaluations that are cached: what is read is what would be run, and what would differ is not read."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from dmc_hub import task_evaluation
from dmc_hub.cli import main
from dmc_hub.data import Episodes, make_nav1d_dataset
from dmc_hub.evaluation import Evaluation
from dmc_hub.evaluation_cache import EpisodeRecord, EvaluationCache, controller_fingerprint
from dmc_hub.models.critic import TwinQCritic
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.pipelines import DiffusionPolicyPipeline
from dmc_hub.rollout import Lane, Rollouts, run_lanes
from dmc_hub.scheduler import TransitionScheduler
from dmc_hub.task_evaluation import evaluate_on_task
from dmc_hub.tasks import get_task

SECONDS = "wall_seconds"
TASK = get_task("nav1d-full")


def make_policy() -> DiffusionPolicyPipeline:
    torch.manual_seed(0)
    episodes = Episodes.from_dataset(make_nav1d_dataset("full", num_episodes=20))
    denoiser = DiffusionTransformer1D(1, 3, dim=32, num_heads=2, depth=1, timestep_dim=16)
    torch.nn.init.normal_(list(denoiser.parameters())[-2], std=0.3)  # the last layer starts at zero
    normalizer = Normalizer.from_data(episodes.observations, episodes.actions)
    scheduler = TransitionScheduler(num_train_timesteps=20, prediction_type="sample")
    critic = TwinQCritic(3, 1, hidden_dims=(32,))
    return DiffusionPolicyPipeline(denoiser, scheduler, normalizer, critic, horizon=1, num_inference_steps=2)


@pytest.fixture(scope="module")
def policy() -> DiffusionPolicyPipeline:
    return make_policy()


def measure(pipeline: Any, cache_dir: Path | None = None, num_episodes: int = 10, **changes: Any) -> Evaluation:
    """On Nav1D, three environments side by side unless changed."""
    options: dict[str, Any] = {"first_seed": 40, "num_candidates": 4, "action_selection": "greedy", "num_workers": 3}
    return evaluate_on_task(
        TASK, pipeline, "policy", num_episodes=num_episodes, cache_dir=cache_dir, **{**options, **changes}
    )


def content(evaluation: Evaluation) -> dict[str, Any]:
    return {name: value for name, value in evaluation.to_dict().items() if name != SECONDS}


class Runs:
    """Counts what is run, and may stop after so many episodes, as a process that is interrupted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seeds: list[int] = []
        self.stop_after: int | None = None
        monkeypatch.setattr("dmc_hub.evaluation.run_lanes", self)

    def __call__(self, lanes: Sequence[Lane], **options: Any) -> Rollouts:
        return run_lanes([dataclasses.replace(lane, on_batch=self.counted(lane)) for lane in lanes], **options)

    def counted(self, lane: Lane) -> Any:
        def on_batch(rollouts: Rollouts) -> None:
            if self.stop_after is not None and len(self.seeds) >= self.stop_after:
                raise KeyboardInterrupt
            self.seeds += rollouts.seeds.tolist()
            assert lane.on_batch is not None
            lane.on_batch(rollouts)

        return on_batch


def test_an_interrupted_evaluation_continues_and_a_repeated_one_runs_nothing(
    policy: DiffusionPolicyPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = content(measure(policy))
    runs = Runs(monkeypatch)
    runs.stop_after = 6
    with pytest.raises(KeyboardInterrupt):
        measure(policy, tmp_path)
    assert runs.seeds == list(range(40, 46))
    runs.stop_after = None
    continued = measure(policy, tmp_path)
    assert runs.seeds == list(range(40, 50))  # each once
    assert content(continued) == expected
    with pytest.raises(ValueError, match="found in a cache have no steps"):
        _ = continued.rollouts
    monkeypatch.setattr(task_evaluation, "make_vector_env", None)
    assert content(measure(policy, tmp_path)) == expected
    assert content(measure(policy, tmp_path, num_episodes=8))["returns"] == expected["returns"][:8]


def test_a_batch_is_a_function_of_its_own_seeds(policy: DiffusionPolicyPipeline) -> None:
    returns = measure(policy).outcomes
    np.testing.assert_array_equal(measure(policy, first_seed=43, num_episodes=3).outcomes, returns[3:6])
    assert (measure(policy, first_seed=41, num_episodes=9).outcomes != returns[1:]).any()  # other batches, other noise
    assert (measure(policy, generator_seed=1).outcomes != returns).any()


def test_worker_processes_change_nothing(policy: DiffusionPolicyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = content(measure(policy))
    monkeypatch.setattr(sys.modules[__name__], "TASK", dataclasses.replace(TASK, max_num_envs=3))
    assert content(measure(policy, num_workers=0)) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"num_candidates": 3},
        {"action_selection": "softmax"},
        {"generator_seed": 1},
        {"num_workers": 2},
        {"num_inference_steps": 1},
        {"early_ranking": (0.5, 0.5)},
    ],
)
def test_other_ways_to_decide_are_not_read(
    change: dict[str, Any], policy: DiffusionPolicyPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(monkeypatch)
    measure(policy, tmp_path, num_episodes=5)
    fresh = measure(policy, num_episodes=5, **change)
    runs.seeds.clear()
    assert content(measure(policy, tmp_path, num_episodes=5, **change)) == content(fresh)
    assert runs.seeds == list(range(40, 45))


def test_the_fingerprint_covers_all_that_decides() -> None:
    pipeline = make_policy()
    seen = [controller_fingerprint(pipeline)]
    assert controller_fingerprint(make_policy()) == seen[0]

    def changed() -> None:
        seen.append(controller_fingerprint(pipeline))
        assert len(set(seen)) == len(seen)

    with torch.no_grad():
        next(pipeline.critic.parameters()).add_(1e-3)
        changed()
        pipeline.normalizer.observation_shift.add_(1e-3)
        changed()
        pipeline.add_lora(LoraConfig(r=2))
        changed()
        next(p for name, p in pipeline.denoiser.named_parameters() if "lora_B" in name).add_(1e-3)
        changed()
        pipeline.set_adapters(["default"], 0.5)
        changed()
        with pipeline.lora_disabled():
            changed()
    pipeline.register_modules(scheduler=TransitionScheduler(num_train_timesteps=20, prediction_type="sample", eta=0.5))
    changed()
    pipeline.register_to_config(num_inference_steps=3)
    changed()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    cache = EvaluationCache(tmp_path, {"task": "nav1d-full"})
    record = EpisodeRecord(7, 1.5, 8, 0.25, None, 0, None, None)
    assert cache.read([7]) is None
    cache.write([record])
    assert cache.read([7]) == [record]
    assert cache.read([7, 8]) is None  # the batch was shorter
    [path] = tmp_path.rglob("7.json")
    held = json.loads(path.read_text())
    del held["episodes"][0]["length"]
    path.write_text(json.dumps(held))
    with pytest.raises(ValueError, match=r"7\.json`: episodes must hold \['seed', 'episode_return', 'length'"):
        cache.read([7])
    path.write_text(json.dumps({**held, "settings": {}}))
    with pytest.raises(ValueError, match="is not an evaluation with these settings: delete it"):
        cache.read([7])


def test_the_command_keeps_what_it_has_run(
    policy: DiffusionPolicyPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy.save_pretrained(tmp_path / "policy")
    command = ["evaluate", "--task", "nav1d-full", "--pipeline", str(tmp_path / "policy"), "--num-episodes", "4"]
    command += ["--num-candidates", "2", "--num-workers", "2", "--cache-dir", str(tmp_path / "cache")]
    runs, printed = Runs(monkeypatch), []
    for _ in range(2):
        assert main(command) == 0
        printed.append({k: v for k, v in json.loads(capsys.readouterr().out).items() if k != SECONDS})
    assert printed[0] == printed[1]
    assert runs.seeds == [2_000_000 + i for i in range(4)]
    assert main([*command[:-2], "--num-workers", "-1"]) == 2
    assert "`num_workers` must not be negative, got -1" in capsys.readouterr().err


def test_the_command_ranks_early(
    policy: DiffusionPolicyPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy.save_pretrained(tmp_path / "policy")
    command = ["evaluate", "--task", "nav1d-full", "--pipeline", str(tmp_path / "policy"), "--num-episodes", "2"]
    assert main([*command, "--num-candidates", "4", "--early-ranking", "0.5", "0.25"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["early_ranking"] == [0.5, 0.25]
    assert result["candidate_diversity"] == 0.0, "one candidate is left of four"
    assert main([*command, "--early-ranking", "0.5"]) == 2
    assert "`early_ranking` must be two shares" in capsys.readouterr().err
