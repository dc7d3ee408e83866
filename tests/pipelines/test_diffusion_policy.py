"""Acting: shapes, seeds, selection, refusals, and the same actions in a new process."""

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

from dmc_hub.models.critic import TwinQCritic
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.pipelines import DiffusionPolicyPipeline
from dmc_hub.scheduler import TransitionScheduler


def disturb(pipeline: DiffusionPolicyPipeline) -> None:
    """Move every trainable parameter of the denoiser away from its initial value, as training does."""
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in pipeline.denoiser.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=source))


def tiny(*, critic: bool = True) -> DiffusionPolicyPipeline:
    """Three observations in [-2, 2], actions in [-1, 1] and [10, 30], weights as after training."""
    ends = np.array([[-1.0], [1.0]], dtype=np.float32)
    torch.manual_seed(0)
    pipeline = DiffusionPolicyPipeline(
        DiffusionTransformer1D(2, 3, dim=16, num_heads=2, depth=1),
        TransitionScheduler(20, prediction_type="sample"),
        Normalizer.from_data(np.repeat(2 * ends, 3, 1), np.concatenate([ends, 10 * ends + 20], 1)),
        TwinQCritic(3, 2, (16,)) if critic else None,
        horizon=4,
        num_inference_steps=5,
    )
    pipeline.set_progress_bar_config(disable=True)
    disturb(pipeline)
    return pipeline


DRAW = """
import sys
import numpy as np
from dmc_hub import DiffusionPolicyPipeline

folder, adapter, *targets = sys.argv[1:]
pipeline = DiffusionPolicyPipeline.from_pretrained(folder)
observations = np.linspace(-1, 1, 9, dtype=np.float32).reshape(3, 3)
np.save(targets[0], pipeline(observations, num_candidates=5, generator=7).candidates)
pipeline.load_lora_weights(adapter)
np.save(targets[1], pipeline(observations, num_candidates=5, generator=7).candidates)
"""


def in_a_new_process(folder: Path, adapter: Path) -> list[np.ndarray]:
    targets = [adapter / "foundation.npy", adapter / "adapted.npy"]
    command = [sys.executable, "-c", DRAW, *map(str, (folder, adapter, *targets))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run(command, check=True, env=environment, timeout=120)
    return [np.load(target) for target in targets]


def draw(pipeline: DiffusionPolicyPipeline) -> np.ndarray:
    observations = np.linspace(-1, 1, 9, dtype=np.float32).reshape(3, 3)
    return pipeline(observations, num_candidates=5, generator=7).candidates


@pytest.mark.parametrize("batch", [(), (1,), (4,)])
@pytest.mark.parametrize("candidates", [1, 3])
def test_shapes(batch: tuple[int, ...], candidates: int) -> None:
    output = tiny()(np.zeros((*batch, 3), np.float32), num_candidates=candidates, generator=0)
    assert output.action.shape == (*batch, 2)
    assert output.candidates.shape == (*batch, candidates, 2)
    assert output.values is not None
    assert output.values.shape == (*batch, candidates)
    assert output.action.dtype == output.candidates.dtype == np.float32


def test_a_seed_fixes_the_action() -> None:
    pipeline, observation = tiny(), np.ones(3, np.float32)

    def act(generator: Any) -> np.ndarray:
        return pipeline(observation, num_candidates=2, generator=generator).candidates

    first = act(3)
    np.testing.assert_array_equal(act(3), first)
    np.testing.assert_array_equal(act(np.int64(3)), first)
    np.testing.assert_array_equal(act(torch.Generator().manual_seed(3)), first)
    assert not np.array_equal(act(4), first)
    torch.manual_seed(0)
    one, two = act(None), act(None)
    assert not np.array_equal(one, two)
    torch.manual_seed(0)
    np.testing.assert_array_equal(act(None), one)


def test_a_batch_of_one_is_the_single_observation() -> None:
    pipeline, observation = tiny(), np.array([0.1, -0.2, 0.3], np.float32)
    np.testing.assert_array_equal(
        pipeline(observation[None], num_candidates=2, generator=1).candidates[0],
        pipeline(observation, num_candidates=2, generator=1).candidates,
    )


def test_candidates_lie_in_the_range_of_the_data_and_differ() -> None:
    output = tiny()(np.zeros((8, 3), np.float32), num_candidates=16, generator=0)
    assert output.candidates[..., 0].min() >= -1
    assert output.candidates[..., 0].max() <= 1
    assert output.candidates[..., 1].min() >= 10
    assert output.candidates[..., 1].max() <= 30
    assert output.candidates.std(1).min(0)[0] > 0


def test_values_are_the_critics_by_hand() -> None:
    pipeline, observation = tiny(), np.array([0.4, -0.2, 0.3], np.float32)
    output = pipeline(observation, num_candidates=4, generator=0)
    # Observations are normalised from [-2, 2], actions from [-1, 1] and [10, 30].
    actions = torch.from_numpy((output.candidates - [0, 20]) / [1, 10]).float()
    with torch.no_grad():
        expected = pipeline.critic(torch.from_numpy(observation / 2).expand(4, 3), actions)
    assert output.values is not None
    np.testing.assert_allclose(output.values, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_greedy_takes_the_best_and_expectation_the_mean() -> None:
    pipeline, observations = tiny(), np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)
    greedy = pipeline(observations, num_candidates=6, generator=0)
    assert greedy.values is not None
    best = greedy.values.argmax(1)
    assert len(set(best)) > 1
    np.testing.assert_array_equal(greedy.action, greedy.candidates[np.arange(8), best])
    mean = pipeline(observations, num_candidates=6, action_selection="expectation", generator=0)
    np.testing.assert_array_equal(mean.candidates, greedy.candidates)
    np.testing.assert_allclose(mean.action, mean.candidates.mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_softmax_draws_in_proportion_to_exp_of_the_value(temperature: float) -> None:
    pipeline = tiny()
    output = pipeline(
        np.zeros((4000, 3), np.float32),
        num_candidates=3,
        num_inference_steps=1,
        action_selection="softmax",
        temperature=temperature,
        generator=0,
    )
    assert output.values is not None
    shares = torch.softmax(torch.from_numpy(output.values).double() / temperature, 1).numpy()
    order = output.values.argsort(1)
    drawn = (output.candidates == output.action[:, None]).all(2)
    assert (drawn.sum(1) == 1).all()
    for rank in range(3):
        index = order[:, rank : rank + 1]
        expected, got = np.take_along_axis(shares, index, 1), np.take_along_axis(drawn, index, 1)
        error = np.sqrt((expected * (1 - expected)).sum()) / 4000
        assert abs(got.mean() - expected.mean()) < 4 * error
    if temperature < 1:
        assert np.take_along_axis(shares, order[:, 2:], 1).mean() > 0.4  # not close to uniform


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (np.zeros(4, np.float32), r"`observation` must have shape \(3,\) or \(batch, 3\), got \(4,\)"),
        (np.zeros((2, 1, 3), np.float32), r"got \(2, 1, 3\)"),
        (np.zeros(3, np.int32), "`observation` must be floating point, got torch.int32"),
        (np.array([[0, 0, 0], [0, np.nan, 0]], np.float32), "`observation` has NaN or infinite entries in row 1"),
    ],
)
def test_bad_observations_are_refused(observation: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(observation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action_selection": "best"}, "`action_selection` must be one of greedy, expectation, softmax; got 'best'"),
        ({"num_candidates": 0}, "`num_candidates` and `temperature` must be positive, got 0, 1.0"),
        ({"temperature": float("nan")}, "must be positive, got 1, nan"),
        ({"num_inference_steps": 21}, r"`num_inference_steps` must lie in 1..20, .* got 21"),
        ({"num_inference_steps": 0}, r"`num_inference_steps` must lie in 1..20, .* got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(np.zeros(3, np.float32), **arguments)


def test_without_a_critic() -> None:
    pipeline, observation = tiny(critic=False), np.zeros(3, np.float32)
    for selection in ("greedy", "softmax"):
        with pytest.raises(
            ValueError, match=f"`action_selection` '{selection}' chooses between candidates by the critic"
        ):
            pipeline(observation, num_candidates=2, action_selection=selection)
    assert pipeline(observation, generator=0).values is None
    output = pipeline(observation, num_candidates=2, action_selection="expectation", generator=0)
    np.testing.assert_allclose(output.action, output.candidates.mean(0), rtol=1e-6)


def test_bfloat16_acts_and_leaves_the_statistics_alone(tmp_path: Path) -> None:
    pipeline, observation = tiny(), np.full(3, 0.3, np.float32)
    pipeline.save_pretrained(tmp_path)
    half = DiffusionPolicyPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.denoiser.dtype == half.critic.dtype == torch.bfloat16
    assert half.normalizer.action_scale.dtype == torch.float32
    precise, output = (p(observation, num_candidates=4, num_inference_steps=1, generator=0) for p in (pipeline, half))
    assert output.action.dtype == np.float32
    np.testing.assert_allclose(output.candidates / [1, 10], precise.candidates / [1, 10], atol=0.1)


def test_saved_and_loaded_in_a_new_process_acts_the_same_bit_for_bit(tmp_path: Path) -> None:
    pipeline = tiny()
    pipeline.save_pretrained(tmp_path / "pipeline")
    foundation = draw(pipeline)
    pipeline.add_lora(LoraConfig(r=2, lora_alpha=6))
    disturb(pipeline)
    pipeline.save_lora_weights(tmp_path / "adapter")
    found = in_a_new_process(tmp_path / "pipeline", tmp_path / "adapter")
    np.testing.assert_array_equal(found[0], foundation)
    np.testing.assert_array_equal(found[1], draw(pipeline))
    assert not np.array_equal(found[0], found[1])


def test_a_missing_critic_survives_saving(tmp_path: Path) -> None:
    tiny(critic=False).save_pretrained(tmp_path)
    loaded = DiffusionPolicyPipeline.from_pretrained(tmp_path)
    assert loaded.critic is None
    assert (loaded.config.horizon, loaded.config.num_inference_steps) == (4, 5)


def test_recomputed_log_probs_equal_recorded_ones() -> None:
    pipeline = tiny()
    condition = pipeline.repeat(pipeline.observation_condition(torch.randn(3, 3)), 2)
    mask = pipeline.free_entries(condition)
    with torch.no_grad(), pipeline.scheduler.record(mask) as trajectory:
        pipeline.sample(condition, generator=torch.Generator().manual_seed(0))
    assert trajectory.stochastic_steps == [0, 1, 2, 3]
    for step, timestep in enumerate(trajectory.timesteps):
        x_t, following = trajectory.latents[step], trajectory.next_timesteps[step]
        output = pipeline.predict(x_t, timestep, condition)
        transition = pipeline.scheduler.transition(output, x_t, timestep, following)
        assert torch.equal(transition.log_prob(trajectory.next_latents[step], mask), trajectory.log_probs[step])


@pytest.mark.parametrize("num_grad_steps", [0, 1, 3])
def test_gradients_flow_through_the_last_steps_only(num_grad_steps: int) -> None:
    pipeline, calls = tiny(), []

    class Spy(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(torch.is_grad_enabled())
            return pipeline.denoiser(*args, **kwargs)

    condition = pipeline.observation_condition(torch.randn(2, 3))
    latents = pipeline.sample(condition, denoiser=Spy(), num_grad_steps=num_grad_steps)
    assert calls == [False] * (5 - num_grad_steps) + [True] * num_grad_steps
    assert latents.requires_grad == (num_grad_steps > 0)
    assert torch.is_grad_enabled()


def test_the_action_depends_on_the_observation() -> None:
    pipeline = tiny()
    one, two = (pipeline(np.full(3, value, np.float32), generator=0).action for value in (-1.0, 1.0))
    assert not np.allclose(one, two)


def test_encode_and_decode_are_inverse_inside_the_data() -> None:
    source = torch.Generator().manual_seed(0)
    batch = {
        "observation_history": 4 * torch.rand(2, 1, 3, generator=source) - 2,
        "actions": torch.rand(2, 4, 2, generator=source) * torch.tensor([2, 20]) + torch.tensor([-1, 10]),
    }
    latents, condition = tiny().encode(batch)
    assert float(latents.abs().max()) <= 1
    torch.testing.assert_close(condition["embedding"], batch["observation_history"][:, 0] / 2)
    observations, actions = tiny().decode(latents, condition)
    torch.testing.assert_close(observations, batch["observation_history"])
    torch.testing.assert_close(actions, batch["actions"])


@pytest.mark.parametrize(("mode", "expected"), [("limits", 1.0), ("gaussian", 3.0)])
def test_actions_end_in_the_range_of_the_data(mode: str, expected: float) -> None:
    pipeline = tiny()
    pipeline.normalizer = Normalizer.from_data(np.eye(3), np.eye(3)[:, :2], mode)

    class Three(torch.nn.Module):
        def forward(self, sample: Tensor, timestep: Any, condition: Tensor, return_dict: bool) -> tuple[Tensor]:
            return (torch.full_like(sample, 3.0),)

    latents = pipeline.sample(pipeline.observation_condition(torch.zeros(2, 3)), denoiser=Three())
    torch.testing.assert_close(latents, torch.full((2, 4, 2), expected))


def test_every_entry_is_free() -> None:
    pipeline = tiny()
    assert pipeline.free_entries(pipeline.observation_condition(torch.zeros(1, 3))) is None


def test_a_history_of_observations_conditions_the_policy() -> None:
    torch.manual_seed(0)
    pipeline = DiffusionPolicyPipeline(
        DiffusionTransformer1D(2, 6, dim=16, num_heads=2, depth=1),
        TransitionScheduler(20, prediction_type="sample"),
        tiny().normalizer,
        TwinQCritic(3, 2, (16,)),
        horizon=4,
        num_observation_steps=2,
        num_inference_steps=5,
    )
    disturb(pipeline)
    history = np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 2, 3)
    batch = pipeline(history, num_candidates=3, generator=0)
    assert batch.actions.shape == (2, 4, 2)
    np.testing.assert_array_equal(batch.actions[:, 0], batch.action)
    single = pipeline(history[0], num_candidates=3, generator=0)
    assert single.actions.shape == (4, 2)
    changed = history.copy()
    changed[:, 0] += 0.5  # the older observation matters, but the critic values the current one
    assert np.abs(pipeline(changed, num_candidates=3, generator=0).candidates - batch.candidates).max() > 1e-3
    observations, _ = pipeline.decode(torch.zeros(2, 4, 2), pipeline.observation_condition(torch.from_numpy(history)))
    np.testing.assert_allclose(observations[:, 0], history[:, -1], atol=1e-6)
    with pytest.raises(ValueError, match=r"`observation` must have shape \(2, 3\) or \(batch, 2, 3\), got \(3,\)"):
        pipeline(history[0, 0])


def test_actions_of_the_past_are_sampled_but_not_executed() -> None:
    plain = tiny()
    parts = {name: part for name, part in plain.components.items() if name != "upsampler"}
    shifted = DiffusionPolicyPipeline(**parts, horizon=4, num_inference_steps=5, num_past_actions=1)
    shifted.set_progress_bar_config(disable=True)
    observation = np.zeros((2, 3), np.float32)
    whole, future = (pipeline(observation, num_candidates=1, generator=0).actions for pipeline in (plain, shifted))
    np.testing.assert_array_equal(future, whole[:, 1:])
    with pytest.raises(ValueError, match=r"`num_past_actions` must lie in 0..3, got 4"):
        DiffusionPolicyPipeline(**parts, horizon=4, num_past_actions=4)
