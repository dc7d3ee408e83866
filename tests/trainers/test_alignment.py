"""SequentialAligner: stages, decisions, rollback, and the continuation of an interrupted run."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from dmc_hub import checkpoint
from dmc_hub.data import Episodes
from dmc_hub.errors import SaveError
from dmc_hub.trainers.alignment import AlignmentConfig, SequentialAligner, StageResult
from dmc_hub.trainers.dpo import DiffusionDPOConfig, DiffusionDPOTrainer
from dmc_hub.trainers.reward_gradient import RewardGradientConfig
from dmc_hub.trainers.sft import SFTConfig

MakePipeline = Callable[..., Any]
SMALL: dict[str, Any] = {"output_dir": None, "disable_tqdm": True, "max_steps": 10, "per_device_train_batch_size": 16}


def stage_configs(**reward_gradient: Any) -> dict[str, Any]:
    return {
        "reward_gradient": RewardGradientConfig(**{**SMALL, "learning_rate": 1e-2, **reward_gradient}),
        "dpo": DiffusionDPOConfig(**SMALL, num_conditions=16),
        "sft": SFTConfig(**SMALL, num_conditions=16, num_candidates=4),
    }


def prefers_positive(observations: Tensor, actions: Tensor) -> Tensor:
    return -(actions[:, 0, 0] - 0.8).abs()


def mean_action_validation(episodes: Episodes) -> Callable[[Any], dict[str, float]]:
    observations = episodes.observations[:128]

    def validate(pipeline: Any) -> dict[str, float]:
        actions = pipeline(observations, generator=0).action
        rewards = 2 - np.abs(actions - 0.8)
        return {"return_mean": float(rewards.mean()), "return_std": float(rewards.std())}

    return validate


def make_aligner(
    pipeline: Any, episodes: Episodes, output_dir: Path | None = None, configs: Any = None, **settings: Any
) -> SequentialAligner:
    return SequentialAligner(
        pipeline,
        AlignmentConfig(
            output_dir=None if output_dir is None else str(output_dir),
            **{
                "methods": ["reward_gradient", "dpo", "sft"],
                "max_passes": 1,
                "validations_per_stage": 1,
                "num_retries": 0,
                "max_return_drop": 0.05,
                **settings,
            },
        ),
        train_dataset=episodes,
        validate=mean_action_validation(episodes),
        stage_configs=configs or stage_configs(),
        reward_function=prefers_positive,
    )


def adapter(pipeline: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in pipeline.denoiser.state_dict().items() if ".lora_" in k}


class Stop(TrainerCallback):
    """Dies at one validated step of one stage, before or after its checkpoint is written."""

    def __init__(self, stage: int, step: int, event: str) -> None:
        self.stage, self.step, self.event, self.started = stage, step, event, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started += 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._die("begin", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._die("end", state.global_step)

    def _die(self, event: str, step: int) -> None:
        if (self.stage, self.step, self.event) == (self.started, step, event):
            raise KeyboardInterrupt


def without_time(results: list[StageResult]) -> list[dict[str, Any]]:
    return [{**vars(row), "wall_seconds": 0.0, "train_metrics": {}} for row in results]


def test_a_pass_improves_and_ends_at_its_best_state(
    make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    pipeline = make_pipeline("policy")
    results = make_aligner(pipeline, episodes, tmp_path).run()
    assert [row.name for row in results] == ["foundation", "reward_gradient", "dpo", "sft"]
    best = max(row.return_mean for row in results if row.decision != "rolled back")
    assert best > results[0].return_mean + 0.2
    assert mean_action_validation(episodes)(pipeline)["return_mean"] == best
    log = [json.loads(line) for line in (tmp_path / "alignment_log.jsonl").read_text().splitlines()]
    assert [row["decision"] for row in log] == [*(row.decision for row in results), "stopped"]
    assert log[-1]["reason"] == "all 1 passes are done"


def test_nan_ends_in_rollback_with_its_reason(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    """A learning rate of 1e30 overflows the weights after one step."""
    pipeline = make_pipeline("policy")
    results = make_aligner(pipeline, episodes, configs=stage_configs(learning_rate=1e30)).run()
    assert results[1].decision == "rolled back"
    assert "the loss is nan" in results[1].reason or "NaN or infinite actions" in results[1].reason
    assert results[1].return_mean == results[0].return_mean
    assert all(torch.isfinite(value).all() for value in adapter(pipeline).values())
    assert results[2].decision in ("kept", "rolled back")  # the next stage ran from the restored state


def test_a_lost_return_and_a_lost_coherency_are_rolled_back(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    measured = iter([(5.0, 0.9), (4.0, 0.9), (6.0, 0.5), (6.0, 0.85)])

    def validate(pipeline: Any) -> dict[str, float]:
        mean, coherency = next(measured)
        return {"return_mean": mean, "return_std": 0.0, "coherency": coherency}

    aligner = make_aligner(make_pipeline("policy"), episodes, bound_bisections=0)
    aligner.validate = validate
    # after a rollback nothing is validated again: the measurement is the stage's own
    results = aligner.run()
    assert [row.decision for row in results] == ["start", "rolled back", "rolled back", "kept"]
    assert "return 4.000 fell below 4.750" in results[1].reason
    assert "coherency 0.500 fell below 0.810" in results[2].reason


def test_an_interrupted_alignment_continues_and_ends_the_same(
    make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    whole = make_pipeline("policy")
    expected = make_aligner(whole, episodes, tmp_path / "whole").run()

    interrupted = make_aligner(make_pipeline("policy"), episodes, tmp_path / "cut")
    train = interrupted._train

    def die_in_the_second_stage(trainer: Any, watch: Any) -> None:
        if isinstance(trainer, DiffusionDPOTrainer):
            raise KeyboardInterrupt
        train(trainer, watch)

    interrupted._train = die_in_the_second_stage  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()

    resumed = make_pipeline("policy")
    results = make_aligner(resumed, episodes, tmp_path / "cut").run()
    assert without_time(results) == without_time(expected)
    for name, value in adapter(whole).items():
        assert torch.equal(value, adapter(resumed)[name]), name


def test_unknown_methods_and_foreign_configs_are_refused(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    with pytest.raises(ValueError, match=r"`methods` must be a list of ddpo, .*; got \['ppo'\]"):
        AlignmentConfig(methods=["ppo"])
    with pytest.raises(ValueError, match="`stage_configs` has 'dpo': SFTConfig"):
        make_aligner(make_pipeline("policy"), episodes, configs={"dpo": SFTConfig(**SMALL)})


@pytest.mark.parametrize(("stage", "step", "event"), [(1, 6, "begin"), (1, 6, "end"), (2, 9, "begin"), (2, 10, "end")])
def test_a_stage_continues_from_its_last_checkpoint(
    stage: int, step: int, event: str, make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    """`begin` dies after the checkpoint of that step, if it has one, `end` after its validation and before it."""
    settings: dict[str, Any] = {"validations_per_stage": 4, "methods": ["reward_gradient", "dpo"]}
    whole = make_pipeline("policy")
    expected = make_aligner(whole, episodes, tmp_path / "whole", **settings).run()
    interrupted = make_aligner(make_pipeline("policy"), episodes, tmp_path / "cut", **settings)
    stop = Stop(stage, step, event)
    interrupted.callbacks = [stop]
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    work = next((tmp_path / "cut" / "unfinished").iterdir())
    assert checkpoint.checkpoints(str(work))
    resumed = make_pipeline("policy")
    results = make_aligner(resumed, episodes, tmp_path / "cut", **settings).run()
    assert without_time(results) == without_time(expected)
    assert len(results[1].validations) == 4
    for name, value in adapter(whole).items():
        assert torch.equal(value, adapter(resumed)[name]), name
    assert not list((tmp_path / "cut" / "unfinished").iterdir())


@pytest.mark.parametrize(
    ("place", "on_save_error"),
    [
        ("stages/.01-reward", "raise"),
        ("stages/.01-reward", "warn"),
        ("unfinished/01-reward", "warn"),
        ("alignment_log", "warn"),
    ],
)
def test_what_cannot_be_written_ends_the_run_or_the_writing(
    place: str,
    on_save_error: str,
    make_pipeline: MakePipeline,
    episodes: Episodes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever: with room again, a run in the same folder goes on and ends as one that always had room."""
    settings: dict[str, Any] = {"validations_per_stage": 2, "methods": ["reward_gradient", "dpo"]}
    whole = make_pipeline("policy")
    expected = make_aligner(whole, episodes, tmp_path / "whole", **settings).run()
    write, folder = checkpoint.write_text, tmp_path / "cut"

    def on_a_full_disk(path: Path, text: str) -> None:
        if place in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    monkeypatch.setattr(checkpoint, "write_text", on_a_full_disk)
    first = make_pipeline("policy")
    aligner = make_aligner(first, episodes, folder, on_save_error=on_save_error, **settings)
    if on_save_error == "raise":
        with pytest.raises(SaveError, match=r"cannot be written \(.*No space left on device.*bytes free"):
            aligner.run()
    else:
        with pytest.warns(UserWarning, match="Alignment goes on, and writes no more stages: `.*cannot be written"):
            assert without_time(aligner.run()) == without_time(expected)
        assert all(torch.equal(value, adapter(first)[name]) for name, value in adapter(whole).items())
    monkeypatch.setattr(checkpoint, "write_text", write)
    assert not (folder / "stages" / "02-dpo").exists()
    resumed = make_pipeline("policy")
    assert without_time(make_aligner(resumed, episodes, folder, **settings).run()) == without_time(expected)
    assert all(torch.equal(value, adapter(resumed)[name]) for name, value in adapter(whole).items())


class Script:
    """A validation that returns what it was told, one row after the other."""

    def __init__(self, *rows: Any) -> None:
        self.rows = list(rows)

    def __call__(self, pipeline: Any) -> dict[str, float]:
        row = self.rows.pop(0)
        mean, coherency = row if isinstance(row, tuple) else (row, 1.0)
        return {"return_mean": mean, "return_std": 0.0, "coherency": coherency}


def scripted(pipeline: Any, episodes: Episodes, *rows: Any, **settings: Any) -> SequentialAligner:
    aligner = make_aligner(
        pipeline, episodes, **{"methods": ["reward_gradient"], "validations_per_stage": 4, **settings}
    )
    aligner.validate = Script(*rows)
    return aligner


def test_a_stage_ends_at_its_best_validation_once_it_has_converged(
    make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    aligner = scripted(make_pipeline("policy"), episodes, 5.0, 6.0, 5.9, 5.9)
    result = aligner.run()[1]
    assert (result.decision, result.return_mean, result.num_steps) == ("kept", 6.0, 9)
    assert result.reason == "within bounds at step 3; converged: 2 validations without a better return"


def test_a_bound_ends_a_stage_near_to_it(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    """Two halvings: the adapter halfway from step 3 to step 6 keeps the bound, the one at three quarters does not."""
    pipeline = make_pipeline("policy")
    rows = [(5.0, 0.9), (6.0, 0.9), (7.0, 0.7), (6.5, 0.85), (6.8, 0.75)]
    aligner = scripted(pipeline, episodes, *rows, bound_bisections=2)
    states = []

    def validate(controller: Any, script: Any = aligner.validate) -> dict[str, float]:
        states.append(adapter(controller))
        return script(controller)

    aligner.validate = validate
    result = aligner.run()[1]
    assert (result.decision, result.return_mean, result.num_steps) == ("kept", 6.5, 6)
    assert result.reason == "within bounds at step 4; coherency 0.700 fell below 0.810"
    _, inside, outside, half, three_quarters = states
    for name, kept in adapter(pipeline).items():
        torch.testing.assert_close(half[name], (inside[name] + outside[name]) / 2)
        torch.testing.assert_close(three_quarters[name], (half[name] + outside[name]) / 2)
        torch.testing.assert_close(kept, half[name], rtol=0, atol=0)


def test_a_stage_that_leaves_a_bound_at_once_ends_between_it_and_its_start(
    make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    aligner = scripted(
        make_pipeline("policy"), episodes, (5.0, 0.9), (7.0, 0.7), (6.0, 0.8), (5.5, 0.9), bound_bisections=2
    )
    result = aligner.run()[1]
    assert (result.decision, result.return_mean) == ("kept", 5.5)


def test_a_bisection_is_repeated_when_it_was_interrupted(
    make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    rows = [(5.0, 0.9), (6.0, 0.9), (7.0, 0.7), (6.5, 0.85), (6.8, 0.75)]
    whole = make_pipeline("policy")
    expected = scripted(whole, episodes, *rows, bound_bisections=2, output_dir=tmp_path / "whole").run()
    with pytest.raises(IndexError):
        scripted(make_pipeline("policy"), episodes, *rows[:3], bound_bisections=2, output_dir=tmp_path / "cut").run()
    resumed = make_pipeline("policy")
    results = scripted(resumed, episodes, *rows[3:], bound_bisections=2, output_dir=tmp_path / "cut").run()
    assert without_time(results) == without_time(expected)
    for name, value in adapter(whole).items():
        assert torch.equal(value, adapter(resumed)[name]), name


def test_a_collapse_is_tried_again_at_a_lower_learning_rate(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    aligner = scripted(make_pipeline("policy"), episodes, 5.0, 3.0, 5.5, 5.6, 5.7, 5.8, num_retries=1)
    result = aligner.run()[1]
    assert (result.decision, result.return_mean) == ("kept", 5.8)
    assert result.retries == ["return 3.000 fell below 4.000"]
    assert result.learning_rate == pytest.approx(0.3 * 1e-2)


def test_after_the_retries_a_collapsed_stage_is_given_up(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    pipeline = make_pipeline("policy")
    aligner = scripted(pipeline, episodes, 5.0, 3.0, 3.5, num_retries=1)
    result = aligner.run()[1]
    assert (result.decision, result.reason) == ("rolled back", "return 3.500 fell below 4.000")
    assert all(float(value.abs().max()) == 0 for name, value in adapter(pipeline).items() if "lora_B" in name)


def test_a_method_that_was_rolled_back_is_skipped(
    make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"methods": ["reward_gradient", "dpo"], "validations_per_stage": 1, "max_passes": 3}
    rows = (5.0, 6.0, 5.0, 7.0, 7.01)
    pipeline = make_pipeline("policy")
    expected = scripted(pipeline, episodes, *rows, output_dir=tmp_path, **settings).run()
    decisions = ["start", "kept", "rolled back", "kept", "skipped", "kept", "skipped"]
    assert [row.decision for row in expected] == decisions
    assert [row.return_mean for row in expected[3:]] == [7.0, 7.0, 7.01, 7.01]
    assert expected[4].num_steps == 0
    resumed = make_pipeline("policy")
    assert without_time(scripted(resumed, episodes, output_dir=tmp_path, **settings).run()) == without_time(expected)
    for name, value in adapter(pipeline).items():
        assert torch.equal(value, adapter(resumed)[name]), name


def test_a_method_has_as_many_chances_as_it_is_given(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    settings: dict[str, Any] = {"validations_per_stage": 1, "max_passes": 4, "min_gain": 0.0, "num_rollbacks": 2}
    aligner = scripted(make_pipeline("policy"), episodes, 5.0, 4.0, 6.0, 5.0, 5.0, **settings)
    assert [row.decision for row in aligner.run()] == ["start", "rolled back", "kept", "rolled back", "rolled back"]


def test_passes_go_on_until_one_gains_too_little(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    settings: dict[str, Any] = {"validations_per_stage": 1, "max_passes": 5, "min_gain": 0.05}
    aligner = scripted(make_pipeline("policy"), episodes, 5.0, 6.0, 7.0, 7.3, **settings)
    assert [row.return_mean for row in aligner.run()] == [5.0, 6.0, 7.0, 7.3]
    assert aligner.end_reason == "pass 3 raised the return by 4.3%, less than 5.0%"


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ({"max_divergence": 0.2}, r"divergence 0\.\d+ rose above 0.200"),
        ({"min_diversity": 0.9}, "diversity .* fell below"),
    ],
)
def test_divergence_and_diversity_keep_their_bounds(
    bound: dict[str, Any], message: str, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    """Without the bound the same stage goes beyond it."""
    settings: dict[str, Any] = {"methods": ["reward_gradient"], "validations_per_stage": 10, "patience": 10}
    settings["configs"] = stage_configs(learning_rate=1e-3, max_steps=60)

    def foundation_of_noise() -> Any:
        pipeline = make_pipeline("policy")
        torch.nn.init.normal_(pipeline.denoiser.head.weight, std=0.3)
        return pipeline

    free = make_aligner(foundation_of_noise(), episodes, **settings).run()
    aligner = make_aligner(foundation_of_noise(), episodes, **settings, **bound)
    foundation, bounded = aligner.run()
    assert re.search(message, bounded.reason), bounded.reason
    assert bounded.return_mean < free[1].return_mean
    if "max_divergence" in bound:
        assert bounded.divergence <= 0.2 < free[1].divergence
    else:
        assert bounded.diversity >= 0.9 * foundation.diversity > free[1].diversity


@pytest.mark.parametrize("drill", ["nan", "reward", "learning_rate"])
@pytest.mark.filterwarnings("ignore:.*It is skipped:dmc_hub.trainers.base.SkippedStepWarning")
def test_collapse_drill(drill: str, make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path) -> None:
    """A NaN, a reward of a millionfold size and a hundredfold learning rate cost at most 2 % of the return."""
    count = iter(range(10_000))

    def reward(observations: Tensor, actions: Tensor) -> Tensor:
        value = prefers_positive(observations, actions)
        if drill == "nan" and next(count) == 8:
            return value * float("nan")
        return value * (1e6 if drill == "reward" and next(count) >= 8 else 1.0)

    configs = stage_configs(learning_rate=1e3 if drill == "learning_rate" else 1e-2)
    settings: dict[str, Any] = {"validations_per_stage": 4, "num_retries": 1, "spike_factor": 100.0}
    aligner = make_aligner(make_pipeline("policy"), episodes, tmp_path, configs, **settings)
    aligner.reward_function = reward
    results = aligner.run()
    final = mean_action_validation(episodes)(aligner.pipeline)["return_mean"]
    assert final >= 0.98 * results[0].return_mean
    log = (tmp_path / "alignment_log.jsonl").read_text()
    expected = {
        "nan": "returned nan",
        "reward": "gradient of norm",
        "learning_rate": "fell below|NaN|gradient of norm",
    }[drill]
    assert re.search(expected, log)
