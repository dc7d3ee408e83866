"""The cascade's second network: warm start, passes by hand, what stays fixed, saving, and its own adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from dmc_hub.agent import Agent
from dmc_hub.evaluation import batch_generator_seed, evaluate
from dmc_hub.models.action_transformer import ActionTransformer
from dmc_hub.models.conditional_unet import ConditionalUnet1D
from dmc_hub.models.critic import TwinQCritic
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.models.temporal_unet import TemporalUnet
from dmc_hub.pipelines import DiffuserPlannerPipeline, DiffusionPolicyPipeline
from dmc_hub.presets import SAMPLERS
from dmc_hub.publish import DIFFUSERS_ADAPTER_WEIGHTS
from dmc_hub.scheduler import TransitionScheduler
from dmc_hub.trainers.cascade import warm_start_upsampler

OBSERVATIONS = np.linspace(-0.9, 0.9, 9, dtype=np.float32).reshape(3, 3)
LORA = LoraConfig(r=2, lora_alpha=4)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: TemporalUnet(5, dim=8, dim_mults=(1, 2)),
    "unet_as_wide_as_its_input": lambda: TemporalUnet(8, dim=8, dim_mults=(1, 2)),
    "conditional_unet": lambda: ConditionalUnet1D(2, 3, dims=(8, 16), timestep_dim=8),
    "dit": lambda: DiffusionTransformer1D(2, 3, dim=16, num_heads=2, depth=1),
    "dit_of_single_numbers": lambda: DiffusionTransformer1D(1, 3, dim=64, num_heads=4),
    "transformer": lambda: ActionTransformer(2, 3, 1, 4, dim=16, num_heads=2, depth=1),
}


def disturb(module: nn.Module, seed: int = 5) -> None:
    """Move every trainable parameter away from its initial value, as training does."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=source))


def make(kind: str, network: str | None = None, **scheduler: Any) -> Any:
    """A tiny planner or policy on three observations and two actions, its weights as after training."""
    torch.manual_seed(0)
    normalizer = Normalizer.from_data(np.repeat([[-1.0], [1.0]], 3, 1), np.repeat([[-1.0], [1.0]], 2, 1))
    denoiser: Any = NETWORKS[network or ("unet" if kind == "planner" else "dit")]()
    disturb(denoiser)
    cls: Any = DiffuserPlannerPipeline if kind == "planner" else DiffusionPolicyPipeline
    pipeline = cls(
        denoiser,
        TransitionScheduler(**{"num_train_timesteps": 20, "prediction_type": "sample", **scheduler}),
        normalizer,
        TwinQCritic(3, 2, (16,)),
        horizon=4,
        num_inference_steps=5,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def cascade(kind: str, **options: Any) -> Any:
    """The same with an up-sampler, its weights as after training."""
    pipeline = make(kind, **options)
    disturb(warm_start_upsampler(pipeline), seed=6)
    return pipeline


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_draft_enters_through_weights_that_start_at_zero(name: str, batch: int) -> None:
    foundation: Any = NETWORKS[name]()
    disturb(foundation)
    config = {key: value for key, value in foundation.config.items() if not key.startswith("_")}
    width = config.get("transition_dim") or config.get("token_dim") or config["action_dim"]
    network = type(foundation)(**{**config, "draft_dim": width})
    network.load_state_dict(foundation.state_dict(), strict=False)
    x, draft = torch.randn(2, batch, 4, width, generator=generator())
    condition = None if "unet" in name and "conditional" not in name else torch.randn(batch, 3, generator=generator())
    expected = foundation(x, 7, condition).sample
    assert torch.equal(network(torch.cat([x, draft], -1), 7, condition).sample, expected)
    network(torch.cat([x, draft], -1), 7, condition).sample.square().mean().backward()
    assert float(network.draft_projection.weight.grad.abs().max()) > 0  # and can leave zero
    disturb(network.draft_projection)
    assert (network(torch.cat([x, draft], -1), 7, condition).sample - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match=rf"`sample` must have shape \(batch, \w+, {2 * width}\)"):
        network(x, 7, condition)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("kind", "network"),
    [("planner", "unet"), ("policy", "dit"), ("policy", "conditional_unet"), ("policy", "transformer")],
)
def test_a_warm_started_upsampler_is_the_foundation_whatever_the_draft(kind: str, network: str, sampler: str) -> None:
    pipeline = make(kind, network, **SAMPLERS[sampler][0])
    condition = pipeline.observation_condition(torch.from_numpy(OBSERVATIONS))
    with torch.no_grad():
        foundation = pipeline.sample(condition, generator=generator())
        pipeline.add_lora(LORA)
        disturb(pipeline.denoiser)
        assert not torch.equal(pipeline.sample(condition, generator=generator()), foundation)
        state = torch.random.get_rng_state()
        warm_start_upsampler(pipeline)
        assert torch.equal(torch.random.get_rng_state(), state)
        draft = torch.randn(foundation.shape)
        assert torch.equal(pipeline.sample({**condition, "draft": draft}, generator=generator()), foundation)


@pytest.mark.parametrize("kind", ["planner", "policy"])
@pytest.mark.parametrize("passes", [1, 2])
def test_each_pass_conditions_on_the_candidates_of_the_one_before(kind: str, passes: int) -> None:
    pipeline, source = cascade(kind), generator()
    condition = pipeline.repeat(pipeline.observation_condition(torch.from_numpy(OBSERVATIONS)), 4)
    with torch.no_grad():
        latents = pipeline.sample(condition, generator=source)
        for _ in range(passes):
            latents = pipeline.sample({**condition, "draft": latents}, generator=source, denoiser=pipeline.upsampler)
        _, actions = pipeline.decode(latents, condition)
    output = pipeline(OBSERVATIONS, num_candidates=4, num_upsampling_passes=passes, generator=3)
    np.testing.assert_array_equal(output.candidates, actions[:, 0].reshape(3, 4, 2).numpy())
    # the critic ranks the up-sampled candidates, and the best of them is executed
    with torch.no_grad():
        values = pipeline.critic(
            torch.from_numpy(OBSERVATIONS)[:, None].expand(-1, 4, -1), torch.from_numpy(output.candidates)
        )
    np.testing.assert_allclose(output.values, values.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(output.action, output.candidates[range(3), output.values.argmax(1)])


@pytest.mark.parametrize("kind", ["planner", "policy"])
def test_without_passes_an_upsampler_changes_nothing(kind: str) -> None:
    plain, upsampled = make(kind), cascade(kind)
    expected = plain(OBSERVATIONS, num_candidates=4, generator=3).candidates
    np.testing.assert_array_equal(upsampled(OBSERVATIONS, num_candidates=4, generator=3).candidates, expected)
    other = upsampled(OBSERVATIONS, num_candidates=4, num_upsampling_passes=1, generator=3).candidates
    assert np.abs(other - expected).max() > 1e-2


def test_what_in_painting_fixed_stays_fixed() -> None:
    values, mask = np.full((4, 5), 0.25, np.float32), np.zeros((4, 5), bool)
    mask[2], mask[3, 0] = True, True
    output = cascade("planner")(
        OBSERVATIONS, num_candidates=3, inpainting=(values, mask), num_upsampling_passes=2, generator=3
    )
    for plan, observation in zip(output.trajectories.reshape(9, 4, 5), OBSERVATIONS.repeat(3, 0), strict=True):
        np.testing.assert_array_equal(plan[0, :3], observation)
        np.testing.assert_array_equal(plan[mask], values[mask])
    assert output.trajectories[..., 1, :].std() > 0


def test_passes_that_cannot_be_made_are_refused() -> None:
    for kind in ("planner", "policy"):
        with pytest.raises(ValueError, match="`num_upsampling_passes` is 1, but this pipeline has no up-sampler"):
            make(kind)(OBSERVATIONS, num_upsampling_passes=1)
        with pytest.raises(ValueError, match="`num_upsampling_passes` must be at least 0, got -1"):
            cascade(kind)(OBSERVATIONS, num_upsampling_passes=-1)
    with pytest.raises(ValueError, match="`pipeline` has no up-sampler"):
        make("policy").upsampler_policy()


class NoDraft(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))


def test_a_denoiser_that_takes_no_draft_is_named() -> None:
    pipeline = make("policy")
    pipeline.denoiser = NoDraft()
    with pytest.raises(ValueError, match="denoiser of class NoDraft, which takes no draft"):
        warm_start_upsampler(pipeline)


# ---- Saving ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "network"),
    [("planner", "unet"), ("policy", "dit"), ("policy", "conditional_unet"), ("policy", "transformer")],
)
def test_saved_and_loaded_it_samples_the_same_bit_for_bit(kind: str, network: str, tmp_path: Path) -> None:
    pipeline = cascade(kind, network=network)
    pipeline.save_pretrained(tmp_path)
    loaded = type(pipeline).from_pretrained(tmp_path)
    for passes in (0, 2):
        expected, found = (
            p(OBSERVATIONS, num_candidates=4, num_upsampling_passes=passes, generator=3).candidates
            for p in (pipeline, loaded)
        )
        np.testing.assert_array_equal(found, expected)


def test_a_pipeline_saved_without_one_and_its_adapter_still_load(tmp_path: Path) -> None:
    pipeline = make("planner")
    pipeline.save_pretrained(tmp_path / "pipeline")
    index = tmp_path / "pipeline" / "model_index.json"
    components = json.loads(index.read_text())
    assert components.pop("upsampler") == [None, None]
    index.write_text(json.dumps(components))  # as before there were up-samplers
    config = tmp_path / "pipeline" / "denoiser" / "config.json"
    settings = json.loads(config.read_text())
    assert settings.pop("draft_dim") == 0
    config.write_text(json.dumps(settings))

    pipeline.add_lora(LORA)
    disturb(pipeline.denoiser)
    pipeline.save_lora_weights(tmp_path / "adapter")
    loaded = DiffuserPlannerPipeline.from_pretrained(tmp_path / "pipeline", verify=False)
    assert loaded.upsampler is None
    warm_start_upsampler(loaded)
    loaded.load_lora_weights(tmp_path / "adapter")
    expected, found = (p(OBSERVATIONS, num_candidates=4, generator=3).candidates for p in (pipeline, loaded))
    np.testing.assert_array_equal(found, expected)


# ---- Its own adapter -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["planner", "policy"])
def test_an_adapter_of_the_upsampler_is_saved_and_loaded_beside_that_of_the_denoiser(kind: str, tmp_path: Path) -> None:
    pipeline = cascade(kind)
    pipeline.save_pretrained(tmp_path / "pipeline")
    view = pipeline.upsampler_policy()
    pipeline.add_lora(LORA)
    view.add_lora(LORA, seed=1)
    disturb(pipeline.denoiser)
    disturb(pipeline.upsampler)
    pipeline.save_lora_weights(tmp_path / "controller")
    view.save_lora_weights(tmp_path / "upsampler")
    keys = load_file(tmp_path / "upsampler" / DIFFUSERS_ADAPTER_WEIGHTS)
    assert all(key.startswith("upsampler.") for key in keys)

    loaded = type(pipeline).from_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match="was trained on another base"):
        loaded.load_lora_weights(tmp_path / "upsampler")
    loaded.load_lora_weights(tmp_path / "controller")
    loaded.upsampler_policy().load_lora_weights(tmp_path / "upsampler")
    for passes in (0, 1):
        expected, found = (
            p(OBSERVATIONS, num_candidates=4, num_upsampling_passes=passes, generator=3).candidates
            for p in (pipeline, loaded)
        )
        np.testing.assert_array_equal(found, expected)

    loaded.unload_lora()
    with pytest.raises(ValueError, match="The up-sampler carries a LoRA adapter"):
        loaded.save_pretrained(tmp_path / "again")
    loaded.upsampler_policy().unload_lora()
    loaded.save_pretrained(tmp_path / "again")


def test_the_view_is_the_pipeline_but_for_its_denoiser_and_draft() -> None:
    pipeline = cascade("planner")
    view = pipeline.upsampler_policy()
    assert view.denoiser is pipeline.upsampler
    assert view.scheduler is pipeline.scheduler
    assert view.components.keys() == pipeline.components.keys()
    condition = pipeline.observation_condition(torch.from_numpy(OBSERVATIONS))
    with pytest.raises(AssertionError, match="`complete_condition` was forgotten"):
        view.sample(condition)
    with torch.no_grad():
        complete = view.complete_condition(condition, generator())
        draft = pipeline.sample(condition, generator=generator())
    assert torch.equal(complete["draft"], draft)
    repeated = view.repeat(complete, 2)
    assert torch.equal(repeated["draft"], draft.repeat_interleave(2, dim=0))
    x = torch.randn(draft.shape)
    assert torch.equal(view.predict(x, 3, complete), pipeline.predict(x, 3, complete))
    assert pipeline.complete_condition(condition, generator()) is condition


# ---- Passed on -------------------------------------------------------------------------------------------


class Recorder(gymnasium.Env[np.ndarray, np.ndarray]):
    """One step; the return is the first action."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return OBSERVATIONS[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return OBSERVATIONS[0], float(action[0]), True, False, {}


def test_agent_and_evaluation_pass_the_number_of_passes_on() -> None:
    pipeline = cascade("policy")
    output = Agent(pipeline)(OBSERVATIONS, num_candidates=2, num_upsampling_passes=2, generator=3)
    expected = pipeline(OBSERVATIONS, num_candidates=2, num_upsampling_passes=2, generator=3)
    np.testing.assert_array_equal(output.candidates, expected.candidates)

    mode = gymnasium.vector.AutoresetMode.NEXT_STEP
    env = gymnasium.vector.SyncVectorEnv([Recorder], autoreset_mode=mode)
    settings: dict[str, Any] = {"seeds": [0], "num_candidates": 2, "action_selection": "greedy", "generator_seed": 3}
    noise = batch_generator_seed(3, first_seed=0)
    for passes in (0, 1):
        result = evaluate(Agent(pipeline), env, num_upsampling_passes=passes, **settings)
        act = pipeline(OBSERVATIONS[:1], num_candidates=2, num_upsampling_passes=passes, generator=noise).action
        assert result.rollouts.returns[0] == pytest.approx(act[0, 0])
        assert result.to_dict()["num_upsampling_passes"] == passes


def test_a_draft_of_the_exploding_schedule_is_not_scaled_with_the_sample() -> None:
    """At sigma 80 the network sees `x_t / 80`; the draft is clean and comes as it is."""
    pipeline, seen = make("policy", **SAMPLERS["sm"][0]), []

    class Spy(nn.Module):
        def forward(self, sample: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
            seen.append(sample)
            return (sample[..., :2],)

    condition = pipeline.observation_condition(torch.from_numpy(OBSERVATIONS))
    x_t, draft = 80 * torch.ones(3, 4, 2), torch.full((3, 4, 2), 0.5)
    pipeline.predict(x_t, 20, {**condition, "draft": draft}, Spy())
    torch.testing.assert_close(seen[0], torch.cat([torch.ones(3, 4, 2), draft], -1), rtol=1e-3, atol=0)
