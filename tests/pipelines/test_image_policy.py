"""Policies that see: images become features once per decision, and travel with the pipeline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from dmc_hub import Agent, DiffusionPolicyPipeline, TwinQCritic
from dmc_hub.hub import load_pipeline
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.models.vision_encoder import VisionEncoder
from dmc_hub.scheduler import TransitionScheduler

STEPS, STATE_DIM, SIZE = 2, 3, (20, 24)


def tiny(*, seed: int = 0) -> DiffusionPolicyPipeline:
    """Two steps of a state in [-2, 2] and two cameras, actions in [-1, 1], weights as after training."""
    ends = np.array([[-1.0], [1.0]], dtype=np.float32)
    torch.manual_seed(seed)
    encoder = VisionEncoder(
        ("front", "wrist"), depths=(1, 1), dims=(16, 32), num_keypoints=4, projection_dim=5, crop=(16, 16)
    )
    width = STATE_DIM + encoder.feature_dim
    pipeline = DiffusionPolicyPipeline(
        DiffusionTransformer1D(2, STEPS * width, dim=16, num_heads=2, depth=1),
        TransitionScheduler(20, prediction_type="sample"),
        Normalizer.from_data(
            np.repeat(2 * ends, STATE_DIM, 1), np.repeat(ends, 2, 1), num_features=encoder.feature_dim
        ),
        TwinQCritic(width, 2, (16,)),
        encoder,
        horizon=4,
        num_observation_steps=STEPS,
        num_inference_steps=3,
        num_past_actions=1,
    )
    pipeline.set_progress_bar_config(disable=True)
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (*pipeline.denoiser.parameters(), *encoder.encoders[0].projection.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=source))
    return pipeline


def observation(*batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    source = np.random.default_rng(seed)
    images = {name: source.integers(0, 256, (*batch, STEPS, *SIZE, 3), np.uint8) for name in ("wrist", "front")}
    return {"state": source.uniform(-2, 2, (*batch, STEPS, STATE_DIM)).astype(np.float32), **images}


def changed(entry: str, seen: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**seen, entry: seen[entry][..., ::-1, :].copy() if entry != "state" else -seen[entry]}


def test_the_condition_is_the_normalised_state_and_the_features_of_each_step() -> None:
    pipeline, seen = tiny(), observation(4)
    encoder = pipeline.vision_encoder
    assert (pipeline.observation_dim, pipeline.state_dim) == (STATE_DIM + 10, STATE_DIM)
    vectors = pipeline.observation_vectors(seen)
    embedding = pipeline.observation_condition(vectors)["embedding"].unflatten(1, (STEPS, -1))
    torch.testing.assert_close(embedding[..., :STATE_DIM], torch.from_numpy(seen["state"]) / 2)
    for i, camera in enumerate(("front", "wrist")):
        images = torch.from_numpy(seen[camera]).movedim(-1, -3)
        alone = encoder(torch.stack([images, images], dim=2)).detach()
        torch.testing.assert_close(embedding[..., STATE_DIM + 5 * i :][..., :5], alone[..., :5])
    assert torch.equal(embedding[..., STATE_DIM:], vectors[..., STATE_DIM:])


@pytest.mark.parametrize("entry", ["state", "front", "wrist"])
def test_every_entry_of_the_observation_counts(entry: str) -> None:
    pipeline, seen = tiny(), observation(3)
    first = pipeline(seen, generator=0).actions
    assert np.abs(pipeline(changed(entry, seen), generator=0).actions - first).max() > 1e-3
    np.testing.assert_array_equal(pipeline(dict(reversed(seen.items())), generator=0).actions, first)


def test_features_computed_before_give_the_same_decision_bit_for_bit() -> None:
    pipeline, seen = tiny(), observation(5)
    vectors = pipeline.observation_vectors(seen)
    outputs: list[Any] = [pipeline(each, num_candidates=4, generator=3) for each in (seen, vectors)]
    np.testing.assert_array_equal(outputs[0].candidates, outputs[1].candidates)
    np.testing.assert_array_equal(outputs[0].values, outputs[1].values)
    single = {name: value[2] for name, value in seen.items()}
    assert torch.equal(pipeline.observation_vectors(single), vectors[2])
    one = pipeline(single, num_candidates=4, generator=3)
    assert one.action.shape == (2,)
    np.testing.assert_array_equal(one.actions, pipeline(vectors[2:3], num_candidates=4, generator=3).actions[0])


def test_a_decision_encodes_its_images_once() -> None:
    pipeline, seen = tiny(), observation(6)
    counted: list[int] = []
    pipeline.vision_encoder.register_forward_hook(lambda module, args, output: counted.append(len(args[0])))
    pipeline(seen, num_candidates=16, num_inference_steps=10, generator=0)
    assert sum(counted) == 16  # 6 × 2 observations, in groups of 8


def test_an_agent_remembers_images() -> None:
    pipeline = tiny()
    agent = Agent(pipeline, num_action_steps=2)
    steps = [{name: value[:, 0] for name, value in observation(3, seed=i).items()} for i in range(4)]
    for i, step in enumerate(steps):
        action = agent(step, generator=i).action
        before, now = steps[max(i - i % 2 - 1, 0)], steps[i - i % 2]
        history = {name: np.stack([before[name], now[name]], axis=1) for name in now}
        expected = pipeline(history, generator=i - i % 2).actions[:, i % 2]
        np.testing.assert_array_equal(action, expected)


PLAIN = """
import sys
import numpy as np
sys.modules["dmc_hub"] = None  # as if it were not installed
from diffusers import DiffusionPipeline
folder, seen, out = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
assert type(pipeline.vision_encoder).__module__.startswith("diffusers_modules")
np.save(out, pipeline(dict(np.load(seen)), num_candidates=3, generator=0).candidates)
"""


def test_saved_with_its_eyes_it_acts_the_same_with_and_without_dmc_hub(tmp_path: Path) -> None:
    pipeline, seen = tiny(), observation(2)
    expected = pipeline(seen, num_candidates=3, generator=0).candidates
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded: Any = load_pipeline(tmp_path / "pipeline")
    np.testing.assert_array_equal(loaded(seen, num_candidates=3, generator=0).candidates, expected)
    assert loaded.task_metadata["cameras"] == ["front", "wrist"]
    assert loaded.task_metadata["state_dim"] == STATE_DIM
    arrays: dict[str, Any] = dict(seen)
    np.savez(tmp_path / "seen.npz", **arrays)
    arguments = [str(tmp_path / name) for name in ("pipeline", "seen.npz", "plain.npy")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", PLAIN, *arguments], check=True, env=environment, cwd=tmp_path, timeout=120)
    np.testing.assert_array_equal(np.load(tmp_path / "plain.npy"), expected)


def test_an_adapter_belongs_to_the_eyes_that_it_was_trained_with(tmp_path: Path) -> None:
    pipeline = tiny()
    pipeline.add_lora(LoraConfig(r=2))
    pipeline.save_lora_weights(tmp_path)
    other = tiny()
    other.load_lora_weights(tmp_path)
    blind = tiny()
    with torch.no_grad():
        next(blind.vision_encoder.parameters()).mul_(0.5)
    with pytest.raises(ValueError, match="was trained on another base"):
        blind.load_lora_weights(tmp_path)


def without(seen: dict[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    return {name: value for name, value in seen.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda seen: without(seen, "wrist"), "must have the entries state, front, wrist; it has state, front"),
        (lambda seen: {**seen, "top": seen["front"]}, "it has state, wrist, front, top"),
        (lambda seen: {**seen, "state": seen["state"][..., :2]}, r"a state \(..., 3\) and images"),
        (lambda seen: {**seen, "wrist": seen["wrist"][:1]}, r"alike in leading dimensions and size; got \(2, 2, 3\)"),
        (lambda seen: {**seen, "wrist": seen["wrist"][:, :, :18]}, r"got \(2, 2, 3\) and wrist \(2, 2, 18, 24, 3\)"),
        (lambda seen: {**seen, "state": seen["state"] * np.nan}, "NaN or infinite entries in row 0"),
    ],
)
def test_other_observations_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(change(observation(2)))


def test_eyes_and_statistics_must_fit() -> None:
    parts = tiny().components
    ends = np.array([[-1.0], [1.0]], dtype=np.float32)
    parts["normalizer"] = Normalizer.from_data(np.repeat(ends, 10, 1), np.repeat(ends, 2, 1))
    with pytest.raises(
        ValueError, match=r"for observations of 10 numbers, but `vision_encoder` alone gives 10 features"
    ):
        DiffusionPolicyPipeline(**parts)
    parts.update(vision_encoder=None, critic=None)
    with pytest.raises(ValueError, match="this pipeline has no `vision_encoder`"):
        DiffusionPolicyPipeline(**parts)(observation(2))


def test_statistics_leave_features_alone() -> None:
    data = np.array([[1.0, 5.0], [3.0, 5.0]], dtype=np.float32)
    for mode in ("limits", "gaussian"):
        normalizer = Normalizer.from_data(data, data, mode, num_features=2)
        assert normalizer.config.observation_dim == 4
        seen: Tensor = torch.tensor([[3.0, 5.0, 0.3, -7.0]])
        torch.testing.assert_close(normalizer.normalize_observations(seen), torch.tensor([[1.0, 0.0, 0.3, -7.0]]))
