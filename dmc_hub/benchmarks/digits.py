"""A Stable Diffusion from nothing, on scikit-learn's digits in four tones, with classifiers to reward it by.

The prompts name a digit, and three in ten a tone before it; where they do not, most pictures have the first tone. So
the base is biased as web-scale models are, and both following the prompt and parity of the tones can be measured. They
begin in three ways, so that a model can be measured on wordings that its alignment has not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dmc_hub import checkpoint
from dmc_hub.text_to_image import TextToImagePolicy

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TONES = {
    "amber": (1.0, 0.6, 0.2),
    "rose": (0.9, 0.2, 0.7),
    "jade": (0.2, 0.9, 0.7),
    "azure": (0.2, 0.6, 1.0),
}
"""Colours of equal mean, so that the tone does not fix the brightness."""
TONE_SHARES = (0.79, 0.07, 0.07, 0.07)
"""Where the prompt names no tone."""
OPENINGS = ("", "the", "this")
"""What a prompt may begin with."""


@dataclass(frozen=True)
class DigitPictures:
    """Pictures `(N, 3, 8, 8)` in `[0, 1]` with their prompts, digits and tones."""

    images: Tensor
    prompts: list[str]
    digits: Tensor
    tones: Tensor

    def rows(self) -> list[dict[str, Any]]:
        """As pairs for the pretraining loss."""
        return [{"prompt": prompt, "image": image} for prompt, image in zip(self.prompts, self.images, strict=True)]

    def part(self, rows: slice) -> DigitPictures:
        return DigitPictures(self.images[rows], self.prompts[rows], self.digits[rows], self.tones[rows])


def digit_pictures(seed: int) -> DigitPictures:
    """scikit-learn's 1,797 digits, each in one tone and with a random brightness from 0.5 to 1.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('The digits need scikit-learn: `pip install "dmc_hub[text-to-image]"`.') from error
    data, rng = load_digits(), np.random.default_rng(seed)
    order = rng.permutation(len(data.target))
    digits = data.target[order]
    is_named = rng.random(len(digits)) < 0.3
    tones = np.where(
        is_named, rng.integers(len(TONES), size=len(digits)), rng.choice(len(TONES), len(digits), p=TONE_SHARES)
    )
    names = list(TONES)
    openings = rng.choice(OPENINGS, len(digits))
    prompts = [
        prompt_of(digit, names[tone] if named else "", opening)
        for digit, tone, named, opening in zip(digits, tones, is_named, openings)
    ]
    colours = np.array(list(TONES.values()))[tones] * rng.uniform(0.5, 1, (len(digits), 1))
    images = (data.images[order] / 16)[:, None] * colours[:, :, None, None]
    return DigitPictures(torch.tensor(images, dtype=torch.float32), prompts, torch.tensor(digits), torch.tensor(tones))


def prompt_of(digit: int, tone: str = "", opening: str = "") -> str:
    """Say "the jade seven"."""
    return " ".join(word for word in (opening, tone, DIGITS[digit]) if word)


class DigitClassifier(nn.Module):
    """Log-probabilities of digits and of tones from pictures; differentiable."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 48, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48 * 16, len(DIGITS) + len(TONES)),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        digits, tones = self.body(images).split([len(DIGITS), len(TONES)], dim=1)
        return digits.log_softmax(1), tones.log_softmax(1)


def batches(count: int, size: int, steps: int, seed: int, name: str) -> Iterator[tuple[Tensor, torch.Generator]]:
    """Random rows for each step, and the generator that drew them; with a bar."""
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc=name, dynamic_ncols=True):
        yield torch.randint(count, (size,), generator=generator), generator


def train_classifier(data: DigitPictures, *, steps: int, seed: int) -> DigitClassifier:
    """On pictures with noise and shifts, so that it also reads generated ones."""
    torch.manual_seed(seed)
    model = DigitClassifier()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for rows, generator in batches(len(data.digits), 128, steps, seed, "classifier"):
        shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
        images = torch.roll(data.images[rows], shift, (2, 3))
        digits, tones = model(images + 0.1 * torch.randn(images.shape, generator=generator))
        loss = F.nll_loss(digits, data.digits[rows]) + F.nll_loss(tones, data.tones[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def word_tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with one token for each word: its merges build the words letter by letter."""
    merges, tokens = [], {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for word in words:
        built = word[0]
        letters = [*word[1:-1], f"{word[-1]}</w>"]
        for letter in letters:
            merges.append((built, letter))
            for token in (built, letter, built + letter):
                tokens.setdefault(token, len(tokens))
            built += letter
    unique = list(dict.fromkeys(merges))
    return CLIPTokenizer(vocab=tokens, merges=unique, model_max_length=6, pad_token="<|endoftext|>")


def tiny_stable_diffusion(seed: int) -> StableDiffusionPipeline:
    """The architecture of Stable Diffusion for pictures of 8 × 8, untrained: about 0.5 million parameters."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer([*DIGITS, *TONES, *filter(None, OPENINGS)])
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=6,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=8,
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(32, 48),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="v_prediction",
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def train_autoencoder(vae: AutoencoderKL, images: Tensor, *, steps: int, seed: int) -> None:
    """Squared error and a little KL; afterwards latents have unit variance by `scaling_factor`."""
    optimizer = torch.optim.Adam(vae.parameters(), 2e-3)
    for rows, generator in batches(len(images), 64, steps, seed, "autoencoder"):
        pictures = 2 * images[rows] - 1
        latents = vae.encode(pictures).latent_dist
        decoded = vae.decode(latents.sample(generator=generator)).sample
        loss = F.mse_loss(decoded, pictures) + 1e-4 * latents.kl().mean() / latents.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        std = vae.encode(2 * images[:512] - 1).latent_dist.mode().std().item()
    vae.register_to_config(scaling_factor=1 / std)


def train_base(pipeline: StableDiffusionPipeline, data: DigitPictures, *, steps: int, seed: int) -> None:
    """U-Net and text encoder together by the denoising loss; one prompt in ten is dropped."""
    policy = TextToImagePolicy(pipeline)
    scheduler, generator = policy.scheduler, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        mode = pipeline.vae.encode(2 * data.images - 1).latent_dist.mode()
    latents = mode * pipeline.vae.config.scaling_factor
    parameters = [*pipeline.unet.parameters(), *pipeline.text_encoder.parameters()]
    optimizer = torch.optim.Adam(parameters, 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 2e-4)
    for rows, _ in batches(len(latents), 64, steps, seed, "base"):
        prompts = [data.prompts[row] for row in rows.tolist()]
        is_dropped = torch.rand(len(prompts), generator=generator) < 0.1
        prompts = ["" if drop else prompt for prompt, drop in zip(prompts, is_dropped)]
        tokens = pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        embedding = pipeline.text_encoder(tokens)[0]
        levels = scheduler.sample_timesteps(len(rows), generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        noisy = scheduler.add_noise(latents[rows], noise, levels)
        output = pipeline.unet(noisy, levels, embedding).sample
        loss = F.mse_loss(output, scheduler.training_target(latents[rows], noise, levels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for component in (pipeline.unet, pipeline.text_encoder):
        component.eval().requires_grad_(False)


def save_foundation(path: Path, pipeline: StableDiffusionPipeline, reader: nn.Module, judge: nn.Module) -> None:
    """Keep what `load_foundation` reads: weights, and the scale of the latents."""
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder, "vae": pipeline.vae}
    tensors = {
        f"{part}.{name}": tensor
        for part, module in {**parts, "reader": reader, "judge": judge}.items()
        for name, tensor in module.state_dict().items()
    }
    scale = torch.tensor(pipeline.vae.config.scaling_factor, dtype=torch.float64)
    checkpoint.save_tensors(path, {**tensors, "scale": scale})


def load_foundation(
    path: Path, pipeline: StableDiffusionPipeline
) -> tuple[StableDiffusionPipeline, DigitClassifier, DigitClassifier]:
    """Put the weights of the file into an untrained pipeline, and make its two classifiers."""
    tensors = checkpoint.load_tensors(path)
    reader, judge = DigitClassifier(), DigitClassifier()
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder, "vae": pipeline.vae}
    for part, module in {**parts, "reader": reader, "judge": judge}.items():
        prefix = f"{part}."
        state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        module.load_state_dict(state)
        module.eval().requires_grad_(False)
    pipeline.vae.register_to_config(scaling_factor=float(tensors["scale"]))
    return pipeline, reader, judge
