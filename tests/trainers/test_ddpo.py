"""DDPOTrainer: exact first ratio, known gradients, credit, truncation, clipping, adaptive KL, entropy, resume."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models import ModelMixin
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dmc_hub.data import Episodes
from dmc_hub.losses import adapted_kl_coefficient, entropy_estimates, growing_clip_range
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.pipelines import DiffusionPolicyPipeline
from dmc_hub.scheduler import TransitionScheduler
from dmc_hub.trainers.ddpo import DDPOConfig, DDPOTrainer
from dmc_hub.trainers.denoising import DenoisingConfig, DenoisingTrainer
from dmc_hub.trainers.sampling import unpack

MakePipeline = Callable[..., Any]
SMALL: dict[str, Any] = {
    "output_dir": None,
    "disable_tqdm": True,
    "logging_steps": 1,
    "max_steps": 1,
    "per_device_train_batch_size": 16,
}
SAMPLERS: dict[str, dict[str, Any]] = {
    "ddpm": {"schedule": "cosine"},
    "ddim": {"schedule": "linear", "eta": 1.0, "prediction_type": "epsilon"},
    "sm": {"schedule": "variance_exploding", "prediction_type": "v_prediction"},
    "fm": {"schedule": "flow", "prediction_type": "velocity", "kernel": "euler_maruyama"},
}


def near_a_target(observations: Tensor, actions: Tensor) -> Tensor:
    return -(actions[:, 0, 0] - 0.8).abs()


def make_trainer(pipeline: Any, episodes: Episodes, *, callbacks: Any = (), **settings: Any) -> DDPOTrainer:
    """With an adapter that is already away from the foundation, so that KL and rewards vary."""
    return DDPOTrainer(
        pipeline,
        DDPOConfig(**{**SMALL, **settings}),
        train_dataset=episodes,
        reward_function=near_a_target,
        peft_config=LoraConfig(r=4, init_lora_weights=False),
        callbacks=callbacks,
    )


def batch_of(trainer: DDPOTrainer, micro_step: int = 0) -> dict[str, Tensor]:
    trainer.micro_step = micro_step
    return trainer.make_batch(torch.Generator().manual_seed(0))


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_batch_advantages_compare_all_samples_and_allow_groups_of_one(
    make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    settings = {"group_size": 1, "advantage_baseline": "batch", "advantage_scale": "global"}
    trainer = make_trainer(make_pipeline("policy"), episodes, **settings)
    batch = batch_of(trainer)
    last = batch["next_latents"][-1]
    condition = unpack("condition", batch)
    observations = next(iter(condition.values()))
    assert len(torch.unique(observations.flatten(1), dim=0)) > 8  # each sample has a condition of its own
    rewards = trainer.rewards(last, condition)
    expected = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
    torch.testing.assert_close(batch["advantages"], expected)
    with pytest.raises(ValueError, match="`group_size` must be at least 2"):
        DDPOConfig(output_dir=None, group_size=1)
    with pytest.raises(ValueError, match="`group_size` must be at least 2"):  # entropies are of groups
        DDPOConfig(output_dir=None, group_size=1, advantage_baseline="batch", entropy_coefficient=0.1)


# ---- The policy gradient -----------------------------------------------------------------------------------


@pytest.mark.parametrize("controller", ["policy", "planner"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_first_ratio_is_exactly_one(
    sampler: str, controller: str, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    """With a clip range of 0 the clipped share is the share of ratios that are not 1."""
    trainer = make_trainer(
        make_pipeline(controller, **SAMPLERS[sampler]),
        episodes,
        max_steps=2,
        learning_rate=0.1,
        clip_range=0.0,
        num_train_denoising_steps=None,
        epochs_per_rollout=2,
    )
    trainer.train()
    first, second = trainer.history[:2]
    assert first["ratio"] == 1.0
    assert first["clip_fraction"] == 0.0
    assert second["clip_fraction"] > 0.5


class AffineDenoiser(ModelMixin, ConfigMixin):
    """Predicts `x0 = weight * x_t + bias`, at every time."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))
        self.bias = nn.Parameter(torch.tensor(0.2))

    def forward(self, sample: Tensor, timestep: Any, embedding: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.weight * sample + self.bias,)


def affine_policy(weight: float = 0.3) -> Any:
    """Two denoising steps: one Gaussian, one deterministic."""
    normalizer = Normalizer(3, 1, mode="gaussian")  # does not clamp
    for name, value in normalizer.named_buffers():
        value.fill_(1.0 if name.endswith("scale") else 0.0)
    denoiser = AffineDenoiser()
    denoiser.weight.data.fill_(weight)
    scheduler = TransitionScheduler(num_train_timesteps=20, prediction_type="sample")
    return DiffusionPolicyPipeline(denoiser, scheduler, normalizer, horizon=1, num_inference_steps=2)


def final_moments(pipeline: Any, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of `z_0 = w z_1 + b` where `z_1 = slope z_2 + shift + std noise`.

    The last step, to alpha 1 and sigma 0, returns x0. It has no density, so the policy gradient leaves it as it is.
    """
    scheduler, denoiser = pipeline.scheduler, pipeline.denoiser
    scheduler.set_timesteps(2)
    noisy, middle = scheduler.timesteps.tolist()
    at_t, at_s = (scheduler.coefficients(step, torch.zeros(1)) for step in (noisy, middle))
    std = torch.sqrt(at_t.sigma**2 - (at_t.alpha / at_s.alpha) ** 2 * at_s.sigma**2) * at_s.sigma / at_t.sigma
    direction = torch.sqrt(at_s.sigma**2 - std**2) / at_t.sigma
    pull = at_s.alpha - direction * at_t.alpha
    slope, shift = direction + pull * weight, pull * bias
    last_weight, last_bias = denoiser.weight.detach().double(), denoiser.bias.detach().double()
    variance = (slope * scheduler.init_noise_sigma) ** 2 + std**2
    return last_weight * shift + last_bias, last_weight**2 * variance


def policy_gradient(pipeline: Any, episodes: Episodes, reward: Any, group: int, **settings: Any) -> tuple[float, float]:
    """Of the weight and the bias, from half a million samples."""
    config = DDPOConfig(
        **{**SMALL, "per_device_train_batch_size": 2**19, "group_size": group, **settings},
        advantage_scale="none",
        kl_coefficient=0.0,
    )
    trainer = DDPOTrainer(pipeline, config, train_dataset=episodes, reward_function=reward)
    trainer.compute_loss(pipeline.denoiser, batch_of(trainer)).backward()
    share = 1 - 1 / group  # a sample's own reward is part of the mean that is subtracted
    return -float(pipeline.denoiser.weight.grad) / share, -float(pipeline.denoiser.bias.grad) / share


@pytest.mark.parametrize("loss_type", ["reinforce", "ppo"])
def test_the_gradient_is_that_of_the_expected_reward(loss_type: str, episodes: Episodes) -> None:
    pipeline = affine_policy()
    weight, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.3, 0.2))
    mean, variance = final_moments(pipeline, weight, bias)
    expected = torch.autograd.grad((-((mean - 1) ** 2) - variance).sum(), (weight, bias))  # of -(z_0 - 1)^2
    found = policy_gradient(
        pipeline,
        episodes,
        lambda observations, actions: -((actions[:, 0, 0] - 1) ** 2),
        64,
        loss_type=loss_type,
    )
    assert found == pytest.approx([float(gradient) for gradient in expected], abs=0.004)
    assert abs(float(expected[0])) > 0.02
    assert abs(float(expected[1])) > 0.2


def test_the_entropy_bonus_has_the_gradient_of_the_entropy(episodes: Episodes) -> None:
    pipeline = affine_policy(1.5)
    weight = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    _, variance = final_moments(pipeline, weight, torch.tensor(0.2, dtype=torch.float64))
    (expected,) = torch.autograd.grad(variance.log().sum() / 2, weight)
    found = policy_gradient(
        pipeline, episodes, lambda observations, actions: torch.zeros(len(actions)), 256, entropy_coefficient=2.0
    )
    assert found[0] == pytest.approx(2 * float(expected), rel=0.08)  # groups are finite
    assert found[1] == pytest.approx(0, abs=0.02)


# ---- Credit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("controller", ["policy", "planner"])
def test_credit_is_one_on_average_and_follows_its_definition(
    controller: str, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    credits: dict[str, Tensor] = {}
    for credit in ("noise_level", "uniform", "decreasing", "similarity"):
        trainer = make_trainer(make_pipeline(controller), episodes, credit=credit)
        batch = batch_of(trainer)
        credits[credit] = trainer._credits(batch)
        torch.testing.assert_close(credits[credit][:4].mean(0), torch.ones_like(credits[credit][0]))
        assert credits[credit][4].abs().max() == 0  # the last step has no density
    assert credits["uniform"].tolist() == [1, 1, 1, 1, 0]
    assert credits["decreasing"].tolist() == pytest.approx([5 / 3.5, 4 / 3.5, 3 / 3.5, 2 / 3.5, 0])
    torch.testing.assert_close(credits["noise_level"], batch["stds"] / batch["stds"][:4].mean())
    mask = trainer.pipeline.free_entries(batch_condition(batch))
    for sample in range(16):
        free = slice(None) if mask is None else mask[sample]
        path = torch.cat([batch["latents"][:1, sample], batch["next_latents"][:, sample]])
        moves = torch.stack([(after - before)[free].flatten() for before, after in itertools.pairwise(path)])
        whole = (path[-1] - path[0])[free].flatten()
        cosines = (moves @ whole / moves.norm(dim=1) / whole.norm()).clamp(min=0)[:4]
        torch.testing.assert_close(credits["similarity"][:4, sample], cosines / cosines.mean(), rtol=1e-3, atol=1e-3)


def batch_condition(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("condition."): value for name, value in batch.items() if name.startswith("condition.")}


def test_a_sample_that_only_the_last_step_moved_its_way_has_equal_credit(
    make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    trainer = make_trainer(make_pipeline("policy"), episodes, credit="similarity", denoising_discount=0.5)
    batch = batch_of(trainer)
    path = torch.tensor([0.0, -1, -2, -3, -4, 5]).reshape(6, 1, 1, 1).expand(6, 16, 1, 1)
    credits = trainer._credits({**batch, "latents": path[:-1], "next_latents": path[1:]})
    expected = torch.tensor([1.0, 2, 4, 8, 0]) / 3.75
    torch.testing.assert_close(credits, expected[:, None].expand(5, 16))


@pytest.mark.parametrize("credit", ["noise_level", "uniform", "decreasing"])
def test_the_denoising_discount_multiplies_every_credit(
    credit: str, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    plain, discounted = (
        make_trainer(make_pipeline("policy"), episodes, credit=credit, denoising_discount=discount)
        for discount in (1.0, 0.8)
    )
    batch = batch_of(plain)
    ratio = (discounted._credits(batch) / plain._credits(batch))[:4]
    torch.testing.assert_close(ratio[:-1] / ratio[1:], torch.full((3,), 0.8))
    torch.testing.assert_close(discounted._credits(batch)[:4].mean(), torch.tensor(1.0))


def test_credit_weighs_each_sample_s_policy_loss_and_kl(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    trainer = make_trainer(
        make_pipeline("planner"), episodes, credit="similarity", kl_coefficient=0.7, num_train_denoising_steps=None
    )
    batch = batch_of(trainer)
    condition = batch_condition(batch)
    mask, losses = trainer.pipeline.free_entries(condition), []
    for step in range(4):
        policy = trainer._transition(batch, step, condition)
        with torch.no_grad(), trainer.pipeline.lora_disabled():
            reference = trainer._transition(batch, step, condition)
        objective = -batch["advantages"] + 0.7 * policy.kl(reference, mask)  # the ratio is 1
        losses.append((trainer._credits(batch)[step] * objective).mean())
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), torch.stack(losses).mean())


# ---- Truncation and clipping -------------------------------------------------------------------------------


def test_k_goes_linearly_from_its_first_value_to_its_last(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    trainer = make_trainer(
        make_pipeline("policy"),
        episodes,
        max_steps=5,
        gradient_accumulation_steps=2,
        last_k_steps=4,
        last_k_steps_final=1,
        num_train_denoising_steps=None,
    )
    trained = [batch_of(trainer, micro_step)["steps"].tolist() for micro_step in range(10)]
    by_k = {4: [0, 1, 2, 3], 3: [1, 2, 3], 2: [2, 3], 1: [3]}
    assert trained == [by_k[k] for k in (4, 4, 3, 3, 2, 2, 2, 2, 1, 1)]  # 4, 3.25, 2.5, 1.75, 1; halves go to even


def test_clip_ranges_grow_over_the_trained_steps_to_both_bounds(
    make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    trainer = make_trainer(
        make_pipeline("policy"), episodes, clip_range=0.2, clip_range_high=0.4, clip_range_first=0.01, last_k_steps=3
    )
    stds = batch_of(trainer)["stds"]
    assert trainer._clip_ranges(stds, 1) == pytest.approx((0.01, 0.01))
    middle = growing_clip_range(0.5, 0.01, 0.2), growing_clip_range(0.5, 0.01, 0.4)
    assert trainer._clip_ranges(stds, 2) == pytest.approx(middle)
    assert trainer._clip_ranges(stds, 3) == pytest.approx((0.2, 0.4))
    trainer.args.last_k_steps = 1
    assert trainer._clip_ranges(stds, 3) == pytest.approx((0.2, 0.4))
    trainer.args.clip_range_first = None
    trainer.args.clip_range_high = None
    assert trainer._clip_ranges(stds, 3) == (0.2, 0.2)


def test_the_clipped_share_counts_both_bounds(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    trainer = make_trainer(make_pipeline("policy"), episodes, clip_range=0.1, clip_range_high=0.3)
    batch = batch_of(trainer)
    batch["log_probs"] = torch.zeros_like(batch["log_probs"])
    log_prob = torch.tensor([0.8, 0.95, 1.05, 1.2, 1.4] + [1.0] * 11).log()
    trainer._policy_loss(log_prob, batch, 0)
    assert trainer._drain_metrics()["clip_fraction"] == pytest.approx(2 / 16)


def test_clipping_by_entry_scales_the_log_ratio_and_keeps_the_gradient(
    make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    """The planner has 13 free entries: a ratio of e^2.6 is e^0.2 per entry, within 1 ± 0.25; e^-6.5 is e^-0.5."""
    trainer = make_trainer(make_pipeline("planner"), episodes, clip_range=0.25, clip_unit="entry")
    batch = batch_of(trainer)
    batch["log_probs"] = torch.zeros_like(batch["log_probs"])
    batch["advantages"] = torch.tensor([1.0, -1.0] * 8)
    log_prob = torch.tensor([2.6, -6.5] + [0.0] * 14).requires_grad_()
    loss = trainer._policy_loss(log_prob, batch, 0)
    loss.sum().backward()
    assert log_prob.grad is not None
    assert log_prob.grad[:2].tolist() == pytest.approx([-math.exp(0.2), 0.0])
    assert log_prob.grad[2:].tolist() == pytest.approx([-1.0, 1.0] * 7)
    assert loss[0].item() == pytest.approx(-13 * math.exp(0.2))
    assert trainer._drain_metrics()["clip_fraction"] == pytest.approx(1 / 16)


def test_bad_steps_that_have_become_improbable_are_dropped(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    trainer = make_trainer(make_pipeline("planner"), episodes, clip_range=9.0, divergence_limit=0.1)
    batch = batch_of(trainer)
    batch["log_probs"] = torch.zeros_like(batch["log_probs"])
    batch["advantages"] = torch.tensor([-1.0, -1.0, 1.0, -1.0] * 4)
    log_prob = torch.tensor([-1.4, -1.2, -1.4, 1.4] * 4).requires_grad_()  # 13 entries: the limit is at -1.3
    trainer._policy_loss(log_prob, batch, 0).sum().backward()
    assert log_prob.grad is not None
    expected = [0.0, math.exp(-1.2), -math.exp(-1.4), math.exp(1.4)]
    assert log_prob.grad.tolist() == pytest.approx(expected * 4)
    assert trainer._drain_metrics()["dropped"] == pytest.approx(1 / 4)


# ---- Adaptive KL -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("controller", "entries", "target"),
    [("policy", 1, 0.05), ("planner", 13, 0.1)],  # of the planner's 4 steps of 4 entries 3 are fixed
)
def test_the_kl_coefficient_follows_the_kl_per_free_entry(
    controller: str, entries: int, target: float, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    trainer = make_trainer(
        make_pipeline(controller),
        episodes,
        max_steps=4,
        learning_rate=0.03,
        gradient_accumulation_steps=2,
        kl_coefficient=0.5,
        kl_target=target,
    )
    with torch.no_grad():
        for name, parameter in trainer.pipeline.denoiser.named_parameters():
            if ".lora_B" in name:
                parameter.mul_(0.1)
    trainer.train()
    coefficient, kls = 0.5, [row["kl"] / entries for row in trainer.history[:4]]
    for row, kl in zip(trainer.history[:4], kls, strict=True):
        coefficient = adapted_kl_coefficient(coefficient, kl, target)
        assert row["kl_coefficient"] == pytest.approx(coefficient, rel=1e-5)
    assert any(abs(kl / target - 1) < 0.2 for kl in kls)  # where the controller is proportional


def test_the_adapted_coefficient_weighs_the_kl(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    trainer = make_trainer(make_pipeline("policy"), episodes, kl_coefficient=0.5, kl_target=0.05)
    batch = batch_of(trainer)
    losses = []
    for coefficient in (0.0, 0.5, 2.0):
        trainer._kl_coefficient = coefficient
        losses.append(float(trainer.compute_loss(trainer.model, batch).detach()))
    assert losses[1] > losses[0]
    assert losses[2] - losses[0] == pytest.approx(4 * (losses[1] - losses[0]), rel=1e-3)


# ---- Entropy -----------------------------------------------------------------------------------------------


def test_the_entropy_bonus_keeps_samples_diverse(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    foundation = make_pipeline("policy")
    config = DenoisingConfig(**{**SMALL, "max_steps": 150, "per_device_train_batch_size": 64, "learning_rate": 3e-3})
    DenoisingTrainer(foundation, config, train_dataset=episodes).train()
    state = {name: value.clone() for name, value in foundation.denoiser.state_dict().items()}

    def entropy_after_training(coefficient: float) -> float:
        pipeline = make_pipeline("policy")
        pipeline.denoiser.load_state_dict(state)
        config = DDPOConfig(
            **{**SMALL, "max_steps": 40, "per_device_train_batch_size": 128, "learning_rate": 5e-3},
            group_size=16,
            kl_coefficient=0.0,
            entropy_coefficient=coefficient,
        )
        trainer = DDPOTrainer(
            pipeline, config, train_dataset=episodes, reward_function=near_a_target, peft_config=LoraConfig(r=4)
        )
        trainer.train()
        assert all(("entropy" in row) == (coefficient > 0) for row in trainer.history[:40])
        condition = pipeline.repeat(trainer.conditions(16, torch.Generator().manual_seed(1)), 16)
        with torch.no_grad():
            samples = pipeline.sample(condition, generator=torch.Generator().manual_seed(2))
        return float(entropy_estimates(samples, 16).mean())

    assert entropy_after_training(1.0) > entropy_after_training(0.0) + 1


def test_the_entropy_bonus_counts_the_coefficient_and_the_free_entries(
    make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    settings = {"advantage_scale": "none", "credit": "uniform"}
    plain, bonus = (
        make_trainer(make_pipeline("planner"), episodes, **settings, entropy_coefficient=coefficient)
        for coefficient in (0.0, 3.0)
    )
    without, batch = batch_of(plain), batch_of(bonus)
    latents = batch["next_latents"][-1]
    observations, actions = latents.split((3, 1), dim=-1)
    latents = torch.cat([observations, actions.clamp(-1, 1)], dim=-1)
    entropies = entropy_estimates(latents, 8, bonus.pipeline.free_entries(batch_condition(batch))).reshape(2, 8)
    expected = 3 * (entropies - entropies.mean(1, keepdim=True)).flatten()
    torch.testing.assert_close(batch["advantages"] - without["advantages"], expected, rtol=1e-3, atol=1e-5)
    assert bonus._drain_metrics()["entropy"] == pytest.approx(float(entropies.mean()))


# ---- Running -----------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "similarity": {"credit": "similarity", "denoising_discount": 0.9, "kl_target": 0.01, "epochs_per_rollout": 2},
    "schedules": {
        "last_k_steps": 4,
        "last_k_steps_final": 1,
        "clip_range_first": 0.01,
        "clip_range_high": 0.3,
        "entropy_coefficient": 0.1,
        "batches_per_rollout": 2,
        "kl_target": 0.01,
        "gradient_accumulation_steps": 2,
    },
}


def adapter(trainer: DDPOTrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.pipeline.denoiser.state_dict().items() if ".lora_" in name}


@pytest.mark.parametrize("controller", ["policy", "planner"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_run_equals_an_uninterrupted_one(
    variant: str, controller: str, make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    settings = {**VARIANTS[variant], "max_steps": 5, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    whole = make_trainer(make_pipeline(controller), episodes, **settings)
    whole.train()
    saving = {**settings, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 3}
    make_trainer(make_pipeline(controller), episodes, **saving, callbacks=[StopAt(3)]).train()
    resumed = make_trainer(make_pipeline(controller), episodes, **saving)
    resumed.train(resume_from_checkpoint=True)
    for name, value in adapter(whole).items():
        assert torch.equal(value, adapter(resumed)[name]), name
    assert resumed._kl_coefficient == whole._kl_coefficient != 0.03


def test_a_schedule_of_k_depends_on_the_number_of_steps(
    make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    for schedule, is_warned in (({}, False), ({"last_k_steps": 3, "last_k_steps_final": 1}, True)):
        run = {**settings, **schedule, "output_dir": str(tmp_path / str(is_warned))}
        make_trainer(make_pipeline("policy"), episodes, **run).train()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(make_pipeline("policy"), episodes, **{**run, "max_steps": 2}).train(
                resume_from_checkpoint=True
            )
        assert any("`max_steps` from 1 to 2" in str(warning.message) for warning in caught) == is_warned


@pytest.mark.parametrize("controller", ["policy", "planner"])
def test_recomputed_activations_give_the_same_weights(
    controller: str, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    plain, saving = (
        make_trainer(
            make_pipeline(controller),
            episodes,
            max_steps=3,
            epochs_per_rollout=3,
            learning_rate=1e-2,
            activation_checkpointing=activation_checkpointing,
        )
        for activation_checkpointing in (False, True)
    )
    before, evaluations = adapter(plain), []
    for trainer in (plain, saving):
        count: list[int] = []
        trainer.pipeline.denoiser.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        trainer.train()
        evaluations.append(len(count))
    assert evaluations[1] == evaluations[0] + 3 * 3
    assert plain.history[0]["ratio"] == saving.history[0]["ratio"] == 1.0
    for name, value in adapter(plain).items():
        assert torch.equal(value, adapter(saving)[name]), name
        assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"credit": "cosine"}, "`credit` must be one of noise_level, uniform, decreasing, similarity; got 'cosine'"),
        ({"denoising_discount": 0.0}, r"`denoising_discount` must lie in \(0, 1\], got 0\.0"),
        ({"denoising_discount": 1.1}, r"`denoising_discount` must lie in \(0, 1\], got 1\.1"),
        ({"last_k_steps": 2, "last_k_steps_final": 0}, "`last_k_steps_final` must be at least 1, got 0"),
        ({"last_k_steps_final": 2}, "`last_k_steps_final` needs a K to start from: set `last_k_steps`"),
        ({"clip_range_high": -0.1}, r"`clip_range_high` must be at least 0, got -0\.1"),
        ({"clip_range_first": float("nan")}, "`clip_range_first` must be at least 0, got nan"),
        (
            {"clip_range_high": 0.3, "loss_type": "reinforce"},
            "`clip_range_high` is of the 'ppo' loss: set it to None for `loss_type` 'reinforce'",
        ),
        (
            {"divergence_limit": 0.1, "loss_type": "reinforce"},
            "`divergence_limit` is of the 'ppo' loss: set it to None for `loss_type` 'reinforce'",
        ),
        ({"divergence_limit": -0.1}, r"`divergence_limit` must be at least 0, got -0\.1"),
        ({"clip_unit": "dimension"}, "`clip_unit` must be one of sample, entry"),
        ({"kl_target": 0.0}, r"`kl_target` and the `kl_coefficient` .* must be positive, got 0\.0 and 0\.03"),
        ({"kl_target": 0.1, "kl_coefficient": 0.0}, r"must be positive, got 0\.1 and 0\.0"),
        ({"entropy_coefficient": -1.0}, r"`entropy_coefficient` must be at least 0, got -1\.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDPOConfig(**{**SMALL, **settings})


@pytest.mark.parametrize(("asked", "device"), [(False, "cuda"), (True, "cpu")])
def test_the_buffer_is_kept_in_the_memory_that_was_asked_for(
    asked: bool, device: str, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    """With a tensor that only pretends to be on a GPU."""
    trainer = make_trainer(make_pipeline("policy"), episodes, buffer_on_cpu=asked)
    with FakeTensorMode():
        assert trainer.kept({"latents": torch.empty(3, device="cuda")})["latents"].device.type == device
