"""Stock text-to-image pipelines as controllers: they sample, train and share adapters as in plain diffusers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from torch import Tensor, nn

from dmc_hub.text_to_image import RECORD_BYTES, PromptConditions, TextToImagePolicy, transition_scheduler
from dmc_hub.trainers.ddpo import DDPOConfig, DDPOTrainer
from dmc_hub.trainers.dpo import DiffusionDPOConfig, DiffusionDPOTrainer
from dmc_hub.trainers.nft import NFTConfig, NFTTrainer
from dmc_hub.trainers.reward_gradient import RewardGradientConfig, RewardGradientTrainer
from dmc_hub.trainers.sft import SFTConfig, SFTTrainer

KINDS = ("sd_epsilon", "sd_v", "sdxl", "sd3")
PROMPTS = ["a dark 3", "7", "a bright cat", "nothing"]
MakePipeline = Callable[[str], Any]
SMALL: dict[str, Any] = {"max_steps": 1, "logging_steps": 1, "num_inference_steps": 4, "disable_tqdm": True}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    assert images.shape == (len(prompts), 3, 8, 8)
    assert bool(((images >= 0) & (images <= 1)).all())
    return images.mean((1, 2, 3))


def redness(images: Tensor, *_: Any) -> Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_the_stock_pipeline(make_pipeline: MakePipeline, kind: str, guidance_scale: float) -> None:
    pipeline = make_pipeline(kind)
    if kind == "sd_epsilon":  # its own PNDM is a multistep solver
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    policy = TextToImagePolicy(
        pipeline, scheduler=transition_scheduler(pipeline.scheduler, eta=0.0), guidance_scale=guidance_scale
    )
    with torch.no_grad():
        condition = policy.prompt_condition(PROMPTS[:2])
        latents = policy.sample(condition, num_inference_steps=7, generator=generator())
        images, prompts, metadata = policy.decode(latents, condition)
    options = {"num_inference_steps": 7, "guidance_scale": guidance_scale, "height": 8, "width": 8}
    expected = pipeline(PROMPTS[:2], **options, generator=generator(), output_type="latent").images
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    expected = pipeline(PROMPTS[:2], **options, generator=generator(), output_type="pt").images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    assert (prompts, metadata) == (PROMPTS[:2], [{}, {}])


@pytest.mark.parametrize(
    ("kind", "guidance"),
    [*((kind, (1.0, 1.0)) for kind in KINDS), ("sd_v", (3.0, 3.0)), ("sdxl", (3.0, 1.0)), ("sd3", (3.0, 1.0))],
    ids=str,
)
def test_the_ratio_before_the_first_update_is_1(
    make_pipeline: MakePipeline, kind: str, guidance: tuple[float, float]
) -> None:
    policy = TextToImagePolicy(make_pipeline(kind), guidance_scale=guidance[0], training_guidance_scale=guidance[1])
    config = DDPOConfig(**SMALL, per_device_train_batch_size=8, group_size=4, num_train_denoising_steps=None)
    trainer = DDPOTrainer(
        policy, config, train_dataset=PROMPTS, reward_function=brightness, peft_config=LoraConfig(r=2)
    )
    batch = trainer.make_batch(trainer.generator("batch"))
    trainer.compute_loss(trainer.model, batch)
    logged = trainer._drain_metrics()
    assert logged["ratio"] == 1.0
    assert logged["kl"] == 0.0
    if guidance[0] != guidance[1]:  # the samples are not of the policy that is trained
        step = int(batch["steps"][0])
        x_t, timestep = batch["latents"][step], batch["timesteps"][step].item()
        condition = {n.removeprefix("condition."): v for n, v in batch.items() if n.startswith("condition.")}
        guided = policy._guided(x_t, timestep, condition, None, guidance[0])
        transition = policy.scheduler.transition(guided, x_t, timestep, batch["next_timesteps"][step].item())
        assert not torch.equal(transition.log_prob(batch["next_latents"][step]), batch["log_probs"][step])


@pytest.mark.parametrize(("kind", "loss_type"), [("sd_epsilon", "awm"), ("sdxl", "nft"), ("sd3", "awm")])
def test_the_policies_of_nft_start_as_one(make_pipeline: MakePipeline, kind: str, loss_type: Any) -> None:
    config = NFTConfig(**SMALL, loss_type=loss_type, per_device_train_batch_size=8, group_size=4, num_conditions=2)
    policy = TextToImagePolicy(make_pipeline(kind))
    trainer = NFTTrainer(policy, config, train_dataset=PROMPTS, reward_function=brightness, peft_config=LoraConfig(r=2))
    trainer.train()
    assert trainer.history[0]["old_distance"] == 0
    if loss_type == "awm":
        assert trainer.history[0]["ratio"] == 1


TRAINERS: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "ddpo": (DDPOTrainer, DDPOConfig, {"per_device_train_batch_size": 8, "group_size": 4}),
    "nft": (NFTTrainer, NFTConfig, {"num_conditions": 2, "group_size": 4, "per_device_train_batch_size": 8}),
    "reward_gradient": (RewardGradientTrainer, RewardGradientConfig, {"per_device_train_batch_size": 4}),
    "dpo": (
        DiffusionDPOTrainer,
        DiffusionDPOConfig,
        {"num_conditions": 2, "num_candidates": 3, "per_device_train_batch_size": 4},
    ),
    "dpo_shared_latent": (
        DiffusionDPOTrainer,
        DiffusionDPOConfig,
        {"pair_consistency": "shared_latent", "num_conditions": 2, "num_candidates": 2},
    ),
    "sft": (SFTTrainer, SFTConfig, {"num_conditions": 2, "num_candidates": 3, "per_device_train_batch_size": 4}),
}


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("sd_v", "ddpo"),
        ("sd3", "nft"),
        ("sd3", "reward_gradient"),
        ("sd_v", "dpo"),
        ("sd_v", "dpo_shared_latent"),
        ("sd3", "sft"),
    ],
)
def test_every_trainer_moves_the_adapter_and_nothing_else(make_pipeline: MakePipeline, kind: str, method: str) -> None:
    policy = TextToImagePolicy(make_pipeline(kind))
    trainer_type, config_type, options = TRAINERS[method]
    before = {
        f"{component}.{name}": tensor.clone()
        for component in ("vae", "text_encoder", policy.adapted_component)
        for name, tensor in getattr(policy.pipeline, component).state_dict().items()
    }
    trainer = trainer_type(
        policy,
        config_type(**SMALL, **options),
        train_dataset=PROMPTS,
        reward_function=brightness,
        peft_config=LoraConfig(r=2),
    )
    trainer.train()
    assert trainer.history[0]["grad_norm"] > 0
    after = {f"{policy.adapted_component}.{name}": tensor for name, tensor in policy.base_weights().items()}
    for component in ("vae", "text_encoder"):
        after |= {f"{component}.{n}": t for n, t in getattr(policy.pipeline, component).state_dict().items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    adapter = [parameter for name, parameter in policy.denoiser.named_parameters() if ".lora_B" in name]
    assert any(bool(parameter.any()) for parameter in adapter)


def learn_to_predict_noise(network: nn.Module, policy: TextToImagePolicy) -> None:
    """A little, on latents of unit variance: untrained, its samples are so large that decoding hardly depends on it."""
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    condition = policy.prompt_condition(PROMPTS * 8)
    source = generator()
    for _ in range(120):
        x0, noise = (torch.randn(policy.latent_shape(32), generator=source) for _ in range(2))
        timesteps = policy.scheduler.sample_timesteps(32, source)
        predicted = policy.predict(policy.scheduler.add_noise(x0, noise, timesteps), timesteps, condition)
        loss = (predicted - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_the_reward_rises_and_plain_diffusers_loads_the_adapter(
    make_pipeline: MakePipeline, kind: str, tmp_path: Path
) -> None:
    """20 iterations; measured on the same noise before and after."""

    def measured() -> Tensor:
        with torch.no_grad():
            condition = policy.repeat(policy.prompt_condition(PROMPTS[:2]), 32)
            images, *_ = policy.decode(
                policy.sample(condition, num_inference_steps=4, generator=generator()), condition
            )
        return redness(images)

    policy = TextToImagePolicy(make_pipeline(kind))
    foundation = make_pipeline(kind)
    if kind == "sd_epsilon":
        learn_to_predict_noise(policy.denoiser, policy)
        foundation.unet.load_state_dict(policy.denoiser.state_dict())
    before = measured()
    options: dict[str, Any] = {**SMALL, "max_steps": 20, "lr_scheduler_type": "constant"}
    options |= {"per_device_train_batch_size": 32, "group_size": 16, "num_train_denoising_steps": 2}
    options |= {"learning_rate": 4e-3 if kind == "sd3" else 4e-2, "kl_coefficient": 0.0}
    trainer = DDPOTrainer(
        policy,
        DDPOConfig(**options),
        train_dataset=PROMPTS[:2],
        reward_function=redness,
        peft_config=LoraConfig(r=4, lora_alpha=8),
    )
    trainer.train()
    rise = measured() - before
    assert rise.mean() > 4 * rise.std() / len(rise) ** 0.5
    assert rise.mean() > 0.2 * before.std()
    policy.save_lora_weights(tmp_path)
    options = {"num_inference_steps": 3, "height": 8, "width": 8, "output_type": "pt"}
    expected = policy.pipeline(PROMPTS[0], **options, generator=generator()).images
    plain = copy.deepcopy(foundation)
    base = plain(PROMPTS[0], **options, generator=generator()).images
    plain.load_lora_weights(tmp_path)
    assert torch.equal(plain(PROMPTS[0], **options, generator=generator()).images, expected)
    assert not torch.allclose(base, expected, atol=1e-3)
    again = TextToImagePolicy(foundation)
    again.load_lora_weights(tmp_path)
    assert torch.equal(again.pipeline(PROMPTS[0], **options, generator=generator()).images, expected)


def test_full_weights_are_trained_and_saved_in_diffusers_format(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    policy = TextToImagePolicy(make_pipeline("sd_v"))
    config = DDPOConfig(
        **SMALL,
        per_device_train_batch_size=8,
        group_size=4,
        kl_coefficient=0.0,
        output_dir=str(tmp_path),
        save_strategy="steps",
        save_steps=1,
    )
    before = copy.deepcopy(policy.denoiser.state_dict())
    trainer = DDPOTrainer(policy, config, train_dataset=PROMPTS, reward_function=brightness)
    trainer.train()
    assert any(not torch.equal(before[name], tensor) for name, tensor in policy.denoiser.state_dict().items())
    loaded = type(policy.denoiser).from_pretrained(tmp_path / "checkpoint-1" / "unet")
    assert all(torch.equal(loaded.state_dict()[name], t) for name, t in policy.denoiser.state_dict().items())


# Prompts


def test_rewards_get_the_metadata_of_each_prompt(make_pipeline: MakePipeline) -> None:
    rows = [{"prompt": "an é", "digit": 3, "tags": ["x"]}, {"prompt": "b", "digit": 4, "tags": []}]
    policy = TextToImagePolicy(make_pipeline("sd_v"))
    seen: list[tuple[str, Any]] = []

    def reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        seen.extend(zip(prompts, metadata, strict=True))
        return [float(m["digit"]) for m in metadata]

    config = DDPOConfig(**SMALL, per_device_train_batch_size=8, group_size=2)
    trainer = DDPOTrainer(
        policy, config, train_dataset=Dataset.from_list(rows), reward_function=reward, peft_config=LoraConfig(r=2)
    )
    trainer.train()
    known = [(row.pop("prompt"), row) for row in copy.deepcopy(rows)]
    assert len(seen) == 2 + 8
    assert all(pair in known for pair in seen)
    assert all(seen[2 + 2 * k] == seen[3 + 2 * k] for k in range(4))  # groups are contiguous


def test_each_prompt_is_encoded_once_and_the_cache_is_bounded(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline("sd_v")
    calls: list[int] = []
    pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    policy = TextToImagePolicy(pipeline, prompt_cache_size=2)
    first = policy.prompt_condition(["a", "b", "a"])
    per_prompt = len(calls) // 2
    policy.prompt_condition(["b", "a"])
    assert len(calls) == 2 * per_prompt
    policy.prompt_condition(["c"])  # takes the place of b, which was used longest ago
    policy.prompt_condition(["a"])
    assert len(calls) == 3 * per_prompt
    again = policy.prompt_condition(["b"])
    assert len(calls) == 4 * per_prompt
    assert torch.equal(first["embedding"][1], again["embedding"][0])


def stream(count: int = 37, shards: int = 1) -> IterableDataset:
    def rows(shard: list[int]) -> Any:
        for index in (row for part in shard for row in range(part, count, shards)):
            yield {"prompt": str(index)}

    return IterableDataset.from_generator(rows, gen_kwargs={"shard": list(range(shards))})


@pytest.mark.parametrize("shards", [1, 2])
def test_processes_share_a_stream_without_overlap(make_pipeline: MakePipeline, shards: int) -> None:
    policy = TextToImagePolicy(make_pipeline("sd_v"))
    seen: list[list[str]] = []
    for index in range(2):
        source = PromptConditions(policy, stream(shards=shards), process_index=index, num_processes=2)
        source.trial()
        taken = [source._take(1, generator())[0]["prompt"] for _ in range(18)]
        seen.append(taken)
    assert len({*seen[0], *seen[1]}) == 36


def test_a_stream_starts_again_and_resumes_where_it_was(make_pipeline: MakePipeline) -> None:
    policy = TextToImagePolicy(make_pipeline("sd_v"))
    shuffled = stream().shuffle(seed=1, buffer_size=8)

    def take(source: Any, count: int) -> list[str]:
        return [row["prompt"] for row in source._take(count, generator())]

    source = policy.condition_source(shuffled)
    source.trial()
    first = take(source, 37)
    assert sorted(first, key=int) == [str(index) for index in range(37)]
    second = take(source, 5)
    state = source.state()
    rest = take(source, 32)
    assert second + rest != first  # shuffled anew
    assert sorted(second + rest) == sorted(first)
    resumed = policy.condition_source(shuffled)
    resumed.load_state(state)
    assert take(resumed, 32) == rest


def test_a_run_on_a_stream_resumes_bit_for_bit(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    def run(folder: str, steps: int, resume: bool = False) -> dict[str, Tensor]:
        policy = TextToImagePolicy(make_pipeline("sd_v"))
        config = DDPOConfig(
            **{**SMALL, "max_steps": steps},
            per_device_train_batch_size=8,
            group_size=4,
            lr_scheduler_type="constant",
            epochs_per_rollout=2,
            output_dir=str(tmp_path / folder),
            save_strategy="steps",
            save_steps=3,
        )
        trainer = DDPOTrainer(
            policy, config, train_dataset=stream(), reward_function=brightness, peft_config=LoraConfig(r=2)
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return {name: p.detach().clone() for name, p in policy.denoiser.named_parameters() if "lora" in name}

    whole = run("whole", 5)
    run("parts", 3)
    resumed = run("parts", 5, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_images_are_encoded_once_each_by_itself_and_the_cache_is_bounded(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline("sd_v")
    sizes: list[int] = []
    pipeline.vae.encoder.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    pictures = torch.rand(3, 3, 8, 8, generator=generator())
    rows = [{"prompt": str(index), "image": picture} for index, picture in enumerate(pictures)]
    source = TextToImagePolicy(pipeline).condition_source(rows)
    first, _ = source.examples(16, generator(1))
    assert sizes == [1] * 3
    again, _ = source.examples(16, generator(1))
    assert len(sizes) == 3
    assert torch.equal(first, again)
    bounded = TextToImagePolicy(pipeline, image_cache_size=1).condition_source(rows)
    for _ in range(2):
        assert torch.equal(bounded.examples(16, generator(1))[0], first)
    assert len(sizes) == 3 + 3 + 2


def test_images_of_pairs_are_examples(make_pipeline: MakePipeline) -> None:
    policy = TextToImagePolicy(make_pipeline("sdxl"))
    pictures = torch.rand(3, 3, 8, 8, generator=generator())
    rows = [{"prompt": str(index), "image": picture} for index, picture in enumerate(pictures)]
    source = policy.condition_source(rows)
    assert source.has_examples
    latents, condition = source.examples(2, generator(4))
    indices = torch.randint(3, (2,), generator=generator(4))
    _, prompts, _ = policy.decode(latents, condition)
    assert prompts == [str(index) for index in indices.tolist()]
    config = policy.pipeline.vae.config
    mode = policy.pipeline.vae.encode(2 * pictures[indices] - 1).latent_dist.mode()
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (config.latents_mean, config.latents_std))
    torch.testing.assert_close(latents, (mode - mean) * config.scaling_factor / std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "has no rows"),
        ([{"caption": "a"}], "rows with a column `prompt`; got"),
        ((text for text in PROMPTS), "gone through several times: .* got generator"),
        (io.StringIO(""), "gone through several times"),
        ([{"prompt": "a", "object": object()}], "metadata of the prompt 'a' must be JSON-ready"),
        (["a" * RECORD_BYTES], f"bytes with its metadata, more than {RECORD_BYTES}"),
    ],
)
def test_data_without_usable_prompts_are_refused(make_pipeline: MakePipeline, data: Any, message: str) -> None:
    policy = TextToImagePolicy(make_pipeline("sd_v"))
    with pytest.raises(ValueError, match=message):
        policy.condition_source(data).conditions(1, generator())


def test_examples_need_images_and_rewards_a_function(make_pipeline: MakePipeline) -> None:
    policy = TextToImagePolicy(make_pipeline("sd_v"))
    with pytest.raises(ValueError, match="add a column `image`"):
        policy.condition_source(PROMPTS).examples(1, generator())
    config = SFTConfig(**SMALL)
    with pytest.raises(ValueError, match="text-to-image has no critic to reward with"):
        SFTTrainer(policy, config, train_dataset=PROMPTS, peft_config=LoraConfig(r=2))
    config = SFTConfig(**SMALL, likelihood_quantile=0.9)
    with pytest.raises(ValueError, match="`likelihood_quantile` compares samples with those of the data"):
        SFTTrainer(policy, config, train_dataset=PROMPTS, reward_function=brightness)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "`use_dynamic_shifting` must be False, got True"),
        (EulerDiscreteScheduler(), "`timestep_spacing` must be 'leading' or 'trailing', got 'linspace'"),
        (EulerDiscreteScheduler(use_karras_sigmas=True), "`use_karras_sigmas` must be False"),
        (DDPMScheduler(thresholding=True), "`thresholding` must be False"),
    ],
)
def test_schedulers_without_a_counterpart_are_refused(scheduler: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transition_scheduler(scheduler)


def test_other_pipelines_and_sizes_are_refused(make_pipeline: MakePipeline) -> None:
    with pytest.raises(ValueError, match=r"`pipeline` must be one of StableDiffusionXLPipeline, .* got Linear"):
        TextToImagePolicy(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="`height` must be a multiple of 2"):
        TextToImagePolicy(make_pipeline("sd_v"), height=9)


def test_a_stream_is_read_no_further_than_needed(make_pipeline: MakePipeline) -> None:
    produced: list[int] = []

    class Prompts:
        def __iter__(self) -> Iterator[str]:
            for number in range(2_000_000):
                produced.append(number)
                yield str(number)

    policy = TextToImagePolicy(make_pipeline("sd_v"), prompt_cache_size=8)
    source = policy.condition_source(Prompts(), process_index=1, num_processes=2)
    source.trial()
    condition = source.conditions(20, generator())
    assert policy.decode(torch.zeros(policy.latent_shape(20)), condition)[1] == [str(2 * n + 1) for n in range(20)]
    assert len(produced) == 40
    assert len(policy._cache) == 8
