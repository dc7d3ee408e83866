"""Reward models of transformers as text-to-image rewards: CLIP score, PickScore, aesthetics, composition.

All but the detector's are differentiable, so `RewardGradientTrainer` takes them too. The models are the caller's:
loaded with transformers, frozen here, and moved to the images' device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training pictures (Radford et al., 2021, arXiv:2103.00020, as in OpenAI's preprocessing)."""


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """Images `(B, 3, H, W)` in `[0, 1]` as CLIP's vision tower takes them: bicubic, centre crop, normalised."""
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    resized = F.interpolate(
        images,
        (max(size, round(height * scale)), max(size, round(width * scale))),
        mode="bicubic",
        antialias=True,
        align_corners=False,
    ).clamp(0, 1)
    top, left = (resized.shape[-2] - size) // 2, (resized.shape[-1] - size) // 2
    cropped = resized[..., top : top + size, left : left + size]
    mean, std = (torch.tensor(values).to(images).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (cropped - mean) / std


def clip_reward(model: Any, tokenizer: Any, *, scaled: bool = False) -> Callable[..., Tensor]:
    """Cosine of the embeddings of image and prompt by a `CLIPModel`.

    Args:
        model: `CLIPModel`; with `"yuvalkirstain/PickScore_v1"` and `scaled` this is PickScore (arXiv:2305.01569).
        tokenizer: its tokenizer.
        scaled: times the model's `exp(logit_scale)`.
    """
    _freeze(model)

    def reward(images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
        model.to(images.device)
        tokens = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(images.device)
        pixels = clip_pixels(images, model.config.vision_config.image_size)
        output = model(pixel_values=pixels.to(model.dtype), **tokens)
        cosine = (output.image_embeds * output.text_embeds).sum(-1)
        return cast(Tensor, (cosine * model.logit_scale.exp() if scaled else cosine).float())

    return reward


def aesthetic_reward(model: Any, head: nn.Module) -> Callable[..., Tensor]:
    """A head on the normalised image embedding of a `CLIPModel`, such as LAION's aesthetic predictors.

    Args:
        model: `CLIPModel`, the one that the head was trained on.
        head: maps embeddings `(B, projection_dim)` of length 1 to `(B, 1)`.
    """
    _freeze(model)
    _freeze(head)

    def reward(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        model.to(images.device)
        head.to(images.device)
        pixels = clip_pixels(images, model.config.vision_config.image_size).to(model.dtype)
        embedding = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        score: Tensor = head(F.normalize(embedding, dim=-1))
        return score.squeeze(-1).float()

    return reward


def composition_reward(
    detect: Callable[[Tensor, list[list[str]]], Sequence[Mapping[str, float]]],
    objects: Callable[[str, Mapping[str, Any]], Sequence[str]],
) -> Callable[..., Tensor]:
    """Share of the named objects that are seen: the mean of the detector's confidence in each (section 4.3 of
    arXiv:2401.12244).

    Args:
        detect: images and the objects to look for in each, to the highest confidence in `[0, 1]` by object; those that
            it does not name are not seen. With transformers: an open-vocabulary detector behind
            `pipeline("zero-shot-object-detection")`.
        objects: `(prompt, metadata)` to the objects that the image should show, at least one.
    """

    @torch.no_grad()
    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        wanted = [list(objects(prompt, facts)) for prompt, facts in zip(prompts, metadata, strict=True)]
        for prompt, names in zip(prompts, wanted):
            if not names:
                raise ValueError(f"`objects` finds none in the prompt {prompt!r}: leave such prompts out.")
        found = detect(images, wanted)
        means = [sum(seen.get(name, 0.0) for name in names) / len(names) for names, seen in zip(wanted, found)]
        return torch.tensor(means)

    return reward


def _freeze(module: nn.Module) -> None:
    module.eval().requires_grad_(False)
