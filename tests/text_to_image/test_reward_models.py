"""Reward models of transformers, at tiny size: they score as transformers does, and gradients reach the image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from dmc_hub.reward_models import aesthetic_reward, clip_pixels, clip_reward, composition_reward
from dmc_hub.text_to_image import TextToImagePolicy
from dmc_hub.trainers.reward_gradient import RewardGradientConfig, RewardGradientTrainer

PROMPTS = ["a 3", "a dark cat"]


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=74,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))


@pytest.fixture
def tokenizer(make_pipeline: Callable[[str], Any]) -> Any:
    return make_pipeline("sd_v").tokenizer


def pictures() -> Tensor:
    smooth = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(smooth, (32, 48), mode="bilinear")


def test_pixels_are_those_of_transformers_own_preprocessing() -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    files = [Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()) for image in pictures()]
    expected = torch.tensor(np.stack(processor(files)["pixel_values"]))
    torch.testing.assert_close(clip_pixels(pictures(), 16), expected, rtol=0, atol=0.03)  # 8 bits before and after


def test_scores_are_those_of_clip(clip: CLIPModel, tokenizer: Any) -> None:
    images = pictures()
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = clip(pixel_values=clip_pixels(images, 16), **tokens).logits_per_image.diagonal()
        scaled = clip_reward(clip, tokenizer, scaled=True)(images, PROMPTS, [{}] * 2)
        plain = clip_reward(clip, tokenizer)(images, PROMPTS, [{}] * 2)
    torch.testing.assert_close(scaled, logits)
    torch.testing.assert_close(plain * clip.logit_scale.exp(), logits)


def test_the_head_sees_normalised_image_embeddings(clip: CLIPModel) -> None:
    head = nn.Linear(8, 1)
    with torch.no_grad():
        score = aesthetic_reward(clip, head)(pictures(), PROMPTS, [{}] * 2)
        tokens = {"input_ids": torch.zeros(2, 3, dtype=torch.long)}
        embeddings = clip(pixel_values=clip_pixels(pictures(), 16), **tokens).image_embeds
        torch.testing.assert_close(score, head(embeddings)[:, 0])


@pytest.mark.parametrize("kind", ["clip", "aesthetic"])
def test_gradients_reach_the_adapter_and_not_the_reward_model(
    clip: CLIPModel, tokenizer: Any, make_pipeline: Callable[[str], Any], kind: str
) -> None:
    reward = clip_reward(clip, tokenizer) if kind == "clip" else aesthetic_reward(clip, nn.Linear(8, 1))
    config = RewardGradientConfig(
        max_steps=1, logging_steps=1, num_inference_steps=2, per_device_train_batch_size=2, disable_tqdm=True
    )
    policy = TextToImagePolicy(make_pipeline("sd_v"))
    trainer = RewardGradientTrainer(
        policy, config, train_dataset=PROMPTS, reward_function=reward, peft_config=LoraConfig(r=2)
    )
    trainer.train()
    assert trainer.history[0]["grad_norm"] > 0
    assert not any(parameter.requires_grad for parameter in clip.parameters())


def test_composition_is_the_mean_confidence_in_what_was_asked_for() -> None:
    def detect(images: Tensor, wanted: list[list[str]]) -> Sequence[Mapping[str, float]]:
        assert wanted == [["cat", "dog"], ["owl"]]
        return [{"cat": 0.8, "owl": 0.9}, {"owl": 0.5}]

    def objects(prompt: str, metadata: Mapping[str, Any]) -> list[str]:
        return prompt.split(" and ") if prompt else []

    reward = composition_reward(detect, objects)
    assert reward(pictures(), ["cat and dog", "owl"], [{}] * 2).tolist() == pytest.approx([0.4, 0.5])
    with pytest.raises(ValueError, match="`objects` finds none in the prompt ''"):
        reward(pictures(), ["", "owl"], [{}] * 2)
